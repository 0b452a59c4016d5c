"""The loop: learns, and a run that was killed continues with the same losses."""

from __future__ import annotations

import json

import pytest
import torch

from swifti2v.errors import CheckpointError
from swifti2v.training.loop import LoopOptions, Prefetcher, TrainingLoop

OPTIONS = LoopOptions(num_steps=12, learning_rate=0.05, warmup_steps=2, checkpoint_every=4, log_every=1, bfloat16=False)


class Regression:
    """Fit a line to data that depends on the step only."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(3, 1)

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 3, generator=generator)
        error = self.module(inputs) - inputs.sum(dim=1, keepdim=True)
        return error.square().mean(), {"twice": 2.0}


def losses(directory) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls(tmp_path) -> None:
    TrainingLoop(Regression(), tmp_path, OPTIONS).run()
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path) -> None:
    whole, broken = Regression(), Regression()
    TrainingLoop(whole, tmp_path / "whole", OPTIONS).run()

    class KilledError(RuntimeError):
        pass

    original = broken.loss

    def killed_after_eight_steps(step: int):
        if step == 8:
            raise KilledError
        return original(step)

    broken.loss = killed_after_eight_steps
    with pytest.raises(KilledError):
        TrainingLoop(broken, tmp_path / "broken", OPTIONS).run()
    resumed = Regression()
    TrainingLoop(resumed, tmp_path / "broken", OPTIONS).run()
    assert torch.equal(resumed.module.weight, whole.module.weight)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_checkpoints_show_the_average_and_leave_the_weights(tmp_path) -> None:
    objective = Regression()
    seen = []

    def look(_step: int) -> None:
        seen.append(objective.module.weight.detach().clone())

    TrainingLoop(objective, tmp_path, OPTIONS).run(on_checkpoint=look)
    assert not torch.equal(seen[-1], objective.module.weight)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(state["module"]["weight"], objective.module.weight)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    objective = Regression()
    objective.loss = lambda _step: (objective.module.weight.sum() * float("nan"), {})
    with pytest.raises(CheckpointError, match="step 0"):
        TrainingLoop(objective, tmp_path, OPTIONS).run()


def test_learning_rate_warms_up_and_decays(tmp_path) -> None:
    loop = TrainingLoop(Regression(), tmp_path, OPTIONS)
    rates = [loop.learning_rate_at(step) for step in range(13)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.0025)


def test_prefetched_batches_are_those_asked_for() -> None:
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    prefetcher = Prefetcher(make)
    assert [prefetcher.take(step) for step in (3, 4, 5, 9)] == [9, 16, 25, 81]
    assert made.count(4) == 1
