"""From the name of a checkpoint to the loaded parts of a pipeline."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from swifti2v.errors import InvalidInputError
from swifti2v.memory.networks import read_networks
from swifti2v.memory.ways import stored_bytes
from swifti2v.runner.acceleration import Acceleration, accelerated
from swifti2v.runner.decoders import decoder_elsewhere, open_light_decoder
from swifti2v.runner.parts import Parts
from swifti2v.schedulers import FixedSigmaScheduler
from swifti2v.settings import Quantization, Storage, checked_choices
from swifti2v.stage_one import FEW_STEP_ADAPTER, StageOne
from swifti2v.stage_two import StageTwo
from swifti2v.wan.checkpoint_files import read_json
from swifti2v.wan.checkpoints import (
    PARTS,
    described_stage_one,
    described_stage_two,
    load_other_stage_one,
    load_stage_one_pipeline,
    load_stage_two_transformer,
    load_stage_two_vae,
    resolve,
)
from swifti2v.wan.network_reader import NetworkReader
from swifti2v.wan.quantized_linear import storages_of, store_weights, stored_already
from swifti2v.wan.streaming import open_codec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from diffusers import WanImageToVideoPipeline

    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.settings import GenerationSettings, Refiner
    from swifti2v.stage_one import MotionStage
    from swifti2v.wan.checkpoint_index import CheckpointIndex, StageOneEntry
    from swifti2v.wan.checkpoints import Part, ResolvedCheckpoint
    from swifti2v.wan.streaming import StreamingCodec, VideoDecoder
    from swifti2v.wan.transformer import StageTwoTransformer


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
    a Stage II without it is given the prompt as it was read (`WorkDirectory.prompt`).

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

    def reader(self, stored: Storage) -> NetworkReader:
        """Return what reads networks tensor by tensor into `stored`."""
        return NetworkReader(partial(store_weights, dtype=stored, compute_dtype=self.dtype), self.place)


def _assembled(
    checkpoint: ResolvedCheckpoint, way: _Way, acceleration: Acceleration, *, stages: tuple[Part, ...]
) -> Parts:
    one, two = checkpoint.index.stage_one, checkpoint.index.stage_two
    light = _light_decoder(checkpoint, acceleration, way) if stages != ("stage_one",) else None
    stored = _stored_dtype(checkpoint, way, stages, quantization=acceleration.quantization)
    refiner, codec = _stage_two_networks(checkpoint, way, stored, is_held="stage_two" in stages)
    parts = Parts(
        name=_identity(checkpoint.index),
        stage_one=_stage_one(checkpoint, way, stored, is_held="stage_one" in stages),
        stage_two=StageTwo(refiner, codec, uses_prompt=two.uses_prompt),
        defaults=checkpoint.index.default_settings(few_step=way.few_step),
        other_defaults=checkpoint.index.default_settings(few_step=not way.few_step),
        motion_reduction=one.reference_reduction,
        motion_max_area=one.max_area,
        quantization=acceleration.quantization,
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
    transformer = load_stage_two_transformer(
        checkpoint, dtype=way.dtype, refiner=trained_refiner(checkpoint), reader=way.reader(stored)
    )
    codec = open_codec(load_stage_two_vae(checkpoint, dtype=way.dtype).to(way.home).eval())
    return transformer.to(way.home).eval(), codec


def _stage_one(checkpoint: ResolvedCheckpoint, way: _Way, stored: Storage, *, is_held: bool) -> MotionStage:
    entry = checkpoint.index.stage_one
    if entry.kind != "wan":
        stage: MotionStage = load_other_stage_one(checkpoint)
        return stage
    pipeline = _stage_one_pipeline(checkpoint, way, stored, is_held=is_held)
    return StageOne(pipeline, window_frames=entry.window_frames, max_sequence_length=entry.max_sequence_length)


def _stage_one_pipeline(
    checkpoint: ResolvedCheckpoint, way: _Way, stored: Storage, *, is_held: bool
) -> WanImageToVideoPipeline:
    entry = checkpoint.index.stage_one
    if not is_held:
        return described_stage_one(checkpoint, dtype=way.dtype)
    roles = _roles(entry) - (set() if way.few_step else {FEW_STEP_ADAPTER})
    pipeline = load_stage_one_pipeline(
        checkpoint,
        dtype=way.dtype,
        roles=roles,
        reader=way.reader(stored),
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
        kind=one.kind,
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
    """Return how the network can run; an index whose default runs no transformer says nothing about it."""
    entry = checkpoint.index.stage_two
    if entry.refiner not in {"light", "none"}:
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
