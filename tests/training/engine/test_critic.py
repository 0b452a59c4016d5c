"""A critic beside the first network: whose turn it is, what stops a run, what a checkpoint holds, two processes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v.errors import CheckpointError, ConfigurationError, TrainingError
from swifti2v.training.engine.learner import Critic
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from tests.training.engine.matching_runs import LOOP, STOP, matching_objective
from tests.training.torchrun import run_on

SCRIPT = Path(__file__).with_name("matching_runs.py")
OPTIONS = LoopOptions(
    num_steps=4, learning_rate=0.05, warmup_steps=2, checkpoint_every=4, log_every=1, weight_decay=0.0, bfloat16=False
)


class Noted:
    """A line through the origin; notes which batches it was asked for, and what the other one weighed then."""

    def __init__(self, other: nn.Module | None = None, *, bad: int | None = None) -> None:
        self.module = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.module.weight)
        self.other = other
        self.bad = bad
        self.draws: list[int] = []
        self.seen: list[float] = []

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        self.draws.append(step)
        if self.other is not None:
            self.seen.append(float(next(self.other.parameters()).detach().sum()))
        value = math.nan if step == self.bad else 1.0
        return self.module(torch.ones(1, 1)).square().sum() * value, {"own": float(step)}


def critic_of(objective: Any, **changes: Any) -> Critic:
    return Critic(objective, **{"steps_per_step": 2, "learning_rate": 0.01, "betas": (0.0, 0.9)} | changes)


def losses(folder: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["loss"], line["critic_loss"]) for line in lines]


def test_the_critic_moves_first_and_every_batch_has_its_number(tmp_path: Path) -> None:
    second = Noted()
    first = Noted(second.module)
    TrainingLoop(first, tmp_path, OPTIONS, critic=critic_of(second)).run()
    assert first.draws == [2, 5, 8, 11]
    assert second.draws == [0, 1, 3, 4, 6, 7, 9, 10]
    assert first.seen[0] < 1 - 1e-3  # it has moved before the first network asks
    assert first.seen == sorted(first.seen, reverse=True)
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (line["own"], line["critic_own"]) == (2, 0.5)
    assert line["critic_gradient_norm"] > 0


def test_accumulation_and_rates_are_each_ones_own(tmp_path: Path) -> None:
    """AdamW's first step is its rate, whatever the gradient: half the peak in the first of two steps of warm-up."""
    first, second = Noted(), Noted()
    options = replace(OPTIONS, num_steps=1, gradient_accumulation=3, checkpoint_every=1)
    TrainingLoop(first, tmp_path, options, critic=critic_of(second, steps_per_step=1)).run()
    assert (second.draws, first.draws) == ([0, 1, 2], [3, 4, 5])
    assert float(first.module.weight.detach()) == pytest.approx(1 - 0.05 / 2, abs=1e-6)
    assert float(second.module.weight.detach()) == pytest.approx(1 - 0.01 / 2, abs=1e-6)


def test_no_gradient_outlives_its_step(tmp_path: Path) -> None:
    """Those of both networks are never held at the same time; so it is counted (`training.recipe_cost`)."""
    first, second = Noted(), Noted()
    held: list[bool] = []
    first.module.register_forward_hook(lambda *_: held.append(second.module.weight.grad is not None))
    second.module.register_forward_hook(lambda *_: held.append(first.module.weight.grad is not None))
    TrainingLoop(first, tmp_path, OPTIONS, critic=critic_of(second)).run()
    assert held == [False] * 12


def test_a_bad_loss_of_the_critic_stops_the_run(tmp_path: Path) -> None:
    second = Noted(bad=4)
    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        TrainingLoop(Noted(), tmp_path, OPTIONS, critic=critic_of(second)).run()
    (path,) = tmp_path.glob("failed_step_*")
    assert torch.load(path)["draw"] == 4


def test_a_gradient_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    second = Noted()
    second.module.weight.register_hook(lambda gradient: gradient * math.inf)
    TrainingLoop(Noted(), tmp_path, OPTIONS, critic=critic_of(second)).run()
    assert float(second.module.weight.detach()) == 1
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert (line["skipped"], line["critic_skipped"]) == (0, 1)


def test_a_checkpoint_with_a_critic_and_one_without_are_of_different_runs(tmp_path: Path) -> None:
    for has_one, folder in ((True, tmp_path / "with"), (False, tmp_path / "without")):
        TrainingLoop(Noted(), folder, OPTIONS, critic=critic_of(Noted()) if has_one else None).run()
        state = torch.load(folder / "checkpoint.pt")
        assert ("critic" in state) is has_one
        other = None if has_one else critic_of(Noted())
        with pytest.raises(CheckpointError, match=r"of another network or recipe \(.*critic.*resume with the recipe"):
            TrainingLoop(Noted(), folder, OPTIONS, critic=other).run()


def test_a_critic_takes_a_step_at_least() -> None:
    with pytest.raises(ConfigurationError, match="critic_steps_per_step is 0"):
        critic_of(Noted(), steps_per_step=0)


def test_distribution_matching_goes_on_where_it_was(tmp_path: Path) -> None:
    """Stopped after a step, in a folder of its own: the same losses of both networks, to the last bit."""
    for folder, sittings in (("whole", [LOOP.num_steps]), ("stopped", [STOP, LOOP.num_steps])):
        for last in sittings:
            of = matching_objective()
            loop = TrainingLoop(of, tmp_path / folder, LOOP, critic=of.critic)

            def stop(report: Any, loop: TrainingLoop = loop, last: int = last) -> None:
                if report.step == last < LOOP.num_steps:
                    loop.stop()

            if last < LOOP.num_steps:
                with pytest.raises(KeyboardInterrupt):
                    loop.run(on_step=stop)
            else:
                loop.run()
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    ours, theirs = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("stopped", "whole"))
    torch.testing.assert_close(ours["critic"], theirs["critic"], atol=0, rtol=0)
    torch.testing.assert_close(ours["module"], theirs["module"], atol=0, rtol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `replicate` and `shard`: the same training by one process that accumulates two batches, and by two."""
    folder = tmp_path_factory.mktemp("runs")
    run_on(2, SCRIPT, folder)
    of = matching_objective(num_processes=2)  # which draws as two do
    TrainingLoop(of, folder / "one", replace(LOOP, gradient_accumulation=2), critic=of.critic).run()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_do_what_one_does(runs: Path, sharding: str) -> None:
    ours, theirs = (torch.tensor(losses(runs / name)) for name in (sharding, "one"))
    assert ours.shape == (LOOP.num_steps, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    assert bool((theirs.std(dim=0) > 0.01 * theirs.mean(dim=0)).all())
    two, one = (torch.load(runs / name / "checkpoint.pt") for name in (sharding, "one"))
    for part in (lambda state: state["module"], lambda state: state["critic"]["module"]):
        torch.testing.assert_close(part(two), part(one), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_resumed_by_one(runs: Path, tmp_path: Path) -> None:
    shutil.copy(runs / "shard" / "checkpoint.pt", tmp_path / "checkpoint.pt")
    of = matching_objective(num_processes=2)
    longer = replace(LOOP, gradient_accumulation=2, num_steps=LOOP.num_steps + 1)
    TrainingLoop(of, tmp_path, longer, critic=of.critic).run()
    assert len(losses(tmp_path)) == 1
