"""Where a training fits: ways that are offered fit and are the smallest; cards are as few as will do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.memory.training_cost import TrainingSetup, TrainingWork, training_memory, window_shares
from swifti2v.memory.training_fit import RESERVED_BYTES, Machine, fit_on
from swifti2v.memory.transformer_cost import STAGE_TWO_5B

GIB = 2**30
FULL = TrainingWork(STAGE_TWO_5B, trains_all=True)
SETUP = TrainingSetup(FULL, 21120)
WAYS = {
    "optimizer: adamw8bit": {"optimizer": "adamw8bit"},
    "lora_rank: 64": {"work": TrainingWork(STAGE_TWO_5B, trains_all=False, lora_rank=64)},
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
    "batch_size: 1": {"batch_size": 1},
    "sharding: shard": {"shards": True},
    "context_parallel: 4": {"context_parallel": 4},
}


def machine(gibibytes: float, num_cards: int = 1) -> Machine:
    return Machine("a machine", num_cards, int(gibibytes * GIB), 100.0)


def test_a_card_is_full_with_what_is_reserved() -> None:
    card = machine(24)
    assert card.holds(24 * GIB - RESERVED_BYTES)
    assert not card.holds(24 * GIB - RESERVED_BYTES + 1)
    assert card.gpu_hours(3600 * 250.0) == 2.5


def test_what_fits_is_offered_nothing() -> None:
    fit = fit_on(SETUP, machine(140))
    assert (fit.fits, fit.changes, fit.min_cards) == (True, (), None)
    assert fit.memory == training_memory(SETUP)


@pytest.mark.parametrize("gibibytes", [20, 24, 40, 80, 100])
@pytest.mark.parametrize("num_cards", [1, 4])
@pytest.mark.parametrize(
    "setup",
    [
        SETUP,
        replace(SETUP, gradient_checkpointing=False, batch_size=2),
        replace(SETUP, num_devices=4, shards=False, batch_size=3),
    ],
)
def test_every_way_fits_and_nothing_less_does(gibibytes: float, num_cards: int, setup: TrainingSetup) -> None:
    place = machine(gibibytes, num_cards)
    fit = fit_on(setup, place)
    assert fit.fits is place.fits(fit.setup)
    assert fit.setup.num_devices == num_cards
    for way in fit.changes:
        changed = [WAYS[name] for name in way]
        whole = replace(fit.setup, **{key: value for fields in changed for key, value in fields.items()})
        assert place.fits(whole)
        for left_out in changed:
            rest = {key: value for fields in changed if fields is not left_out for key, value in fields.items()}
            assert not place.fits(replace(fit.setup, **rest))


def test_cards_are_as_few_as_will_do() -> None:
    fit = fit_on(SETUP, machine(24))
    assert fit.min_cards == 16
    assert not machine(24).fits(replace(SETUP, num_devices=8))
    assert fit_on(SETUP, machine(3)).min_cards is None


def test_tokens_of_a_sample_are_shared() -> None:
    alone, shared = (training_memory(replace(SETUP, num_devices=8, context_parallel=count)) for count in (1, 8))
    assert shared.activation_bytes == alone.activation_bytes / 8
    assert shared.weight_bytes == alone.weight_bytes
    with pytest.raises(InvalidInputError, match="context_parallel 3 does not divide 8 devices"):
        replace(SETUP, num_devices=8, context_parallel=3)


def test_replicas_and_teachers_are_whole() -> None:
    alone = training_memory(SETUP)
    replica = training_memory(replace(SETUP, num_devices=8, shards=False))
    assert (replica.weight_bytes, replica.optimizer_bytes) == (alone.weight_bytes, alone.optimizer_bytes)
    taught = training_memory(replace(SETUP, num_devices=8, has_teacher=True))
    sharded = training_memory(replace(SETUP, num_devices=8))
    assert taught.weight_bytes - sharded.weight_bytes == 2 * STAGE_TWO_5B.num_parameters


def test_eight_bits_spare_half_as_much_of_a_lora() -> None:
    """Of its two matrices, only the one with long rows is in 8 bits."""
    lora = replace(SETUP, work=TrainingWork(STAGE_TWO_5B, trains_all=False, lora_rank=64))
    held = training_memory(replace(lora, optimizer="adamw8bit")).optimizer_bytes / lora.num_trained
    assert held == pytest.approx((8 + 2 * (1 + 4 / 256)) / 2, rel=1e-3)


def test_windows_of_known_shares() -> None:
    assert window_shares(3, full_share=1.0, before_share=1.0, after_share=0.0) == {5: 1.0}
    assert window_shares(1, full_share=0.2, before_share=0.5, after_share=0.0) == {2: 0.5, 3: 0.5}
    mixed = window_shares(3, full_share=0.5, before_share=0.0, after_share=0.0)
    assert mixed == {2: 0.25, 3: 0.25, 4: 0.5}
