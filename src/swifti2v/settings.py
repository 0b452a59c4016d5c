"""The settings of a video, each described once: meaning, default, limits, command line flag, and what it decides.

`GenerationSettings` is everything that decides a video besides image, prompt and checkpoint. A caller gives some of it,
as keywords or as a mapping (*choices*, `checked_choices`), where None leaves a choice to the checkpoint. The command
line, the service, the app, jobs and the checkpoint index read this module. No torch here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, WithJsonSchema
from pydantic.fields import FieldInfo

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.segments import PositionMode  # noqa: TC001 - annotations that pydantic reads while it runs

Refiner = Literal["concat", "training-free", "light", "none"]
ReferenceMode = Literal["replace", "transport"]
SolverName = Literal["euler", "renoise"]
Quantization = Literal["none", "float8", "int8"]
"""Quantized matmul of the linear layers in the transformers' blocks (`wan/quantized_linear.py`)."""
Storage = Literal["float32", "bfloat16", "float8", "nf4"]
"""How weights are stored; the work is done in float32 or bfloat16."""
STORAGES: tuple[Storage, ...] = ("bfloat16", "float8", "nf4")
"""How weights can be stored where the work is done in bfloat16, the most exact first."""
Panel = Literal["Main", "Stage I", "Stage II", "Speed and memory"]

MAX_SIDE = 16_384
"""Pixels of a side at most: what H.264 can hold."""

MAX_PROMPT_CHARACTERS = 100_000
"""Of a prompt and of a negative prompt."""

_DEFAULT_SIZE = Size(2560, 1408)
_STAGE_ONE_GUIDANCE = "set stage_one_guidance_scale above 1 (--stage-one-guidance)"


@dataclass(frozen=True)
class Option:
    """How a setting is offered, and what it decides.

    Args:
        flag: of the command line; None: none.
        panel: group of the flags in ``--help``.
        decides: the stage whose result it changes: what a work directory compares before it is continued. "both" is
            for the negative prompt, which decides a stage only where that has guidance.
    """

    flag: str | None
    panel: Panel
    decides: Literal["stage one", "stage two", "both", "file"]


def _size(value: object) -> Size:
    size = Size.of(value)
    CodecGeometry().check_size(size)
    if max(size) > MAX_SIDE:
        msg = f"size is {size}; a side has at most {MAX_SIDE} pixels"
        raise InvalidInputError(msg)
    return size


def _num_frames(value: int) -> int:
    CodecGeometry().latent_frames(value)
    return value


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides a video besides image, prompt and checkpoint; each field describes itself.

    Raises:
        InvalidInputError: a value is of another type or out of its range; `param` and `value` say which.
    """

    size: Annotated[
        Size,
        PlainValidator(_size),
        WithJsonSchema({"type": "string", "pattern": r"^\d+x\d+$", "examples": ["1280x704"]}),
        Field(description="Output size in pixels, WIDTHxHEIGHT, multiples of 32."),
        Option("--size", "Main", "stage one"),
    ] = _DEFAULT_SIZE
    num_frames: Annotated[
        int,
        AfterValidator(_num_frames),
        Field(description="Pixel frames, 4k+1."),
        Option("--frames", "Main", "stage one"),
    ] = 81
    fps: Annotated[
        float, Field(ge=1, le=240, description="Frames per second of the file."), Option("--fps", "Main", "file")
    ] = 16.0
    refiner: Annotated[
        Refiner,
        Field(
            description="How Stage II works: a network trained with the reference as channels (concat, the paper's), a "
            "public image-to-video network started from the noised reference (training-free), a small trained network "
            "in pixel space (light), or not at all (none)."
        ),
        Option("--refiner", "Stage II", "stage two"),
    ] = "concat"
    reference: Annotated[
        ReferenceMode,
        Field(
            description="How the hybrid reference is made: the image replaces its first frame (replace, the paper's), "
            "or the image's detail is also carried along the motion (transport)."
        ),
        Option("--reference", "Stage II", "stage two"),
    ] = "transport"
    seed: Annotated[
        int, Field(ge=0, le=2**63 - 1, description="Seed of the noise."), Option("--seed", "Main", "stage one")
    ] = 0
    flow_scale: Annotated[
        float,
        Field(ge=1 / 64, le=1, description="Size of transport's optical flow, as a fraction of the output."),
        Option("--flow-scale", "Stage II", "stage two"),
    ] = 0.5
    num_inference_steps: Annotated[
        int, Field(ge=1, le=1000, description="Steps of Stage II."), Option("--steps", "Stage II", "stage two")
    ] = 4
    sigma_start: Annotated[
        float,
        Field(
            ge=1e-3,
            le=1,
            description="Noise level that Stage II starts from; below 1 it starts from the noised reference.",
        ),
        Option("--sigma-start", "Stage II", "stage two"),
    ] = 1.0
    flow_shift: Annotated[
        float,
        Field(ge=0.01, le=100, description="Time shift of Stage II's schedule."),
        Option(None, "Stage II", "stage two"),
    ] = 5.0
    guidance_scale: Annotated[
        float,
        Field(ge=1, le=100, description="Classifier-free guidance scale of Stage II; 1 turns it off."),
        Option("--guidance", "Stage II", "stage two"),
    ] = 1.0
    negative_prompt: Annotated[
        str,
        Field(
            max_length=MAX_PROMPT_CHARACTERS,
            description="What guidance steers away from, in the stages that have it; default: the checkpoint's.",
        ),
        Option("--negative-prompt", "Main", "both"),
    ] = ""
    solver: Annotated[
        SolverName,
        Field(
            description="Solver of Stage II: euler, or renoise for networks distilled with fresh noise at each step."
        ),
        Option(None, "Stage II", "stage two"),
    ] = "euler"
    segment_size: Annotated[
        int,
        Field(ge=1, description="Latent frames that a segment makes (M of the paper)."),
        Option("--segment-size", "Stage II", "stage two"),
    ] = 3
    neighbors_before: Annotated[
        int,
        Field(ge=0, description="Finished latent frames that a segment sees ahead of its own (N of the paper)."),
        Option("--neighbors-before", "Stage II", "stage two"),
    ] = 1
    neighbors_after: Annotated[
        int,
        Field(ge=0, description="Unrefined latent frames that a segment sees behind its own."),
        Option("--neighbors-after", "Stage II", "stage two"),
    ] = 0
    anchor: Annotated[
        bool,
        Field(description="Whether every segment sees latent frame 0, the image; off is for ablations."),
        Option(None, "Stage II", "stage two"),
    ] = True
    keep_context: Annotated[
        bool,
        Field(
            description="Run a segment's anchor and neighbors in its first step only and keep their keys and values: "
            "faster, and inexact unless the network was trained with frozen context."
        ),
        Option("--keep-context", "Speed and memory", "stage two"),
    ] = False
    positions: Annotated[
        PositionMode,
        Field(description="Time positions of a segment's frames: in the clip (absolute), or in its window (compact)."),
        Option("--positions", "Stage II", "stage two"),
    ] = "absolute"
    few_step: Annotated[
        bool,
        Field(description="Stage I with its few-step adapters and schedule, or with many steps of the base model."),
        Option("--few-step/--many-step", "Stage I", "stage one"),
    ] = True
    stage_one_steps: Annotated[
        int, Field(ge=1, le=1000, description="Steps of Stage I."), Option("--stage-one-steps", "Stage I", "stage one")
    ] = 4
    stage_one_guidance_scale: Annotated[
        float,
        Field(ge=1, le=100, description="Classifier-free guidance scale of Stage I; 1 turns it off."),
        Option("--stage-one-guidance", "Stage I", "stage one"),
    ] = 1.0
    stage_one_guidance_scale_2: Annotated[
        float | None,
        Field(ge=1, le=100, description="Guidance scale of Stage I's low-noise expert; default: the other's."),
        Option("--stage-one-guidance-2", "Stage I", "stage one"),
    ] = None
    stage_one_flow_shift: Annotated[
        float,
        Field(ge=0.01, le=100, description="Time shift of Stage I's many steps; few steps have their own schedule."),
        Option("--stage-one-flow-shift", "Stage I", "stage one"),
    ] = 5.0

    def __post_init__(self) -> None:
        for name in _ADAPTERS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))

    @property
    def denoises_segments(self) -> bool:
        """Whether Stage II runs its transformer and codec; `light` and `none` need neither."""
        return self.refiner in {"concat", "training-free"}

    def settled(self, choices: Mapping[str, Any] | None = None) -> GenerationSettings:
        """Return these settings with every choice that is not None put in its place.

        Raises:
            InvalidInputError: there is no such setting, a choice is out of its range, or it would have no effect.
        """
        chosen = checked_choices(choices or {})
        settled = replace(self, **chosen)
        if settled.few_step and (shift := chosen.get("stage_one_flow_shift")) is not None:
            msg = "stage_one_flow_shift has no effect with few steps; ask for many: few_step=False, --many-step"
            raise InvalidInputError(msg, param="stage_one_flow_shift", value=shift)
        second = chosen.get("stage_one_guidance_scale_2")
        if settled.stage_one_guidance_scale == 1 and second is not None:
            msg = f"stage_one_guidance_scale_2 has no effect without guidance in Stage I; {_STAGE_ONE_GUIDANCE}"
            raise InvalidInputError(msg, param="stage_one_guidance_scale_2", value=second)
        return settled

    def notes(self, choices: Mapping[str, Any]) -> tuple[str, ...]:
        """Say which of the choices that were settled have no effect beside the others."""
        refines_with_guidance = self.denoises_segments and self.guidance_scale > 1
        if not choices.get("negative_prompt") or refines_with_guidance or self.stage_one_guidance_scale > 1:
            return ()
        fix = f"{_STAGE_ONE_GUIDANCE}, or guidance_scale (--guidance)"
        return (f"the negative prompt has no effect: neither stage has guidance; {fix}",)

    def stage_one_identity(self) -> dict[str, str]:
        """Return what decides the motion reference, for comparing a resumed run with the one that was begun."""
        identity = self._deciding("stage one")
        # Named only where they have an effect: work directories from before there were these go on.
        if self.few_step:
            del identity["stage_one_flow_shift"]
        if self.stage_one_guidance_scale_2 is None:
            del identity["stage_one_guidance_scale_2"]
        return identity | {"negative_prompt": self.negative_prompt if self.stage_one_guidance_scale > 1 else ""}

    def stage_two_identity(self) -> dict[str, str]:
        """Return what decides the finished segments, beyond `stage_one_identity`."""
        if self.refiner == "light":  # no noise, no prompt, no window
            return {name: str(getattr(self, name)) for name in ("refiner", "segment_size", "flow_scale")}
        identity = self._deciding("stage two", "both")
        identity["negative_prompt"] = self.negative_prompt if self.guidance_scale > 1 else ""
        if self.reference == "replace":
            identity["flow_scale"] = ""
        return identity

    def _deciding(self, *stages: str) -> dict[str, str]:
        return {name: str(getattr(self, name)) for name, option in OPTIONS.items() if option.decides in stages}


_HINTS = {
    name: hint for name, hint in get_type_hints(GenerationSettings, include_extras=True).items() if name != "return"
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(hint, config=ConfigDict(strict=True)) for name, hint in _HINTS.items()
}

OPTIONS: Mapping[str, Option] = {
    name: next(item for item in hint.__metadata__ if isinstance(item, Option)) for name, hint in _HINTS.items()
}
"""By the name of the setting."""

TYPES: Mapping[str, Any] = {name: hint.__origin__ for name, hint in _HINTS.items()}
"""What a value of a setting is, by its name: ``int``, a literal, ``float | None``."""

DESCRIPTIONS: Mapping[str, str] = {
    name: next(item.description or "" for item in hint.__metadata__ if isinstance(item, FieldInfo))
    for name, hint in _HINTS.items()
}
"""What a setting means, one sentence, by its name."""


def checked_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices that are not None, checked one by one; the size as a `Size`.

    Raises:
        InvalidInputError: there is no setting of a name (the message has the nearest), or a value cannot be used.
    """
    names = [field.name for field in fields(GenerationSettings)]
    for name, value in choices.items():
        if name in {"width", "height"}:
            msg = f"{name} is not a setting by itself; give size=Size(width, height)"
            raise InvalidInputError(msg, param=name, value=value)
        if name not in names:
            nearest = get_close_matches(name, names, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(names)}"
            msg = f"there is no setting {name!r}; {hint}"
            raise InvalidInputError(msg, param=name, value=value)
    return {name: _checked(name, value) for name, value in choices.items() if value is not None}


def plain_choices(choices: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked choices as JSON holds them, from which `checked_choices` returns the same."""
    checked = checked_choices(choices)
    return checked | {"size": list(checked["size"])} if "size" in checked else checked


def check_prompt(prompt: str) -> None:
    """Raise `InvalidInputError` if a prompt is longer than any that is read."""
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        msg = f"the prompt has {len(prompt)} characters; shorten it to at most {MAX_PROMPT_CHARACTERS}"
        raise InvalidInputError(msg, param="prompt", value=prompt)


def _checked(name: str, value: Any) -> Any:
    try:
        checked = _ADAPTERS[name].validate_python(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "value_error":
            msg = str(problem["ctx"]["error"])
        else:
            fix = problem["msg"].replace("Input", "it", 1).replace("String", "it", 1)
            msg = f"{name} is {reprlib.repr(value)}; {fix}"
        raise InvalidInputError(msg, param=name, value=value) from error
    # A whole number stays one where a fraction is meant, as a work directory has it written down.
    return checked if name == "size" else value
