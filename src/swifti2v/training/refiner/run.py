"""Stage II of the full system, from a folder of videos to a checkpoint: the three recipes behind `swifti2v train`.

```
swifti2v train transition recipes/wan2.2/transition.yaml --data VIDEOS --output CACHE
swifti2v train stage-two  recipes/wan2.2/stage_two.yaml  --cache CACHE --output RUN
swifti2v train distill    recipes/wan2.2/distill.yaml    --cache CACHE --output RUN4 --init RUN/checkpoint
```
Under torchrun the same commands divide the videos, and then the batches and the weights, over the processes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from swifti2v.config import to_mapping
from swifti2v.data.batches import BucketBatches
from swifti2v.data.latent_cache import CacheOptions, LatentCache, build_cache, fingerprint_of
from swifti2v.errors import ConfigurationError
from swifti2v.models.checkpoint_index import INDEX_NAME, is_within, write_index
from swifti2v.models.checkpoints import load_stage_two_vae, resolve
from swifti2v.training.engine.distributed import BatchesOfProcess, Processes, joined_processes
from swifti2v.training.engine.loop import LoopOptions, Objective, TrainingLoop
from swifti2v.training.engine.writing import writing
from swifti2v.training.refiner.distillation import DistillationObjective, DistillationOptions
from swifti2v.training.refiner.encoding import EncodingOptions, StageTwoEncoder, load_encoding_parts
from swifti2v.training.refiner.network import NetworkOptions, load_network, load_teacher, save_network
from swifti2v.training.refiner.segment_flow import LATENTS, SegmentFlowObjective, SegmentFlowOptions
from swifti2v.training.refiner.validation import HeldOut, RefinerValidation, ValidationOfRefiner
from swifti2v.training.videos import VideoSelection

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.data.latent_cache import CacheProgress
    from swifti2v.models.checkpoints import Part
    from swifti2v.models.transformer import StageTwoTransformer
    from swifti2v.training.engine.loop import StepReport

STAGE_TWO: tuple[Part, ...] = ("stage_two",)
CHECKPOINT_FOLDER = "checkpoint"


@dataclass(frozen=True)
class TransitionRun:
    """The recipe file of stage-transition: from videos to a cache of truths and references.

    Args:
        checkpoint: whose Stage I redraws the clips and whose Stage II codec encodes them: `wan2.2`, or a folder.
        videos: which clips, at output size.
        encoding: how references are made.
    """

    checkpoint: str = "wan2.2"
    videos: VideoSelection = field(default_factory=VideoSelection)
    encoding: EncodingOptions = field(default_factory=EncodingOptions)


@dataclass(frozen=True)
class RefinerRun:
    """The recipe file of Stage II at any size.

    Args:
        checkpoint: whose Stage II the training starts from; stock Wan weights are widened.
        loop: how long and on how much.
        batch_size: windows per process and part of a step.
        network: what is trained.
        flow: what is learned.
        validation: how what was learned is judged, every ``loop.validate_every`` steps.
    """

    loop: LoopOptions
    checkpoint: str = "wan2.2"
    batch_size: int = 1
    network: NetworkOptions = field(default_factory=NetworkOptions)
    flow: SegmentFlowOptions = field(default_factory=SegmentFlowOptions)
    validation: ValidationOfRefiner = field(default_factory=ValidationOfRefiner)


@dataclass(frozen=True)
class DistillationRun:
    """The recipe file of a few-step Stage II; `checkpoint` is teacher and start of the student."""

    loop: LoopOptions
    checkpoint: str = "wan2.2"
    batch_size: int = 1
    network: NetworkOptions = field(default_factory=NetworkOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    validation: ValidationOfRefiner = field(default_factory=ValidationOfRefiner)


def build_references(
    run: TransitionRun,
    *,
    data: Path,
    output: Path,
    on_video: Callable[[int, int], None] | None = None,
    on_clip: Callable[[CacheProgress], None] | None = None,
) -> LatentCache:
    """Encode the usable videos of a folder; what is not usable is listed in ``output/data.json``.

    Raises:
        InvalidInputError: nothing in the folder can be used.
        LatentCacheError: `output` holds a cache of another codec or other settings.
    """
    with joined_processes() as processes:
        parts = load_encoding_parts(run.checkpoint, device=processes.device)
        requests = run.videos.requests(
            data,
            size_multiple=parts.geometry.size_multiple,
            report=output if processes.is_main else None,
            on_video=on_video,
        )
        fingerprint = fingerprint_of(codec=parts.codec_digest, settings=to_mapping(run), clips=requests)
        return build_cache(
            requests,
            output,
            encode=StageTwoEncoder(parts, run.encoding),
            fingerprint=fingerprint,
            options=CacheOptions(rank=processes.rank, world_size=processes.count),
            on_progress=on_clip,
        )


def train_refiner(
    run: RefinerRun, *, cache: Path, output: Path, on_step: Callable[[StepReport], None] | None = None
) -> Path:
    """Train Stage II on a cache; return the folder of the checkpoint, which `swifti2v generate --model` takes."""
    samples = LatentCache.open(cache)
    kept = HeldOut(samples, run.validation.num_samples)
    with joined_processes(run.loop.context_parallel) as processes:
        batches = _batches(kept, run.batch_size, run.flow.seed, processes)
        transformer = load_network(run.checkpoint, run.network)
        _check_sharing(transformer, samples, processes)
        validation = RefinerValidation(transformer, samples=samples, indices=kept.indices, options=run.validation)
        objective = SegmentFlowObjective(
            transformer, samples=samples, batches=batches, options=run.flow, num_processes=processes.batch_count
        )
        setup = _Setup(run.checkpoint, output, run.loop, validate=validation)
        _train(objective, transformer, setup, processes=processes, on_step=on_step)
    return output / CHECKPOINT_FOLDER


def distill_refiner(
    run: DistillationRun, *, cache: Path, output: Path, on_step: Callable[[StepReport], None] | None = None
) -> Path:
    """Distil Stage II to few steps without guidance; return the folder of its checkpoint, which says how many."""
    samples = LatentCache.open(cache)
    kept = HeldOut(samples, run.validation.num_samples)
    with joined_processes(run.loop.context_parallel) as processes:
        batches = _batches(kept, run.batch_size, run.distillation.flow.seed, processes)
        student = load_network(run.checkpoint, run.network)
        _check_sharing(student, samples, processes)
        options = replace(run.validation, num_steps=run.distillation.num_student_steps)
        validation = RefinerValidation(student, samples=samples, indices=kept.indices, options=options)
        teacher = load_teacher(run.checkpoint, run.network).to(processes.device)
        processes.share_tokens(teacher)
        objective = DistillationObjective(
            student,
            teacher,
            samples=samples,
            batches=batches,
            options=run.distillation,
            num_processes=processes.batch_count,
        )
        setup = _Setup(
            run.checkpoint, output, run.loop, num_steps=run.distillation.num_student_steps, validate=validation
        )
        _train(objective, student, setup, processes=processes, on_step=on_step)
    return output / CHECKPOINT_FOLDER


def _batches(samples: HeldOut, batch_size: int, seed: int, processes: Processes) -> BatchesOfProcess:
    return BatchesOfProcess(
        BucketBatches(samples, batch_size, seed, processes.batch_rank, processes.batch_count), processes
    )


def _check_sharing(transformer: StageTwoTransformer, samples: LatentCache, processes: Processes) -> None:
    """Raise `ConfigurationError` if the processes of a group cannot divide the tokens of every window alike."""
    if processes.context == 1:
        return
    if transformer.local_detail is not None:
        # It works on whole frames in every process, so that its gradient would count once for each.
        msg = "a network with local_detail cannot be trained with context_parallel; set it to 1"
        raise ConfigurationError(msg)
    _, patch_height, patch_width = transformer.config.patch_size
    for bucket, indices in samples.buckets.items():
        height, width = samples[indices[0]].tensors[LATENTS].shape[-2:]
        tokens = (height // patch_height) * (width // patch_width)
        if tokens % processes.context:
            msg = (
                f"a frame of {bucket} has {tokens} tokens, which context_parallel {processes.context} does not divide; "
                "choose another number, or another size of clips"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True)
class _Setup:
    """Where a run begins and ends."""

    base: str
    output: Path
    loop: LoopOptions
    num_steps: int | None = None
    validate: Callable[[int], dict[str, float]] | None = None


def _train(
    objective: Objective,
    transformer: StageTwoTransformer,
    setup: _Setup,
    *,
    processes: Processes,
    on_step: Callable[[StepReport], None] | None,
) -> None:
    """Run the loop; the checkpoint in ``output/checkpoint`` can be used from the first save on."""
    is_first = processes.is_main
    folder = setup.output / CHECKPOINT_FOLDER
    if is_first:
        with writing(folder):
            begin_checkpoint(setup.base, folder, num_steps=setup.num_steps)
    loop = TrainingLoop(objective, setup.output, setup.loop, processes=processes)

    def save(_step: int) -> None:
        save_network(transformer, folder / "stage_two" / "transformer", keep=is_first)

    loop.run(on_step=on_step if is_first else None, on_validation=setup.validate, on_checkpoint=save)


def begin_checkpoint(base: str | Path, output: Path, *, num_steps: int | None = None) -> None:
    """Write a checkpoint but for its network: the codec of `base`, and an index that names where Stage I lies.

    Args:
        base: checkpoint that the training starts from.
        output: folder of the new one.
        num_steps: of a distilled Stage II, which needs no guidance; None: steps and guidance of `base`.
    """
    resolved = resolve(base, parts=STAGE_TWO)
    index, one, two = resolved.index, resolved.index.stage_one, resolved.index.stage_two
    vae: Any = load_stage_two_vae(resolved)
    vae.save_pretrained(output / "stage_two" / "vae")
    adapters = tuple(replace(adapter, source=_lasting(adapter.source, resolved.root)) for adapter in one.adapters)
    if num_steps is not None:
        two = replace(two, num_inference_steps=num_steps, guidance_scale=1.0)
    made = replace(
        index,
        name=f"{index.name}-trained",
        stage_one=replace(one, source=_lasting(one.source, resolved.root), adapters=adapters),
        stage_two=replace(
            two,
            source="./stage_two",
            revision=None,
            transformer_subfolder="transformer",
            vae_subfolder="vae",
            refiner="concat",
            sigma_start=1.0,
        ),
        sha256={},
    )
    write_index(made, output / INDEX_NAME)


def _lasting(source: str, root: Path) -> str:
    """Return a source that holds from another folder: a part of the base is named by its full path."""
    return str((root / source).resolve()) if is_within(source) else source
