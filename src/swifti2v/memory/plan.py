"""From limits of memory to a plan: where the weights of each phase stand, how they are stored, how frames are cut.

Every phase can run in several ways that do not depend on the limits (`ways.py`); a plan takes the fastest that fit. So
more memory is never slower, and nothing in a plan grows with the length of the clip.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from swifti2v.errors import MemoryBudgetError
from swifti2v.memory.amounts import GIB, format_bytes
from swifti2v.memory.ways import RunCosts, stored_bytes
from swifti2v.settings import STORAGES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from swifti2v.memory.devices import DeviceRates
    from swifti2v.memory.networks import PipelineNetworks
    from swifti2v.memory.placement import Placement
    from swifti2v.memory.ways import CodecWay, PhaseName, Task, Way
    from swifti2v.settings import GenerationSettings, Storage

CONTEXT_BYTES = int(0.8 * GIB)
"""Held by the driver and its libraries on every card."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a run fits into memory.

    Args:
        budget_bytes: of the device; None: no limit.
        storage: of the weights of the text encoder, and of transformers that are not quantized.
        ways: one for each phase, in order.
        tasks: of these phases: what is done, whatever the limits.
        task_seconds: predicted for each task, with its weights on the device and the codec untiled.
        weight_bytes: of all weights that are held.
        read_bytes: of these weights as a checkpoint has them.
        host_bytes: of weights and offloaded features in host memory.
        given_up: what less memory costs, one sentence each.
        overlaps_decode: there is room to decode a segment while the next one is denoised.
    """

    budget_bytes: int | None
    storage: Storage
    ways: tuple[Way, ...]
    tasks: tuple[Task, ...]
    task_seconds: tuple[float, ...]
    weight_bytes: int
    read_bytes: int
    host_bytes: int
    given_up: tuple[str, ...] = ()
    overlaps_decode: bool = False

    @property
    def peak_bytes(self) -> int:
        """Device memory of the phase that needs most, with what the driver holds."""
        return max(map(self.peak_bytes_of, self.ways))

    def peak_bytes_of(self, way: Way) -> int:
        """Return the device memory of one phase, with what the driver holds."""
        return CONTEXT_BYTES + way.peak_bytes + (way.overlap_bytes if self.overlaps_decode else 0)

    @property
    def seconds(self) -> float:
        """Predicted time of the phases together."""
        return sum(way.seconds for way in self.ways)

    @property
    def codec(self) -> CodecWay:
        """How Stage II's codec runs."""
        return next(way.codec for way in self.ways if way.codec is not None)

    def placement_of(self, phase: PhaseName) -> Placement:
        """Return where the weights of a phase stand."""
        return next(way.placement for way in self.ways if way.phase == phase)


def plan_memory(
    networks: PipelineNetworks,
    settings: GenerationSettings,
    rates: DeviceRates,
    *,
    budget_bytes: int | None,
    host_bytes: int | None = None,
    storages: Sequence[Storage] = STORAGES,
) -> MemoryPlan:
    """Choose the fastest plan that fits.

    Args:
        networks: of the pipeline.
        settings: of the run.
        rates: of the device.
        budget_bytes: device memory that the run may take, None for no limit.
        host_bytes: host memory for weights and offloaded features, None for no limit.
        storages: how weights may be stored, the most exact first. The first with which there is a plan is taken,
            however much faster the next would be. As a rule host memory decides: on the device, weights of any storage
            can be streamed.

    Raises:
        MemoryBudgetError: nothing fits; the message says what would, and so does `value`: ``device_bytes`` or
            ``host_bytes``, of which either is enough.
        InvalidInputError: size or length cannot be used, or the card cannot multiply so.
    """
    refusals: list[MemoryBudgetError] = []
    for storage in storages:
        try:
            plan = _plan_stored(RunCosts(networks, settings, storage), rates, budget_bytes, host_bytes)
        except MemoryBudgetError as refusal:
            refusals.append(refusal)
            continue
        if refusals:
            note = f"weights are stored in {storage}: {refusals[0]}"
            plan = replace(plan, given_up=(note, *plan.given_up))
        return plan
    raise refusals[-1]


def plan_stages(
    networks: PipelineNetworks,
    settings: GenerationSettings,
    rates: DeviceRates,
    *,
    budget_bytes: int | None,
    host_bytes: int | None = None,
    storages: Sequence[Storage] = STORAGES,
) -> tuple[MemoryPlan, ...]:
    """Choose a plan for both stages, or one for each where the host has room for one stage at a time only.

    For one video nothing is lost by that: every network is read once either way, and a stage alone is never stored
    narrower than beside the other. Arguments and errors are those of `plan_memory`.
    """
    choose = partial(plan_memory, settings=settings, rates=rates, budget_bytes=budget_bytes, host_bytes=host_bytes)
    if host_bytes is None or len(networks.planned) < 2:
        return (choose(networks, storages=storages),)
    try:
        return (choose(networks, storages=storages[:1]),)
    except MemoryBudgetError as refusal:
        first, *others = (choose(replace(networks, stages=(stage,)), storages=storages) for stage in networks.planned)
        note = f"the stages are loaded one after the other: for both at once {refusal}"
        return (replace(first, given_up=(note, *first.given_up)), *others)


def tighter_budget(plan: MemoryPlan) -> int:
    """Return the budget to plan for after `plan` ran out of memory: an eighth less than what it counted on."""
    return plan.peak_bytes * 7 // 8


def _plan_stored(costs: RunCosts, rates: DeviceRates, budget_bytes: int | None, host_bytes: int | None) -> MemoryPlan:
    weights, usable = (
        stored_bytes(costs.networks, costs.storage),
        None if budget_bytes is None else budget_bytes - CONTEXT_BYTES,
    )
    if host_bytes is not None and weights > host_bytes:
        needed = format_bytes(weights, rounds_up=True)
        msg = (
            f"the weights take {needed} of host memory in {costs.storage}, and {format_bytes(host_bytes)} are allowed; "
            f"allow {needed}"
        )
        raise MemoryBudgetError(msg, param="memory", value={"host_bytes": weights})
    spare = None if host_bytes is None else host_bytes - weights

    def fits_host(way: Way) -> bool:
        return spare is None or way.offloaded_bytes <= spare

    def fits_device(way: Way) -> bool:
        return usable is None or way.peak_bytes <= usable

    # The fastest come first, and what others take is not measured.
    found = [
        next((way for way in ways if fits_host(way) and fits_device(way)), None)
        for ways in costs.ways(rates, most_bytes=usable)
    ]
    ways = tuple(way for way in found if way is not None)
    if len(ways) < len(found):
        raise _refusal(costs, rates, budget_bytes, host_bytes, fits_host, fits_device)
    resident = costs.resident_ways(rates)
    if all(map(fits_device, resident)):
        ways = min(resident, ways, key=lambda group: sum(way.seconds for way in group))
    of_stages = {"stage_one": ("text encoding", "stage one"), "stage_two": ("reference encode", "stage two", "decode")}
    tasks = tuple(costs.tasks[name] for stage in costs.networks.planned for name in of_stages[stage])
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        storage=costs.storage,
        ways=ways,
        tasks=tasks,
        task_seconds=tuple(costs.seconds(task, rates) for task in tasks),
        weight_bytes=weights,
        read_bytes=stored_bytes(replace(costs.networks, quantization="none"), costs.networks.compute_dtype),
        host_bytes=weights + max(way.offloaded_bytes for way in ways),
        given_up=_given_up(ways, resident),
    )
    beside = replace(plan, overlaps_decode=True)
    return beside if budget_bytes is None or beside.peak_bytes <= budget_bytes else plan


def _refusal(
    costs: RunCosts,
    rates: DeviceRates,
    budget_bytes: int | None,
    host_bytes: int | None,
    fits_host: Callable[[Way], bool],
    fits_device: Callable[[Way], bool],
) -> MemoryBudgetError:
    """Return the error that names the budget that the hungriest phase needs, and the host memory that would do."""
    candidates = [tuple(ways) for ways in costs.ways(rates)]
    allowed = [[way for way in ways if fits_host(way)] for ways in candidates]
    offers, enough = [], {}
    if all(allowed):
        least = {ways[0].phase: min(way.peak_bytes for way in ways) for ways in allowed}
        phase = max(least, key=lambda name: least[name])
        enough["device_bytes"] = least[phase] + CONTEXT_BYTES
        offers.append(f"{phase} needs at least {format_bytes(enough['device_bytes'], rounds_up=True)}")
    fitting = [[way for way in ways if fits_device(way)] for ways in candidates]
    if host_bytes is not None and all(fitting):
        offloaded = max(min(way.offloaded_bytes for way in ways) for ways in fitting)
        enough["host_bytes"] = stored_bytes(costs.networks, costs.storage) + offloaded
        offers.append(f"{format_bytes(enough['host_bytes'], rounds_up=True)} of host memory would do")
    budget = "the device" if budget_bytes is None else format_bytes(budget_bytes)
    host = "" if host_bytes is None else f" with {format_bytes(host_bytes)} of host memory"
    return MemoryBudgetError(
        f"no plan fits into {budget}{host}: {', or '.join(offers)}; allow that, or choose a smaller size or segment",
        param="memory",
        value=enough,
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
