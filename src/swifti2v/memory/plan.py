"""From a memory budget to a plan: where each phase's weights stand, how they are stored, how frames are cut.

Every phase has a list of ways to run that does not depend on the budget; the plan takes the fastest that fits. So more
memory is never slower, and nothing in a plan grows with the length of the clip. Arithmetic only; seconds are
predictions: counts over assumed rates (`devices.py`), transfers that cannot hide under work added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from swifti2v.errors import MemoryBudgetError
from swifti2v.memory.amounts import GIB, format_bytes
from swifti2v.memory.ways import phase_ways, resident_ways

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.memory.budget import PipelineDimensions, WeightDtype
    from swifti2v.memory.devices import DeviceRates
    from swifti2v.memory.run_settings import RunSettings
    from swifti2v.memory.ways import CodecWay, Placement, Way

CONTEXT_BYTES = int(0.8 * GIB)
"""Held by the driver and its libraries on every card."""

STORED_DTYPES: tuple[WeightDtype, ...] = ("bfloat16", "float8", "nf4")
"""How weights can be stored without another package, the most exact first."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits into memory.

    Args:
        budget_bytes: of the device; None: no limit.
        weight_dtype: how transformers and text encoder are stored.
        ways: one a phase, in order.
        host_bytes: of weights and parked features in host memory.
        given_up: what less memory costs, a sentence each.
        overlaps_decode: there is room to decode a segment while the next one is denoised.
    """

    budget_bytes: int | None
    weight_dtype: WeightDtype
    ways: tuple[Way, ...]
    host_bytes: int
    given_up: tuple[str, ...] = ()
    overlaps_decode: bool = False

    @property
    def peak_bytes(self) -> int:
        """Device memory of the hungriest phase, the context of the driver included."""
        overlap = self.overlaps_decode
        return CONTEXT_BYTES + max(way.peak_bytes + (way.overlap_bytes if overlap else 0) for way in self.ways)

    @property
    def seconds(self) -> float:
        """Predicted time of the phases together."""
        return sum(way.seconds for way in self.ways)

    @property
    def codec(self) -> CodecWay:
        """How Stage II's codec runs."""
        return next(way.codec for way in self.ways if way.codec is not None)

    def placement_of(self, phase: str) -> Placement:
        """Return where the weights of a phase stand."""
        return next(way.placement for way in self.ways if way.phase == phase)


def plan_memory(
    dimensions: PipelineDimensions,
    settings: RunSettings,
    rates: DeviceRates,
    *,
    budget_bytes: int | None,
    host_bytes: int | None = None,
    dtypes: Sequence[WeightDtype] = STORED_DTYPES,
) -> MemoryPlan:
    """Choose the fastest plan that fits.

    Args:
        dimensions: the networks.
        settings: the run.
        rates: of the device.
        budget_bytes: device memory that the run may take, None for no limit.
        host_bytes: host memory for weights and parked features, None for no limit.
        dtypes: how weights may be stored, the most exact first. The first with which there is a plan is taken, however
            much faster the next would be. It is host memory that decides, as a rule: on the device weights can be
            streamed at any precision.

    Raises:
        MemoryBudgetError: nothing fits; the message says what would.
        InvalidInputError: size, length or a count of `settings` cannot be used.
    """
    refusals: list[MemoryBudgetError] = []
    for dtype in dtypes:
        try:
            plan = _plan_stored(dimensions, settings, rates, dtype, budget_bytes=budget_bytes, host_bytes=host_bytes)
        except MemoryBudgetError as refusal:
            refusals.append(refusal)
            continue
        if refusals:
            note = f"weights are stored in {dtype}: in {dtypes[0]} no plan fits ({refusals[0]})"
            plan = replace(plan, given_up=(note, *plan.given_up))
        return plan
    raise refusals[-1]


def plan_stages(
    dimensions: PipelineDimensions,
    settings: RunSettings,
    rates: DeviceRates,
    *,
    budget_bytes: int | None,
    host_bytes: int | None = None,
    dtypes: Sequence[WeightDtype] = STORED_DTYPES,
) -> tuple[MemoryPlan, ...]:
    """Choose a plan for both stages, or one for each where the host has room for one stage at a time only.

    For one video that loses nothing, since every network is read once in either way, and weights stay as they are, or
    nearer to it: a stage alone is never stored narrower than beside the other. Arguments, errors: as in `plan_memory`.
    """
    choose = partial(plan_memory, settings=settings, rates=rates, budget_bytes=budget_bytes, host_bytes=host_bytes)
    if host_bytes is None or len(dimensions.stages) < 2:
        return (choose(dimensions, dtypes=dtypes),)
    try:
        return (choose(dimensions, dtypes=dtypes[:1]),)
    except MemoryBudgetError as refusal:
        first, *others = (choose(replace(dimensions, stages=(stage,)), dtypes=dtypes) for stage in dimensions.stages)
        note = f"the stages are loaded one after the other: for both at once {refusal}"
        return (replace(first, given_up=(note, *first.given_up)), *others)


def _plan_stored(
    dimensions: PipelineDimensions,
    settings: RunSettings,
    rates: DeviceRates,
    dtype: WeightDtype,
    *,
    budget_bytes: int | None,
    host_bytes: int | None,
) -> MemoryPlan:
    weights = dimensions.stored_bytes(dtype)
    if host_bytes is not None and weights > host_bytes:
        needed = format_bytes(weights, rounds_up=True)
        msg = (
            f"the weights take {needed} of host memory in {dtype}, and {format_bytes(host_bytes)} are allowed; "
            f"allow {needed}"
        )
        raise MemoryBudgetError(msg)
    spare = None if host_bytes is None else host_bytes - weights
    candidates = phase_ways(dimensions, settings, rates, dtype)
    allowed = [[way for way in ways if spare is None or way.parked_bytes <= spare] for ways in candidates]
    usable = None if budget_bytes is None else budget_bytes - CONTEXT_BYTES
    chosen = [_fastest([way for way in ways if usable is None or way.peak_bytes <= usable]) for ways in allowed]
    if any(way is None for way in chosen):
        raise _refusal(budget_bytes, host_bytes, weights, candidates, allowed)
    ways = tuple(way for way in chosen if way is not None)
    resident = resident_ways(dimensions, settings, rates, dtype)
    if usable is None or max(way.peak_bytes for way in resident) <= usable:
        ways = min(ways, resident, key=lambda group: sum(way.seconds for way in group))
    parked = max(way.parked_bytes for way in ways)
    plan = MemoryPlan(budget_bytes, dtype, ways, weights + parked, _given_up(ways, resident))
    beside = replace(plan, overlaps_decode=True)
    return beside if budget_bytes is None or beside.peak_bytes <= budget_bytes else plan


def tighter_budget(plan: MemoryPlan) -> int:
    """Return the budget to plan for after `plan` ran out of memory: an eighth less than what it counted on."""
    return plan.peak_bytes * 7 // 8


def _fastest(ways: Sequence[Way]) -> Way | None:
    # Of equally fast ones the one that needs less.
    return min(ways, key=lambda way: (way.seconds, way.peak_bytes), default=None)


def _refusal(
    budget_bytes: int | None,
    host_bytes: int | None,
    weights: int,
    candidates: Sequence[Sequence[Way]],
    allowed: Sequence[Sequence[Way]],
) -> MemoryBudgetError:
    """Return the error that names the budget that the hungriest phase needs, and the host memory that would do."""
    usable = None if budget_bytes is None else budget_bytes - CONTEXT_BYTES
    offers = []
    if all(allowed):
        least = {ways[0].phase: min(way.peak_bytes for way in ways) for ways in allowed}
        phase = max(least, key=lambda name: least[name])
        offers.append(f"{phase} needs {format_bytes(least[phase] + CONTEXT_BYTES, rounds_up=True)} at the least")
    fitting = [[way for way in ways if usable is None or way.peak_bytes <= usable] for ways in candidates]
    if host_bytes is not None and all(fitting):
        parked = max(min(way.parked_bytes for way in ways) for ways in fitting)
        offers.append(f"{format_bytes(weights + parked, rounds_up=True)} of host memory would do")
    budget = "the device" if budget_bytes is None else format_bytes(budget_bytes)
    host = "" if host_bytes is None else f" with {format_bytes(host_bytes)} of host memory"
    return MemoryBudgetError(
        f"no plan fits into {budget}{host}: {', or '.join(offers)}; allow that, or choose a smaller size or segment"
    )


def _given_up(ways: Sequence[Way], resident: Sequence[Way]) -> tuple[str, ...]:
    notes = []
    for way, best in zip(ways, resident, strict=True):
        if way.placement == "resident":
            continue
        cost = way.seconds - best.seconds
        price = f"{cost:.1f} s more" if cost >= 0.05 else "no time lost"
        notes.append(f"{way.phase}: {way.description}, {price}; to hold all takes {format_bytes(best.peak_bytes)}")
    return tuple(notes)
