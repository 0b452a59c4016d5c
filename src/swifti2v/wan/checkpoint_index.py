"""`swifti2v.json`: what a checkpoint consists of and how it wants to be run. The schema is the dataclasses below.

A checkpoint is one folder or hub repository (`swifti2v.wan.checkpoints`). Its index names the sources of both
stages: parts of the checkpoint itself (``./stage_one``), other hub repositories, or folders of this machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from swifti2v.config import from_mapping, to_mapping
from swifti2v.errors import CheckpointError, ConfigurationError
from swifti2v.geometry import Size
from swifti2v.segments import PositionMode  # noqa: TC001 - annotations that pydantic reads while it runs
from swifti2v.settings import GenerationSettings, ReferenceMode, Refiner, SolverName

INDEX_NAME = "swifti2v.json"
FORMAT = 1

WAN_NEGATIVE_PROMPT = (
    "色调艳丽 过曝 静态 细节模糊不清 字幕 风格 作品 画作 画面 静止 整体发灰 最差质量 低质量 JPEG压缩残留 "
    "丑陋的 残缺的 多余的手指 画得不好的手部 画得不好的脸部 畸形的 毁容的 形态畸形的肢体 手指融合 "
    "静止不动的画面 杂乱的背景 三条腿 背景人很多 倒着走"
).replace(" ", "\uff0c")
"""What Wan2.2's own code leads guidance away from where its caller gives nothing: overexposed, static, blurred,
subtitles, worst quality, walking backwards, ... Source: ``sample_neg_prompt`` of ``wan/configs/shared_config.py``,
Wan-Video/Wan2.2 at 42bf4cf.
"""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WITHIN = "./"


@dataclass(frozen=True)
class AdapterEntry:
    """One LoRA file of Stage I.

    Args:
        source: where the file lies: ``./adapters``, a hub repository, a folder.
        weight_name: the file there.
        expert: which of the two experts it is for.
        scale: its strength; alpha / rank of the file comes on top.
        role: "few_step" (left out when many steps are asked for), "low_res", or any other name.
        revision: branch, tag or commit of a hub repository.
    """

    source: str
    weight_name: str
    expert: Literal["high", "low", "both"] = "both"
    scale: float = 1.0
    role: str = "few_step"
    revision: str | None = None

    def __post_init__(self) -> None:
        _check_source(self.source, self.revision)
        _check_relative(self.weight_name, "weight_name")


@dataclass(frozen=True)
class StageOneEntry:
    """Stage I: a `WanImageToVideoPipeline` in diffusers' layout, its adapters and its schedules; or that of `mini`.

    Args:
        kind: "wan" is that pipeline; "path" is `swifti2v.mini.stage_one`, for which most of what follows says nothing.
        source, revision: where the pipeline lies; see `AdapterEntry`.
        window_frames: pixel frames that it was trained for; longer clips are made in windows of this length.
        max_sequence_length: tokens of a prompt.
        reference_reduction: the motion reference is the output size divided by this (the paper's 4).
        max_area: pixels of a frame of the motion reference at most, whatever the output size; None: no limit.
        adapters: LoRA files, applied in this order.
        few_step_sigmas: schedule with the adapters of role "few_step", descending, without the final 0.
        flow_shift, num_inference_steps, guidance_scale: of the many-step mode, without those adapters.
        negative_prompt: what guidance leads away from unless a run says otherwise, in Stage II too. Default: Wan's.
    """

    source: str
    revision: str | None = None
    kind: Literal["wan", "path"] = "wan"
    window_frames: int = 81
    max_sequence_length: int = 512
    reference_reduction: float = 4.0
    max_area: int | None = None
    adapters: tuple[AdapterEntry, ...] = ()
    few_step_sigmas: tuple[float, ...] = (1.0, 0.9375, 5 / 6, 0.625)
    flow_shift: float = GenerationSettings.stage_one_flow_shift
    num_inference_steps: int = 40
    guidance_scale: float = 3.5
    negative_prompt: str = WAN_NEGATIVE_PROMPT

    def __post_init__(self) -> None:
        _check_source(self.source, self.revision)
        _check_positive(
            self, "window_frames", "max_sequence_length", "reference_reduction", "flow_shift", "num_inference_steps"
        )
        if self.max_area is not None:
            _check_positive(self, "max_area")
        if (self.window_frames - 1) % 4:
            msg = f"window_frames is {self.window_frames}; it must be 4k+1, as 81"
            raise CheckpointError(msg)
        sigmas = (*self.few_step_sigmas, 0.0)
        if len(sigmas) < 2 or sigmas[0] > 1 or any(low >= high for high, low in pairwise(sigmas)):
            msg = f"few_step_sigmas is {list(self.few_step_sigmas)}; it must descend from at most 1 and stay above 0"
            raise CheckpointError(msg)


@dataclass(frozen=True)
class StageTwoEntry:
    """Stage II: its transformer and codec, and how segments are run.

    Args:
        source, revision: where both lie; see `AdapterEntry`.
        transformer_subfolder, vae_subfolder: folders of `source`.
        refiner: the default way to run it (`docs/design.md` 4).
        num_inference_steps: per segment.
        sigma_start: noise level that targets start from, 0 < sigma <= 1.
        flow_shift: of its schedule.
        solver: "euler", or "renoise" for networks that were distilled with fresh noise at each step.
        guidance_scale: 1: no second forward.
        segment_size, neighbors_before, neighbors_after: M and N, in latent frames.
        positions: RoPE positions of a window.
        uses_prompt: whether the network was trained with prompts; if not, it is given an empty text.
    """

    source: str
    revision: str | None = None
    transformer_subfolder: str = "transformer"
    vae_subfolder: str = "vae"
    refiner: Refiner = GenerationSettings.refiner
    num_inference_steps: int = GenerationSettings.num_inference_steps
    sigma_start: float = GenerationSettings.sigma_start
    flow_shift: float = GenerationSettings.flow_shift
    solver: SolverName = GenerationSettings.solver
    guidance_scale: float = GenerationSettings.guidance_scale
    segment_size: int = GenerationSettings.segment_size
    neighbors_before: int = GenerationSettings.neighbors_before
    neighbors_after: int = GenerationSettings.neighbors_after
    positions: PositionMode = GenerationSettings.positions
    uses_prompt: bool = True

    def __post_init__(self) -> None:
        _check_source(self.source, self.revision)
        _check_relative(self.transformer_subfolder, "transformer_subfolder")
        _check_relative(self.vae_subfolder, "vae_subfolder")
        _check_positive(self, "num_inference_steps", "sigma_start", "flow_shift", "segment_size")
        if self.sigma_start > 1 or min(self.neighbors_before, self.neighbors_after) < 0:
            msg = "sigma_start must be at most 1, neighbors_before and neighbors_after at least 0"
            raise CheckpointError(msg)


@dataclass(frozen=True)
class DefaultsEntry:
    """What a run makes unless told otherwise.

    Args:
        width, height: pixels of the output.
        num_frames: pixel frames, 4k+1.
        fps: frames per second of the file.
        reference: construction of the hybrid reference.
    """

    width: int = GenerationSettings.size.width
    height: int = GenerationSettings.size.height
    num_frames: int = GenerationSettings.num_frames
    fps: float = GenerationSettings.fps
    reference: ReferenceMode = GenerationSettings.reference

    def __post_init__(self) -> None:
        _check_positive(self, "width", "height", "num_frames", "fps")


@dataclass(frozen=True)
class CheckpointIndex:
    """The whole of `swifti2v.json`.

    Args:
        format: of the file; this version reads 1.
        name: of the checkpoint, for people.
        stage_one, stage_two: the two stages.
        defaults: of a run.
        licence: of the weights, an SPDX expression or a sentence.
        attribution: who made them.
        sha256: hexadecimal digest by file, relative to the index; see `checkpoints.write_checksums`.
    """

    format: int
    name: str
    stage_one: StageOneEntry
    stage_two: StageTwoEntry
    defaults: DefaultsEntry = field(default_factory=DefaultsEntry)
    licence: str = ""
    attribution: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            msg = f"format is {self.format}; this version reads {FORMAT}: update swifti2v"
            raise CheckpointError(msg)
        for file, digest in self.sha256.items():
            _check_relative(file, "sha256")
            if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
                msg = f"sha256 of {file} is not 64 hexadecimal digits; write the checksums again"
                raise CheckpointError(msg)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, where: str = INDEX_NAME) -> CheckpointIndex:
        """Build the index from parsed JSON, strictly.

        Raises:
            CheckpointError: an unknown or missing key, a value of another type or out of its range.
        """
        try:
            return from_mapping(cls, data, where=where)
        except ConfigurationError as error:
            raise CheckpointError(str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Return the plain data that `from_json` reads back as an equal index."""
        return to_mapping(self)

    def default_settings(self, *, few_step: bool = True) -> GenerationSettings:
        """Return the settings that the checkpoint recommends, for few steps of Stage I or for many."""
        one, two, run = self.stage_one, self.stage_two, self.defaults
        return GenerationSettings(
            size=Size(run.width, run.height),
            num_frames=run.num_frames,
            fps=run.fps,
            reference=run.reference,
            refiner=two.refiner,
            num_inference_steps=two.num_inference_steps,
            sigma_start=two.sigma_start,
            flow_shift=two.flow_shift,
            solver=two.solver,
            guidance_scale=two.guidance_scale,
            segment_size=two.segment_size,
            neighbors_before=two.neighbors_before,
            neighbors_after=two.neighbors_after,
            positions=two.positions,
            few_step=few_step,
            stage_one_steps=len(one.few_step_sigmas) if few_step else one.num_inference_steps,
            stage_one_guidance_scale=1.0 if few_step else one.guidance_scale,
            stage_one_flow_shift=one.flow_shift,
            negative_prompt=one.negative_prompt,
        )


def read_index(path: Path) -> CheckpointIndex:
    """Read an index file; raise `CheckpointError` naming it if it is missing, not JSON, or not of the schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; a checkpoint is a folder that holds {INDEX_NAME}"
        raise CheckpointError(msg) from error
    except ValueError as error:
        msg = f"{path} is not JSON ({error}); it is damaged: get it again"
        raise CheckpointError(msg) from error
    return CheckpointIndex.from_json(data, where=str(path))


def write_index(index: CheckpointIndex, path: Path) -> None:
    """Write an index file that `read_index` reads back; the file under `path` is whole at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(index.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def is_within(source: str) -> bool:
    """Whether a source is a part of the checkpoint itself (``./...``)."""
    return source.startswith(_WITHIN)


def is_hub_id(source: str) -> bool:
    """Whether a source is a hub repository (``owner/name``)."""
    return _HUB_ID.fullmatch(source) is not None and not is_within(source)


def _check_source(source: str, revision: str | None) -> None:
    if is_within(source):
        _check_relative(source.removeprefix(_WITHIN), "source")
    elif not is_hub_id(source) and not Path(source).is_absolute():
        msg = f"source {source!r} is not ./FOLDER, OWNER/NAME of a hub repository, or an absolute path"
        raise CheckpointError(msg)
    if revision is not None and not is_hub_id(source):
        msg = f"revision {revision!r} belongs to hub repositories, and {source!r} is none; leave it out"
        raise CheckpointError(msg)


def _check_relative(path: str, name: str) -> None:
    parts = PurePosixPath(path)
    if parts.is_absolute() or not parts.parts or ".." in parts.parts:
        msg = f"{name} {path!r} is not a path below the folder that it belongs to"
        raise CheckpointError(msg)


def _check_positive(entry: Any, *names: str) -> None:
    for name in names:
        if not getattr(entry, name) > 0:
            msg = f"{name} is {getattr(entry, name)}; it must be positive"
            raise CheckpointError(msg)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        msg = "a key is given twice"
        raise ValueError(msg)
    return keys
