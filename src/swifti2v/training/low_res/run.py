"""Stage I's Low-Res LoRA from a recipe: each expert in its turn, over a cache of latents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel

from swifti2v.data.batches import BucketBatches
from swifti2v.data.description import Description, weights_digest
from swifti2v.data.latent_cache import CacheOptions, LatentCache, build_cache
from swifti2v.errors import ConfigurationError
from swifti2v.training.derived_index import CHECKPOINT_FOLDER
from swifti2v.training.engine.distributed import Processes, joined_processes
from swifti2v.training.engine.loop import LoopOptions, StepReport, TrainingLoop
from swifti2v.training.engine.samples import BatchesOfProcess
from swifti2v.training.low_res.checkpoint import adapter_folder, write_low_res_index
from swifti2v.training.low_res.encoding import LowResEncoder
from swifti2v.training.low_res.lora import Expert, ExpertNoise, LoraOptions, LowResLoraObjective, add_lora
from swifti2v.training.low_res.lora_files import COMFYUI_NAME, export_comfyui, lora_state, save_lora
from swifti2v.training.videos import VideoSelection
from swifti2v.wan.checkpoints import Part, resolve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.data.latent_cache import CacheProgress
    from swifti2v.wan.checkpoints import ResolvedCheckpoint

STAGE_ONE: tuple[Part, ...] = ("stage_one",)
COMPONENTS: dict[Expert, str] = {"high": "transformer", "low": "transformer_2"}
"""Where diffusers' pipeline keeps the experts."""


@dataclass(frozen=True)
class LowResCacheRun:
    """The recipe file of the latent cache for the Low-Res LoRA: a checkpoint's codec, and clips at Stage I's size."""

    checkpoint: str = "wan2.2"
    videos: VideoSelection = field(default_factory=lambda: VideoSelection(640, 352))


@dataclass(frozen=True)
class LowResLoraRun:
    """The recipe file.

    Args:
        loop: of each expert; its `gradient_accumulation` follows from `samples_per_step` and the number of processes.
        checkpoint: name or folder; its many-step weights are trained on, its adapters are left out.
        experts: which are trained, one after the other.
        samples_per_step: clips of an optimizer step, on however many devices.
        batch_size: clips on each device at once.
        lora: see `LoraOptions`.
        noise: see `ExpertNoise`.
        gradient_checkpointing: trade a third more arithmetic for most of the activations.
        seed: of the order of samples, the noise and the LoRA's first weights.
    """

    loop: LoopOptions
    checkpoint: str = "wan2.2"
    experts: tuple[Expert, ...] = ("high", "low")
    samples_per_step: int = 8
    batch_size: int = 1
    lora: LoraOptions = field(default_factory=LoraOptions)
    noise: ExpertNoise = field(default_factory=ExpertNoise)
    gradient_checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.experts or self.batch_size < 1:
            msg = f"experts {self.experts} must name high, low or both, and batch_size {self.batch_size} be at least 1"
            raise ConfigurationError(msg)
        if self.loop.gradient_accumulation != 1:
            msg = "gradient_accumulation follows from samples_per_step in this recipe; leave it out of loop"
            raise ConfigurationError(msg)

    def loop_on(self, num_processes: int) -> LoopOptions:
        """Return the options of the loop with which `num_processes` make a step of `samples_per_step` together.

        Raises:
            ConfigurationError: the samples do not divide by processes and batch size.
        """
        batches, left = divmod(self.samples_per_step, self.batch_size * num_processes)
        if left or not batches:
            msg = (
                f"samples_per_step {self.samples_per_step} does not divide by {num_processes} processes of batch_size "
                f"{self.batch_size}; choose a multiple"
            )
            raise ConfigurationError(msg)
        return replace(self.loop, gradient_accumulation=batches)


def open_low_res_encoder(
    checkpoint: str | Path, *, device: torch.device | None = None
) -> tuple[LowResEncoder, Description]:
    """Load codec and text encoder of a checkpoint's Stage I.

    Returns:
        What encodes clips, and the description of the caches that it makes (`data.description`).

    Raises:
        CheckpointError: the checkpoint cannot be found or downloaded.
    """
    resolved = resolve(checkpoint, parts=STAGE_ONE)
    length = resolved.index.stage_one.max_sequence_length
    place = device or torch.device("cpu")
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    pipeline = WanImageToVideoPipeline.from_pretrained(
        str(resolved.folder_of("stage_one")),
        transformer=None,
        transformer_2=None,
        dtype={"default": dtype, "vae": torch.float32},
        local_files_only=True,
    ).to(place)
    config = {key: value for key, value in pipeline.vae.config.items() if not key.startswith("_")}
    codec = weights_digest(config, pipeline.vae.state_dict())
    description = {"codec": codec, "for": "low-res lora", "max_sequence_length": length}
    return LowResEncoder(pipeline, max_sequence_length=length), description


def build_low_res_cache(
    run: LowResCacheRun,
    *,
    data: Path,
    output: Path,
    on_video: Callable[[int, int], None] | None = None,
    on_clip: Callable[[CacheProgress], None] | None = None,
) -> LatentCache:
    """Encode the usable videos of a folder for `train_low_res_lora`; raise as `refiner.run.build_references`."""
    with joined_processes() as processes:
        encoder, description = open_low_res_encoder(run.checkpoint, device=processes.device)
        requests = run.videos.requests(
            data, size_multiple=encoder.size_multiple, report=output, processes=processes, on_video=on_video
        )
        return build_cache(
            requests,
            output,
            encode=encoder,
            description=description,
            options=CacheOptions(rank=processes.rank, world_size=processes.count),
            on_progress=on_clip,
        )


def train_low_res_lora(
    run: LowResLoraRun,
    *,
    cache: LatentCache,
    output: Path,
    processes: Processes | None = None,
    on_step: Callable[[Expert, StepReport], None] | None = None,
) -> Path:
    """Train the experts' LoRAs, each in a folder of its own (``output/high``); an interrupted run goes on.

    Args:
        run: the recipe.
        cache: of `LowResEncoder`.
        output: of the run.
        processes: of `joined_processes`; None: this one alone, on the CPU.
        on_step: called after every step, in the first process.

    Returns:
        The folder of the checkpoint, which `swifti2v generate --model` and the recipe of `train transition` take: the
        base with the averaged LoRAs, whose files are there in diffusers' format and with ComfyUI's keys. It can be used
        from the first save on.

    Raises:
        CheckpointError: the checkpoint cannot be found or downloaded.
        ConfigurationError: a LoRA target is no module of the network, or `samples_per_step` does not divide.
        TrainingError, OutputError, KeyboardInterrupt: see `TrainingLoop.run`.
    """
    processes = processes or Processes()
    options = run.loop_on(processes.batch_count)
    base, checkpoint = resolve(run.checkpoint, parts=STAGE_ONE), output / CHECKPOINT_FOLDER
    for expert in run.experts:
        transformer = _expert_with_lora(run, expert, base, processes.device)
        batches = BucketBatches(cache, run.batch_size, run.seed, processes.batch_rank, processes.batch_count)
        objective = LowResLoraObjective(
            transformer,
            expert=expert,
            samples=cache,
            batches=BatchesOfProcess(batches, processes),
            noise=run.noise,
            seed=run.seed,
        )
        loop = TrainingLoop(objective, output / expert, options, processes=processes)
        loop.run(
            on_step=partial(on_step, expert) if on_step is not None and processes.is_main else None,
            on_checkpoint=partial(
                _save, transformer, expert=expert, base=base, checkpoint=checkpoint, processes=processes
            ),
        )
    return checkpoint


def _expert_with_lora(
    run: LowResLoraRun, expert: Expert, base: ResolvedCheckpoint, device: torch.device
) -> WanTransformer3DModel:
    """Load an expert with an untrained LoRA, the same in every process; frozen weights are bfloat16 on a GPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    transformer = WanTransformer3DModel.from_pretrained(
        str(base.folder_of("stage_one")), subfolder=COMPONENTS[expert], torch_dtype=dtype, local_files_only=True
    )
    torch.manual_seed(run.seed)
    add_lora(transformer, run.lora)
    if run.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    return transformer


def _save(
    transformer: WanTransformer3DModel,
    _step: int,
    *,
    expert: Expert,
    base: ResolvedCheckpoint,
    checkpoint: Path,
    processes: Processes,
) -> None:
    state = lora_state(transformer, keep=processes.is_main)
    if processes.is_main:
        folder = adapter_folder(checkpoint, expert)
        path = save_lora(state, transformer, folder)
        export_comfyui(path, transformer, folder / COMFYUI_NAME)
        write_low_res_index(base, checkpoint)
