"""What a caller may choose, and what a run is settled on. Pure Python, so that the command line can build options."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.segments import PositionMode, plan_segments

if TYPE_CHECKING:
    from collections.abc import Mapping

Refiner = Literal["concat", "training-free", "none"]
SolverName = Literal["euler", "renoise"]
REFINERS: tuple[Refiner, ...] = ("concat", "training-free", "none")

MAX_SIDE = 16_384
"""Pixels of a side at most: what H.264 can hold."""

_STAGE_ONE_NAMES = (
    "size",
    "num_frames",
    "seed",
    "few_step",
    "stage_one_steps",
    "stage_one_guidance_scale",
    "stage_one_guidance_scale_2",
    "stage_one_flow_shift",
)
_STAGE_ONE_GUIDANCE = "set stage_one_guidance_scale above 1 (--stage-one-guidance)"


@dataclass(frozen=True)
class GenerationOptions:
    """Choices of the caller; None leaves a choice to the checkpoint. See `GenerationSettings` for what each means."""

    size: Size | None = None
    num_frames: int | None = None
    fps: float | None = None
    seed: int | None = None
    refiner: Refiner | None = None
    reference: Literal["replace", "transport"] | None = None
    flow_scale: float | None = None
    num_inference_steps: int | None = None
    sigma_start: float | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    solver: SolverName | None = None
    segment_size: int | None = None
    neighbors_before: int | None = None
    neighbors_after: int | None = None
    anchor: bool | None = None
    keep_context: bool | None = None
    positions: PositionMode | None = None
    few_step: bool | None = None
    stage_one_steps: int | None = None
    stage_one_guidance_scale: float | None = None
    stage_one_guidance_scale_2: float | None = None
    stage_one_flow_shift: float | None = None

    def with_choices(self, choices: Mapping[str, Any]) -> GenerationOptions:
        """Return these options with some named anew, as keywords of a call are.

        Raises:
            InvalidInputError: there is no option of a name; the message has the nearest.
        """
        names = [each.name for each in fields(self)]
        for name in choices:
            if name in {"width", "height"}:
                msg = f"{name} is not an option by itself; give size=Size(width, height)"
                raise InvalidInputError(msg)
            if name not in names:
                nearest = get_close_matches(name, names, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else f"they are {', '.join(names)}"
                msg = f"there is no option {name!r}; {hint}"
                raise InvalidInputError(msg)
        return replace(self, **choices)


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides a video besides image, prompt and checkpoint.

    Args:
        size: of the output in pixels, multiples of 32, at most `MAX_SIDE`.
        num_frames: pixel frames, 4k+1.
        fps: frames per second of the file.
        seed: in [0, 2**63).
        refiner: `concat` (paper: a network trained with the reference as channels), `training-free` (a public
            image-to-video network started from the noised reference) or `none` (the hybrid reference is the video).
        reference: `replace` (paper) or `transport` (the image's detail carried along the motion).
        flow_scale: size of the optical flow of `transport`, as a fraction of the output, in (0, 1].
        num_inference_steps: steps of Stage II for each segment.
        sigma_start: noise level from which Stage II starts, in (0, 1]; below 1 it starts from the noised reference.
        flow_shift: time shift of Stage II's schedule.
        guidance_scale: classifier-free guidance of Stage II; 1 turns it off.
        negative_prompt: what guidance leads away from, in the stages where it is on.
        solver: of Stage II: deterministic `euler`, or `renoise` for networks distilled with fresh noise at each step.
        segment_size: latent frames that a segment makes (M of the paper).
        neighbors_before: finished latent frames that it sees (N).
        neighbors_after: unrefined latent frames that it sees behind it.
        anchor: whether it sees the anchor, latent frame 0 (the image); False is for ablations.
        keep_context: run anchor and neighbours in the first step of a segment only, and keep what they say to the
            targets for the other steps: less work, an approximation unless the network was trained with frozen context.
        positions: RoPE positions of a window, `absolute` or `compact`.
        few_step: Stage I with the few-step schedule and adapters, or the many-step way of the base model.
        stage_one_steps: steps of Stage I.
        stage_one_guidance_scale: guidance of Stage I; 1 turns it off.
        stage_one_guidance_scale_2: of its low-noise expert; None: `stage_one_guidance_scale`.
        stage_one_flow_shift: time shift of Stage I's many-step way; the schedule of few steps is their distillation's.

    Raises:
        InvalidInputError: a value is out of its range.
    """

    size: Size
    num_frames: int
    fps: float
    refiner: Refiner
    reference: Literal["replace", "transport"] = "transport"
    seed: int = 0
    flow_scale: float = 0.5
    num_inference_steps: int = 4
    sigma_start: float = 1.0
    flow_shift: float = 5.0
    guidance_scale: float = 1.0
    negative_prompt: str = ""
    solver: SolverName = "euler"
    segment_size: int = 3
    neighbors_before: int = 1
    neighbors_after: int = 0
    anchor: bool = True
    keep_context: bool = False
    positions: PositionMode = "absolute"
    few_step: bool = True
    stage_one_steps: int = 4
    stage_one_guidance_scale: float = 1.0
    stage_one_guidance_scale_2: float | None = None
    stage_one_flow_shift: float = 5.0

    def __post_init__(self) -> None:
        _check_choice("refiner", self.refiner, REFINERS)
        _check_choice("reference", self.reference, ("replace", "transport"))
        _check_choice("solver", self.solver, ("euler", "renoise"))
        _check_choice("positions", self.positions, ("absolute", "compact"))
        _check_is_size(self.size)
        CodecGeometry().latent_shape(self.size, self.num_frames)
        _check_range("width", self.size.width, 1, MAX_SIDE)
        _check_range("height", self.size.height, 1, MAX_SIDE)
        _check_range("fps", self.fps, 1, 240)
        _check_range("seed", self.seed, 0, 2**63 - 1)
        _check_range("flow_scale", self.flow_scale, 1 / 64, 1)
        _check_range("num_inference_steps", self.num_inference_steps, 1, 1000)
        _check_range("sigma_start", self.sigma_start, 1e-3, 1)
        _check_range("guidance_scale", self.guidance_scale, 1, 100)
        _check_range("stage_one_steps", self.stage_one_steps, 1, 1000)
        _check_range("stage_one_guidance_scale", self.stage_one_guidance_scale, 1, 100)
        if self.stage_one_guidance_scale_2 is not None:
            _check_range("stage_one_guidance_scale_2", self.stage_one_guidance_scale_2, 1, 100)
        _check_range("stage_one_flow_shift", self.stage_one_flow_shift, 0.01, 100)
        plan_segments(
            1,
            segment_size=self.segment_size,
            neighbors_before=self.neighbors_before,
            neighbors_after=self.neighbors_after,
        )

    def settled(self, options: GenerationOptions | None) -> GenerationSettings:
        """Return these settings with every choice of `options` that is not None put in their place.

        Raises:
            InvalidInputError: a choice is out of its range, or one for the many steps of Stage I would have no effect.
        """
        options = options or GenerationOptions()
        chosen = {f.name: getattr(options, f.name) for f in fields(options)}
        settled = replace(self, **{name: value for name, value in chosen.items() if value is not None})
        if options.stage_one_flow_shift is not None and settled.few_step:
            msg = "stage_one_flow_shift has no effect with few steps; ask for many: few_step=False, --many-step"
            raise InvalidInputError(msg)
        if options.stage_one_guidance_scale_2 is not None and settled.stage_one_guidance_scale == 1:
            msg = f"stage_one_guidance_scale_2 has no effect without guidance in Stage I; {_STAGE_ONE_GUIDANCE}"
            raise InvalidInputError(msg)
        return settled

    def notes(self, options: GenerationOptions) -> tuple[str, ...]:
        """Say which of the choices that were settled have no effect beside the others."""
        refines_with_guidance = self.refiner != "none" and self.guidance_scale > 1
        if not options.negative_prompt or refines_with_guidance or self.stage_one_guidance_scale > 1:
            return ()
        fix = f"{_STAGE_ONE_GUIDANCE}, or guidance_scale (--guidance)"
        return (f"the negative prompt has no effect: neither stage has guidance; {fix}",)

    def stage_one_identity(self) -> dict[str, Any]:
        """Return what decides the motion reference, for comparing a resumed run with the one that was begun."""
        identity = {name: str(getattr(self, name)) for name in _STAGE_ONE_NAMES if self._reaches_stage_one(name)}
        return identity | {"negative_prompt": self.negative_prompt if self.stage_one_guidance_scale > 1 else ""}

    def _reaches_stage_one(self, name: str) -> bool:
        # Named only where it has an effect: work directories of few steps stay what they were before there were these.
        if name == "stage_one_flow_shift":
            return not self.few_step
        return name != "stage_one_guidance_scale_2" or self.stage_one_guidance_scale_2 is not None

    def stage_two_identity(self) -> dict[str, Any]:
        """Return what decides the finished segments, beyond `stage_one_identity`."""
        others = {*_STAGE_ONE_NAMES, "fps"}
        identity = {name: str(value) for name, value in asdict(self).items() if name not in others}
        identity["negative_prompt"] = self.negative_prompt if self.guidance_scale > 1 else ""
        if self.reference == "replace":
            identity["flow_scale"] = ""
        return identity


def _check_is_size(size: object) -> None:
    if not isinstance(size, Size):  # of a plain pair nobody knows which comes first
        msg = f"size is {size!r}; give Size(width, height), for instance Size(1280, 704)"
        raise InvalidInputError(msg)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{name} is {value!r}; use one of {', '.join(choices)}"
        raise InvalidInputError(msg)


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        limits = (f"{limit:g}" if isinstance(limit, float) else str(limit) for limit in (least, most))
        msg = f"{name} is {value}; it must be from {' to '.join(limits)}"
        raise InvalidInputError(msg)
