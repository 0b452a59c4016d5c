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
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, Tag

from swifti2v.config import to_mapping
from swifti2v.data.batches import BucketBatches
from swifti2v.data.latent_cache import CacheOptions, LatentCache, build_cache
from swifti2v.errors import ConfigurationError, LatentCacheError
from swifti2v.training.derived_index import CHECKPOINT_FOLDER, derived_index
from swifti2v.training.engine.distributed import Processes, joined_processes
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.engine.samples import BatchesOfProcess
from swifti2v.training.engine.writing import writing
from swifti2v.training.refiner.distillation import DistillationObjective, DistillationOptions
from swifti2v.training.refiner.distribution_matching import (
    DistributionMatchingObjective,
    DistributionMatchingOptions,
)
from swifti2v.training.refiner.encoding import (
    EncodingOptions,
    StageTwoEncoder,
    load_encoding_parts,
    read_empty_prompt,
)
from swifti2v.training.refiner.network import NetworkOptions, load_network, load_teacher, save_network
from swifti2v.training.refiner.segment_flow import SegmentFlowObjective, SegmentFlowOptions
from swifti2v.training.refiner.validation import HeldOut, RefinerValidation, ValidationOfRefiner
from swifti2v.training.refiner.windows import LATENTS, WindowSource
from swifti2v.training.videos import VideoSelection
from swifti2v.wan.checkpoint_index import INDEX_NAME, write_index
from swifti2v.wan.checkpoints import load_stage_two_vae, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from swifti2v.data.latent_cache import CacheProgress
    from swifti2v.training.engine.learner import Critic, Objective
    from swifti2v.training.engine.loop import StepReport
    from swifti2v.wan.checkpoints import Part
    from swifti2v.wan.transformer import StageTwoTransformer

STAGE_TWO: tuple[Part, ...] = ("stage_two",)


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
        validation: how what was learned is judged, every ``loop.validate_every`` steps, and is to be run.

    Raises:
        ConfigurationError: what is validated is not what is trained.
    """

    loop: LoopOptions
    checkpoint: str = "wan2.2"
    batch_size: int = 1
    network: NetworkOptions = field(default_factory=NetworkOptions)
    flow: SegmentFlowOptions = field(default_factory=SegmentFlowOptions)
    validation: ValidationOfRefiner = field(default_factory=ValidationOfRefiner)

    def __post_init__(self) -> None:
        self.validation.check_shift(self.flow.flow_shift)


def _class_of_objective(given: Any) -> str | None:
    classes = {"trajectory": "DistillationOptions", "distribution_matching": "DistributionMatchingOptions"}
    return classes.get(given.get("objective", "trajectory")) if isinstance(given, dict) else None


Distillation = Annotated[
    Annotated[DistillationOptions, Tag("DistillationOptions")]
    | Annotated[DistributionMatchingOptions, Tag("DistributionMatchingOptions")],
    Discriminator(
        _class_of_objective,
        custom_error_type="objective",
        custom_error_message="give it objective: 'trajectory' or 'distribution_matching'",
    ),
]
"""Which of the two a recipe means: what its `objective` says, and a trajectory where it has none."""


@dataclass(frozen=True)
class DistillationRun:
    """The recipe file of a few-step Stage II.

    Args:
        loop: how long and on how much.
        checkpoint: the teacher, with which the critic of distribution matching starts, too.
        batch_size: windows per process and part of a step.
        network: what of student and critic is trained.
        distillation: to how many steps, and by which objective: along the teacher's trajectory or by distribution
            matching.
        validation: how what was learned is judged; its `num_steps` are the student's.
        student: checkpoint from which the student starts, one of the same network; None: `checkpoint`.

    Raises:
        ConfigurationError: what is validated is not what is trained.
    """

    loop: LoopOptions
    checkpoint: str = "wan2.2"
    batch_size: int = 1
    network: NetworkOptions = field(default_factory=NetworkOptions)
    distillation: Distillation = field(default_factory=DistillationOptions)
    validation: ValidationOfRefiner = field(default_factory=ValidationOfRefiner)
    student: str | None = None

    def __post_init__(self) -> None:
        self.validation.check_shift(self.distillation.flow.flow_shift)

    @property
    def sampling(self) -> ValidationOfRefiner:
        """How the student is judged and run: in its own number of steps."""
        return replace(self.validation, num_steps=self.distillation.num_student_steps)


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
            data, size_multiple=parts.geometry.size_multiple, report=output, processes=processes, on_video=on_video
        )
        encoder = StageTwoEncoder(parts, run.encoding)
        cache = build_cache(
            requests,
            output,
            encode=encoder,
            description={"codec": parts.codec_digest, **to_mapping(run)},
            options=CacheOptions(rank=processes.rank, world_size=processes.count),
            on_progress=on_clip,
        )
        if processes.is_main:
            encoder.write_empty_prompt(output)
        return cache


def train_refiner(
    run: RefinerRun, *, cache: Path, output: Path, on_step: Callable[[StepReport], None] | None = None
) -> Path:
    """Train Stage II on a cache; return the folder of the checkpoint, which `swifti2v generate --model` takes."""
    samples = LatentCache.open(cache)
    kept = HeldOut(samples, run.validation.num_samples)
    empty_prompt = _empty_prompt(cache, run.checkpoint, is_used=run.flow.prompt_dropped_share > 0)
    with joined_processes(run.loop.context_parallel) as processes:
        batches = _batches(kept, run.batch_size, run.flow.seed, processes)
        transformer = load_network(run.checkpoint, run.network)
        _check_sharing(transformer, samples, processes)
        validation = RefinerValidation(
            transformer, samples=samples, indices=kept.indices, options=run.validation, processes=processes
        )
        objective = SegmentFlowObjective(
            transformer,
            samples=samples,
            batches=batches,
            options=run.flow,
            num_processes=processes.batch_count,
            empty_prompt=empty_prompt,
        )
        setup = _Setup(run.checkpoint, output, run.loop, validation)
        _train(objective, transformer, setup, processes=processes, on_step=on_step)
    return output / CHECKPOINT_FOLDER


def distill_refiner(
    run: DistillationRun, *, cache: Path, output: Path, on_step: Callable[[StepReport], None] | None = None
) -> Path:
    """Distill Stage II to few steps without guidance; return the folder of its checkpoint, which says how many."""
    samples = LatentCache.open(cache)
    kept = HeldOut(samples, run.validation.num_samples)
    options = run.distillation
    is_used = options.guidance_scale > 1 or options.flow.prompt_dropped_share > 0
    empty_prompt = _empty_prompt(cache, run.checkpoint, is_used=is_used)
    with joined_processes(run.loop.context_parallel) as processes:
        batches = _batches(kept, run.batch_size, options.flow.seed, processes)
        student = load_network(run.student or run.checkpoint, run.network)
        _check_sharing(student, samples, processes)
        validation = RefinerValidation(
            student, samples=samples, indices=kept.indices, options=run.sampling, processes=processes
        )
        teacher = load_teacher(run.checkpoint, run.network).to(processes.device)
        processes.share_tokens(teacher)
        source = WindowSource(
            student,
            samples=samples,
            batches=batches,
            options=options.source_options,
            num_processes=processes.batch_count,
            empty_prompt=empty_prompt,
        )
        objective: Objective
        critic: Critic | None = None
        if isinstance(options, DistributionMatchingOptions):
            second = load_network(run.checkpoint, run.network)
            matching = DistributionMatchingObjective(student, teacher, critic=second, source=source, options=options)
            objective, critic = matching, matching.critic
        else:
            objective = DistillationObjective(student, teacher, source=source, options=options)
        setup = _Setup(run.checkpoint, output, run.loop, validation)
        _train(objective, student, setup, processes=processes, on_step=on_step, critic=critic)
    return output / CHECKPOINT_FOLDER


def _batches(samples: HeldOut, batch_size: int, seed: int, processes: Processes) -> BatchesOfProcess:
    return BatchesOfProcess(
        BucketBatches(samples, batch_size, seed, processes.batch_rank, processes.batch_count), processes
    )


def _empty_prompt(cache: Path, checkpoint: str, *, is_used: bool) -> Tensor | None:
    """Return what a network that reads prompts is given for none; raise `LatentCacheError` if a used one is missing."""
    if not is_used or not resolve(checkpoint, parts=()).index.stage_two.uses_prompt:
        return None
    empty = read_empty_prompt(cache)
    if empty is None:
        msg = (
            f"{str(cache)!r} lacks the empty prompt; run train transition on it again (its clips are kept), or set "
            "prompt_dropped_share: 0, without guidance"
        )
        raise LatentCacheError(msg)
    return empty


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
    """Where a run begins and ends, and how what it makes is judged and run."""

    base: str
    output: Path
    loop: LoopOptions
    validation: RefinerValidation


def _train(
    objective: Objective,
    transformer: StageTwoTransformer,
    setup: _Setup,
    *,
    processes: Processes,
    on_step: Callable[[StepReport], None] | None,
    critic: Critic | None = None,
) -> None:
    """Run the loop; the checkpoint in ``output/checkpoint`` can be used from the first save on."""
    is_first = processes.is_main
    folder = setup.output / CHECKPOINT_FOLDER
    if is_first:
        with writing(folder):
            begin_checkpoint(setup.base, folder, setup.validation.options)
    loop = TrainingLoop(objective, setup.output, setup.loop, processes=processes, critic=critic)

    def save(_step: int) -> None:
        save_network(transformer, folder / "stage_two" / "transformer", keep=is_first)

    loop.run(on_step=on_step if is_first else None, on_validation=setup.validation, on_checkpoint=save)


def begin_checkpoint(base: str | Path, output: Path, sampling: ValidationOfRefiner) -> None:
    """Write a checkpoint but for its network: the codec of `base`, and an index that names where Stage I lies.

    Args:
        base: checkpoint that the training starts from.
        output: folder of the new one.
        sampling: how its network is judged, which is how it is to be run: what is good for the network of `base`, which
            may start from the reference instead of from noise, need not be good for this one.
    """
    resolved = resolve(base, parts=STAGE_TWO)
    index = derived_index(resolved)
    vae: Any = load_stage_two_vae(resolved)
    vae.save_pretrained(output / "stage_two" / "vae")
    made = replace(
        index,
        stage_two=replace(
            index.stage_two,
            source="./stage_two",
            revision=None,
            transformer_subfolder="transformer",
            vae_subfolder="vae",
            refiner="concat",
            num_inference_steps=sampling.num_steps,
            sigma_start=1.0,
            flow_shift=sampling.flow_shift,
            guidance_scale=1.0,
            segment_size=sampling.segment_size,
            neighbors_before=sampling.neighbors_before,
            neighbors_after=0,
            positions="absolute",
        ),
    )
    write_index(made, output / INDEX_NAME)
