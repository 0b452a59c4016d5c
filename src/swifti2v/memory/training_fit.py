"""Where a training fits, and what would make it fit. Arithmetic only, over `training_cost.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

from swifti2v.memory.training_cost import training_memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swifti2v.memory.training_cost import TrainingMemory, TrainingSetup

RESERVED_BYTES = 2**30
"""Of each card: the driver's context and workspaces. What fragmentation takes comes on top and is not known."""

LORA_RANK_TRIED = 64
CARDS_TRIED = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """Cards that a training may run on.

    Args:
        name: for people.
        num_cards: of one kind.
        card_bytes: of each, as its driver reports them.
        tflop_per_second: that each really does in training: an assumption, 40% of its peak in bfloat16.
    """

    name: str
    num_cards: int
    card_bytes: int
    tflop_per_second: float

    def holds(self, num_bytes: int) -> bool:
        """Whether so many bytes and the reserved ones fit on a card."""
        return num_bytes + RESERVED_BYTES <= self.card_bytes

    def fits(self, setup: TrainingSetup) -> bool:
        """Whether each card holds its part of `setup`, which is for so many cards."""
        return self.holds(training_memory(setup).peak_bytes)

    def gpu_hours(self, tflop: float) -> float:
        """Hours of one card for so much arithmetic."""
        return tflop / self.tflop_per_second / 3600


MACHINES = (
    Machine("1x24 GB", 1, 24 * 2**30, 66.0),
    Machine("1x80 GB", 1, int(79.6 * 2**30), 400.0),
    Machine("8x80 GB", 8, int(79.6 * 2**30), 400.0),
)
"""An RTX 4090, one and eight H100."""


@dataclass(frozen=True)
class Fit:
    """What a training needs on a machine.

    Args:
        machine: see there.
        setup: on its cards, as the recipe has it.
        memory: of each card.
        fits: with the reserved bytes.
        changes: fewest settings, written as in a recipe, with which it would fit; each entry is a way.
        min_cards: fewest cards of this kind, sharded, on which it would fit unchanged; None: more than were tried.
    """

    machine: Machine
    setup: TrainingSetup
    memory: TrainingMemory
    fits: bool
    changes: tuple[tuple[str, ...], ...] = ()
    min_cards: int | None = None


def fit_on(setup: TrainingSetup, machine: Machine) -> Fit:
    """Return whether a training fits on a machine, and if not, what would make it fit.

    Args:
        setup: as the recipe has it; its number of devices is that of the machine.
        machine: where.
    """
    # A recipe that asks for more than there is would not start; it is counted as far as it goes.
    shared = min(setup.context_parallel, machine.num_cards)
    there = replace(setup, num_devices=machine.num_cards, context_parallel=shared)
    memory = training_memory(there)
    if machine.fits(there):
        return Fit(machine, there, memory, fits=True)
    larger = (replace(there, num_devices=count, shards=True) for count in CARDS_TRIED if count > machine.num_cards)
    enough = (setup.num_devices for setup in larger if machine.fits(setup))
    return Fit(machine, there, memory, fits=False, changes=_ways_to_fit(there, machine), min_cards=next(enough, None))


def _ways_to_fit(setup: TrainingSetup, machine: Machine) -> tuple[tuple[str, ...], ...]:
    """Return the smallest sets of settings that fit; empty if not even all of them do."""
    changes = _changes_of(setup)
    for count in range(1, len(changes) + 1):
        ways = [names for names in combinations(changes, count) if machine.fits(_changed(setup, names, changes))]
        if ways:
            return tuple(ways)
    return ()


def _changes_of(setup: TrainingSetup) -> dict[str, dict[str, object]]:
    """Return the settings that save memory and are not used yet, by how a recipe writes them."""
    work, cards = setup.work, setup.num_devices
    lora = replace(work, trains_all=False, lora_rank=LORA_RANK_TRIED)
    changes: tuple[tuple[str, bool, dict[str, object]], ...] = (
        ("gradient_checkpointing: true", not setup.gradient_checkpointing, {"gradient_checkpointing": True}),
        ("batch_size: 1", setup.batch_size > 1, {"batch_size": 1}),
        ("sharding: shard", cards > 1 and not setup.shards, {"shards": True}),
        ("optimizer: adamw8bit", setup.optimizer == "adamw", {"optimizer": "adamw8bit"}),
        (f"context_parallel: {cards}", setup.context_parallel < cards, {"context_parallel": cards}),
        (f"lora_rank: {LORA_RANK_TRIED}", work.trains_all, {"work": lora}),
    )
    return {name: fields for name, is_open, fields in changes if is_open}


def _changed(setup: TrainingSetup, names: tuple[str, ...], changes: Mapping[str, dict[str, object]]) -> TrainingSetup:
    fields: dict[str, object] = {}
    for name in names:
        fields |= changes[name]
    return replace(setup, **fields)  # type: ignore[arg-type]
