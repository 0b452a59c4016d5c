"""From the name of a checkpoint to the loaded parts of a pipeline."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size, motion_size
from swifti2v.memory.networks import read_networks
from swifti2v.memory.placement import storages_of, store_weights
from swifti2v.memory.ways import stored_bytes
from swifti2v.pipelines.acceleration import Acceleration, accelerated
from swifti2v.pipelines.decoders import decoder_elsewhere, open_light_decoder
from swifti2v.pipelines.stage_one import FEW_STEP_ADAPTER, StageOne
from swifti2v.pipelines.stage_two import StageTwo
from swifti2v.schedulers import FixedSigmaScheduler
from swifti2v.settings import checked_choices
from swifti2v.wan.checkpoint_files import read_json
from swifti2v.wan.checkpoints import (
    PARTS,
    load_stage_one_pipeline,
    load_stage_two_transformer,
    load_stage_two_vae,
    resolve,
)
from swifti2v.wan.described import described_stage_one, described_stage_two
from swifti2v.wan.piecewise_reader import PiecewiseReader, read_stage_one_networks
from swifti2v.wan.quantized_products import Quantization, stored_already
from swifti2v.wan.vae import open_codec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import WanImageToVideoPipeline

    from swifti2v.memory.networks import Storage
    from swifti2v.pipelines.fitting import MemoryLimits
    from swifti2v.settings import GenerationSettings, Refiner
    from swifti2v.wan.checkpoint_index import CheckpointIndex, StageOneEntry
    from swifti2v.wan.checkpoints import Part, ResolvedCheckpoint
    from swifti2v.wan.transformer import StageTwoTransformer
    from swifti2v.wan.vae import StreamingCodec, VideoDecoder


Overlap = Literal["decode", "write", "none"]


@dataclass(frozen=True)
class Parts:
    """What a checkpoint gives a pipeline.

    Args:
        name: of the checkpoint, with a digest of its checksums where its index has them.
        stage_one, stage_two: loaded, but for those not in `stages`, whose networks have no weights.
        defaults: settings that the checkpoint recommends.
        other_defaults: the same for the other value of `few_step`; None: there is none.
        motion_reduction: output size over motion size.
        motion_max_area: pixels of a motion frame at most, None for no limit.
        known_motions: verbs of which a prompt should hold one, in any form; empty: any prompt will do.
        few_step_ways: values of `few_step` that the loaded weights can sample with: one, where the few-step adapters
            are in the weights or were left out of them, and both, where the checkpoint has none.
        device: where hybrid reference and Stage II work.
        memory: what a run may take; None: everything is on `device`.
        overlap: what runs beside the denoising of the next segment: `decode` the decoding of the one before and the
            reader of its frames, `write` the reader only, which takes no more memory of the device, or `none`.
        decoder: what decodes finished segments; None: Stage II's codec.
        stages: that can be run.
    """

    name: str
    stage_one: StageOne
    stage_two: StageTwo
    defaults: GenerationSettings
    other_defaults: GenerationSettings | None = None
    motion_reduction: float = 4.0
    motion_max_area: int | None = None
    known_motions: tuple[str, ...] = ()
    few_step_ways: tuple[bool, ...] = (True, False)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: MemoryLimits | None = None
    overlap: Overlap = "decode"
    decoder: VideoDecoder | None = None
    stages: tuple[Part, ...] = PARTS

    def defaults_of(self, few_step: bool | None) -> GenerationSettings:
        """Return the settings that the checkpoint recommends for a way of Stage I; None: for that of `defaults`."""
        if self.other_defaults is None or few_step in {None, self.defaults.few_step}:
            return self.defaults
        return self.other_defaults

    def motion_size(self, size: Size) -> Size:
        """Return the size of the motion reference of an output of `size`."""
        multiple = self.stage_one.geometry.size_multiple
        return motion_size(size, reduction=self.motion_reduction, max_area=self.motion_max_area, multiple=multiple)

    def motion_notes(self, prompt: str) -> tuple[str, ...]:
        """Say that the model knows none of the words of a prompt, and which it knows."""
        words = re.findall(r"[a-z]+", prompt.lower())
        stems = tuple(verb.removesuffix("e") for verb in self.known_motions)
        if not words or not stems or any(word.startswith(stems) for word in words):
            return ()
        return (f"the model knows no motion in this prompt; it knows {', '.join(self.known_motions)}",)

    def check_few_step(self, few_step: bool) -> None:
        """Raise `InvalidInputError` if Stage I cannot sample in this way with the weights as they were loaded."""
        if few_step in self.few_step_ways:
            return
        state = "are part of" if self.few_step_ways[0] else "were left out of"
        way = "few steps" if few_step else "many steps"
        msg = f"the few-step adapters {state} the loaded weights; load with few_step={few_step} for {way}"
        raise InvalidInputError(msg)


def load_parts(  # noqa: PLR0913 - the options of `from_pretrained`, and the stages
    name_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    few_step: bool = True,
    memory: MemoryLimits | None = None,
    acceleration: Acceleration | None = None,
    stages: tuple[Part, ...] = PARTS,
) -> Parts:
    """Load `stages`, and of others their configuration; the other arguments as in `TwoStagePipeline.from_pretrained`.

    Of a repository on the hub, the weights of what is not loaded are not even downloaded. Stage I has the text encoder;
    a Stage II without it is given the prompt as it was read (`RunStore.prompt`).

    Raises:
        CheckpointError: the checkpoint cannot be found, downloaded or read.
        InvalidInputError: there is no such device, it cannot be accelerated so, or the host has no room for that.
    """
    way = _Way.on(device, dtype, memory, few_step=few_step, local_files_only=local_files_only)
    described = [part for part in PARTS if part not in stages]
    checkpoint = resolve(name_or_path, revision=revision, local_files_only=local_files_only, described=described)
    return _assembled(checkpoint, way, acceleration or Acceleration(attention="native"), stages=stages)


@dataclass(frozen=True)
class _Way:
    """How networks are loaded: `home` is where they wait, `place` where they work."""

    place: torch.device
    home: torch.device
    dtype: torch.dtype
    memory: MemoryLimits | None
    few_step: bool
    local_files_only: bool

    @classmethod
    def on(
        cls,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        memory: MemoryLimits | None,
        *,
        few_step: bool = True,
        local_files_only: bool = False,
    ) -> _Way:
        place = open_device(device)
        if place.index is not None and place.type == "cuda":
            torch.cuda.set_device(place)  # diffusers streams blocks on a stream of the card that is the thread's own
        # With limits, networks come to the device when a run needs them (`fitting.py`).
        home = place if memory is None else torch.device("cpu")
        dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
        limits = memory.on(place) if memory is not None else None
        return cls(place, home, dtype, limits, few_step, local_files_only)

    @property
    def loaded_dtype(self) -> Storage:
        """How weights are stored where nothing is short."""
        return storages_of(self.dtype)[0]

    def reader(self, stored: Storage) -> PiecewiseReader | None:
        """Return what reads networks tensor by tensor into `stored`; None where they stay as they are loaded."""
        if stored == self.loaded_dtype:
            return None
        return PiecewiseReader(partial(store_weights, dtype=stored, compute_dtype=self.dtype), self.place)


def _assembled(
    checkpoint: ResolvedCheckpoint, way: _Way, acceleration: Acceleration, *, stages: tuple[Part, ...]
) -> Parts:
    one, two = checkpoint.index.stage_one, checkpoint.index.stage_two
    light = _light_decoder(checkpoint, acceleration, way) if stages != ("stage_one",) else None
    stored = _stored_dtype(checkpoint, way, stages, quantization=acceleration.quantization)
    refiner, codec = _stage_two_networks(checkpoint, way, stored, is_held="stage_two" in stages)
    pipeline = _stage_one_pipeline(checkpoint, way, stored, is_held="stage_one" in stages)
    parts = Parts(
        name=_identity(checkpoint.index),
        stage_one=StageOne(pipeline, window_frames=one.window_frames, max_sequence_length=one.max_sequence_length),
        stage_two=StageTwo(refiner, codec, uses_prompt=two.uses_prompt),
        defaults=checkpoint.index.default_settings(few_step=way.few_step),
        other_defaults=checkpoint.index.default_settings(few_step=not way.few_step),
        motion_reduction=one.reference_reduction,
        motion_max_area=one.max_area,
        known_motions=one.known_motions,
        few_step_ways=(way.few_step,) if FEW_STEP_ADAPTER in _roles(one) else (True, False),
        device=way.place,
        memory=way.memory,
        decoder=light or (_exact_elsewhere(codec, acceleration) if "stage_two" in stages else None),
        stages=stages,
    )
    return accelerated(parts, acceleration)


def _stage_two_networks(
    checkpoint: ResolvedCheckpoint, way: _Way, stored: Storage, *, is_held: bool
) -> tuple[StageTwoTransformer, StreamingCodec]:
    if not is_held:
        described, vae = described_stage_two(checkpoint, dtype=way.dtype)
        return described, open_codec(vae)
    reader = way.reader(stored)
    transformer = load_stage_two_transformer(
        checkpoint, dtype=way.dtype, refiner=trained_refiner(checkpoint), read=reader.read if reader else None
    )
    codec = open_codec(load_stage_two_vae(checkpoint, dtype=way.dtype).to(way.home).eval())
    return transformer.to(way.home).eval(), codec


def _stage_one_pipeline(
    checkpoint: ResolvedCheckpoint, way: _Way, stored: Storage, *, is_held: bool
) -> WanImageToVideoPipeline:
    entry = checkpoint.index.stage_one
    if not is_held:
        return described_stage_one(checkpoint, dtype=way.dtype)
    roles = _roles(entry) - (set() if way.few_step else {FEW_STEP_ADAPTER})
    reader = way.reader(stored)
    pipeline = load_stage_one_pipeline(
        checkpoint,
        dtype=way.dtype,
        roles=roles,
        networks=read_stage_one_networks(checkpoint, reader, dtype=way.dtype, roles=roles) if reader else None,
        settle=lambda _name, network: network.to(way.home),
    )
    pipeline.scheduler = _few_step_scheduler(pipeline.scheduler, entry)
    return pipeline


def _roles(entry: StageOneEntry) -> set[str]:
    return {adapter.role for adapter in entry.adapters}


def _light_decoder(checkpoint: ResolvedCheckpoint, acceleration: Acceleration, way: _Way) -> VideoDecoder | None:
    """Return the light decoder if it is asked for; before the networks are loaded, which takes minutes."""
    if acceleration.decoder == "exact":
        return None
    return open_light_decoder(
        read_json(checkpoint.folder_of("stage_two") / checkpoint.index.stage_two.vae_subfolder / "config.json"),
        acceleration.decoder_weights,
        device=open_device(acceleration.decode_device or way.place),
        dtype=way.dtype,
        local_files_only=way.local_files_only,
    )


def _exact_elsewhere(codec: StreamingCodec, acceleration: Acceleration) -> VideoDecoder | None:
    if acceleration.decode_device is None:
        return None
    return decoder_elsewhere(codec, open_device(acceleration.decode_device))


def _stored_dtype(
    checkpoint: ResolvedCheckpoint, way: _Way, stages: tuple[Part, ...], *, quantization: Quantization
) -> Storage:
    """Return the widest storage with which the host has room for the weights, or the narrowest there is.

    Raises:
        InvalidInputError: quantized transformers leave no room for the text encoder as it is.
    """
    loaded, memory = way.loaded_dtype, way.memory
    if memory is None or memory.host_bytes is None:
        return loaded
    one, two = checkpoint.index.stage_one, checkpoint.index.stage_two
    networks = read_networks(
        checkpoint.folder_of("stage_one"),
        checkpoint.folder_of("stage_two") / two.transformer_subfolder,
        checkpoint.folder_of("stage_two") / two.vae_subfolder,
        text_tokens=one.max_sequence_length,
        quantization=quantization,
        compute_dtype="float32" if way.dtype == torch.float32 else "bfloat16",
        stages=stages,
    )
    storages = storages_of(way.dtype)
    fitting = (storage for storage in storages if stored_bytes(networks, storage) <= memory.host_bytes)
    stored = next(fitting, storages[-1])
    if quantization != "none" and stored != loaded:
        raise stored_already(stored)
    return stored


def open_device(device: str | torch.device | None) -> torch.device:
    """Return a device that can be used; None: the CUDA device if there is one, else the CPU."""
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(wanted)
    except RuntimeError as error:  # its message lists twenty kinds of device, most of them without kernels
        msg = f"device {str(wanted)!r} is not known; use cpu, or cuda where there is a CUDA card"
        raise InvalidInputError(msg) from error
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        msg = f"device {str(wanted)!r} cannot be used ({reason}); use cpu, or cuda where there is a CUDA card"
        raise InvalidInputError(msg) from error
    if place.type == "meta":
        msg = "device 'meta' holds no numbers; use cpu, or cuda where there is a CUDA card"
        raise InvalidInputError(msg)
    return place


def settings_of(
    name_or_path: str | Path,
    choices: Mapping[str, Any] | None = None,
    *,
    few_step: bool = True,
    revision: str | None = None,
    local_files_only: bool = False,
) -> GenerationSettings:
    """Return the settings that a run would have, from the checkpoint's index: nothing is loaded.

    Raises:
        CheckpointError: there is no such checkpoint.
        InvalidInputError: a choice is unknown or out of its range.
    """
    index = resolve(name_or_path, revision=revision, local_files_only=local_files_only, parts=()).index
    chosen = checked_choices(choices or {})
    return index.default_settings(few_step=chosen.get("few_step", few_step)).settled(chosen)


def trained_refiner(checkpoint: ResolvedCheckpoint) -> Refiner:
    """Return how the network can run; an index whose default is to run none says nothing about it."""
    entry = checkpoint.index.stage_two
    if entry.refiner != "none":
        return entry.refiner
    config = read_json(checkpoint.folder_of("stage_two") / entry.transformer_subfolder / "config.json")
    return "concat" if config.get("reference_channels") else "training-free"


def _few_step_scheduler(current: object, entry: StageOneEntry) -> FixedSigmaScheduler:
    """Return the scheduler of the checkpoint's few-step way; `StageOne` makes that of the many-step way itself."""
    config = dict(current.config) if isinstance(current, FixedSigmaScheduler) else {}
    return FixedSigmaScheduler.from_config(config | {"fixed_sigmas": list(entry.few_step_sigmas)})


def _identity(index: CheckpointIndex) -> str:
    """Return the name of a checkpoint, and what tells it from another state of the same name."""
    if not index.sha256:
        return index.name
    return f"{index.name} {hashlib.sha256(json.dumps(index.sha256, sort_keys=True).encode()).hexdigest()[:16]}"
