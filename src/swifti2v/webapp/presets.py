"""Presets by the memory of a card, with the numbers of the memory plan. Arithmetic only; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory.amounts import format_bytes
from swifti2v.memory.devices import device_rates
from swifti2v.memory.plan import MemoryPlan, plan_memory
from swifti2v.memory.run_settings import RunSettings

if TYPE_CHECKING:
    from swifti2v.memory.budget import PipelineDimensions
    from swifti2v.settings import GenerationSettings

_MULTIPLE = 32
_SHARES = (1.0, 0.75, 0.5)
"""Fractions of the checkpoint's width and height that a preset may choose; it takes the largest that fits."""


@dataclass(frozen=True)
class Card:
    """A card by its memory.

    Args:
        gigabytes: as it is sold, 10**9 bytes.
        rates: name of the card whose speed the prediction takes (`memory/devices.py`).
    """

    gigabytes: int
    rates: str

    @property
    def label(self) -> str:
        """The label that people choose: 24 GB."""
        return f"{self.gigabytes} GB"


CARDS = (Card(12, "rtx4090"), Card(16, "rtx4090"), Card(24, "rtx4090"), Card(80, "h800"))
DEFAULT_CARD = CARDS[2].label


@dataclass(frozen=True)
class Preset:
    """What a card is given: a size and a length, and what the plan says of them in one sentence."""

    label: str
    size: Size
    num_frames: int
    summary: str


def size_choices(defaults: GenerationSettings) -> tuple[Size, ...]:
    """Return the checkpoint's size and smaller ones of about its shape, the largest first."""
    width, height = defaults.size
    scaled = (Size(_rounded(width * share), _rounded(height * share)) for share in _SHARES)
    return tuple(dict.fromkeys(scaled))


def preset_of(label: str, dimensions: PipelineDimensions, defaults: GenerationSettings) -> Preset:
    """Return the preset of a card: the largest size that its memory holds."""
    sizes = size_choices(defaults)
    card = _card(label)
    fitting = next((size for size in sizes if _plan(card, dimensions, defaults, size) is not None), sizes[-1])
    return Preset(label, fitting, defaults.num_frames, summary(label, dimensions, defaults, size=fitting))


def summary(
    label: str,
    dimensions: PipelineDimensions,
    defaults: GenerationSettings,
    *,
    size: Size | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
) -> str:
    """Say in one sentence what a run takes on a card, or why it does not fit and what would.

    Raises:
        InvalidInputError: size, length or steps cannot be used.
    """
    card = _card(label)
    settings = _run(defaults, size, num_frames, num_inference_steps)
    try:
        plan = _memory(card, dimensions, settings)
    except MemoryBudgetError as error:
        return f"Does not fit {card.label}: {error}."
    motion = sum(way.seconds for way in plan.ways if way.phase != "refinement")
    return (
        f"{settings.size}, {settings.num_frames} frames: peak {format_bytes(plan.peak_bytes)} of {card.label}, "
        f"{format_bytes(plan.host_bytes)} of host memory. Preview {_time(motion)}, video {_time(plan.seconds)}: "
        f"predicted for {card.rates}, not measured."
    )


def _plan(card: Card, dimensions: PipelineDimensions, defaults: GenerationSettings, size: Size) -> MemoryPlan | None:
    try:
        return _memory(card, dimensions, _run(defaults, size, None, None))
    except MemoryBudgetError:
        return None


def _memory(card: Card, dimensions: PipelineDimensions, settings: RunSettings) -> MemoryPlan:
    return plan_memory(dimensions, settings, device_rates(card.rates), budget_bytes=card.gigabytes * 10**9)


def _run(defaults: GenerationSettings, size: Size | None, num_frames: int | None, steps: int | None) -> RunSettings:
    return RunSettings(
        size=size or defaults.size,
        num_frames=defaults.num_frames if num_frames is None else num_frames,
        stage_one_steps=defaults.stage_one_steps,
        stage_one_guidance_scale=defaults.stage_one_guidance_scale,
        num_inference_steps=defaults.num_inference_steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale,
        segment_size=defaults.segment_size,
        neighbors_before=defaults.neighbors_before,
        neighbors_after=defaults.neighbors_after,
    )


def _card(label: str) -> Card:
    return next((card for card in CARDS if card.label == label), CARDS[2])


def _rounded(length: float) -> int:
    return max(_MULTIPLE, round(length / _MULTIPLE) * _MULTIPLE)


def _time(seconds: float) -> str:
    return "under 1 s" if seconds < 1 else f"about {seconds:,.0f} s"
