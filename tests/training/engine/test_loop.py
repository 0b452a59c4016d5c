"""The loop: learns, stops when it should, and a run that was stopped continues with the same losses."""

from __future__ import annotations

import json
import os
import signal
import threading

import pytest
import torch
from diffusers.training_utils import EMAModel

from swifti2v.errors import CheckpointError, ConfigurationError, TrainingError
from swifti2v.training.engine.loop import MAX_SKIPPED_STEPS, LoopOptions, TrainingLoop
from swifti2v.training.engine.samples import Prefetcher

OPTIONS = LoopOptions(num_steps=12, learning_rate=0.05, warmup_steps=2, checkpoint_every=4, log_every=1, bfloat16=False)


def changed(**changes) -> LoopOptions:
    return LoopOptions(**({field: getattr(OPTIONS, field) for field in OPTIONS.__dataclass_fields__} | changes))


class Regression:
    """Fit a line to data that depends on the number of the batch only; `merged` batches are taken as one."""

    def __init__(self, *, merged: int = 1, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(dropout))
        self.merged = merged

    @property
    def weight(self) -> torch.Tensor:
        return self.module[0].weight

    def inputs(self, step: int) -> torch.Tensor:
        numbers = range(step * self.merged, (step + 1) * self.merged)
        return torch.cat([torch.randn(16, 3, generator=torch.Generator().manual_seed(number)) for number in numbers])

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        inputs = self.inputs(step)
        error = self.module(inputs) - inputs.sum(dim=1, keepdim=True)
        return error.square().mean(), {"twice": 2.0, "samples": float(len(inputs))}


def entries(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def losses(directory) -> list[float]:
    return [entry["loss"] for entry in entries(directory)]


def stop_after(loop: TrainingLoop, steps: int):
    def on_step(report) -> None:
        if report.step == steps:
            loop.stop()

    return on_step


def test_the_loss_falls(tmp_path) -> None:
    TrainingLoop(Regression(), tmp_path, OPTIONS).run()
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]


def test_the_steps_are_those_of_plain_adamw_and_diffusers_average(tmp_path) -> None:
    objective, plain = Regression(), Regression()
    loop = TrainingLoop(objective, tmp_path, OPTIONS)
    averaged = []
    loop.run(on_checkpoint=lambda _step: averaged.append(objective.weight.detach().clone()))
    optimizer = torch.optim.AdamW(plain.module.parameters(), betas=OPTIONS.betas, weight_decay=OPTIONS.weight_decay)
    average = EMAModel(plain.module.parameters(), decay=OPTIONS.ema_decay)
    for step in range(OPTIONS.num_steps):
        optimizer.param_groups[0]["lr"] = loop.learning_rate_at(step)
        optimizer.zero_grad()
        plain.loss(step)[0].backward()
        torch.nn.utils.clip_grad_norm_(plain.module.parameters(), OPTIONS.gradient_clip)
        optimizer.step()
        average.step(plain.module.parameters())
    assert torch.equal(objective.weight, plain.weight)
    average.copy_to(plain.module.parameters())
    assert torch.equal(averaged[-1], plain.weight)


@pytest.mark.parametrize("stopped_at", [3, 4, 7, 11])
@pytest.mark.parametrize("log_every", [1, 5])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, stopped_at, log_every) -> None:
    options = changed(log_every=log_every)
    whole, resumed = Regression(dropout=0.3), Regression(dropout=0.3)
    TrainingLoop(whole, tmp_path / "whole", options).run()
    loop = TrainingLoop(Regression(dropout=0.3), tmp_path / "broken", options)
    with pytest.raises(KeyboardInterrupt, match=f"step {stopped_at};"):
        loop.run(on_step=stop_after(loop, stopped_at))
    TrainingLoop(resumed, tmp_path / "broken", options).run()
    assert torch.equal(resumed.weight, whole.weight)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_run_that_dies_between_checkpoints_repeats_the_steps_since(tmp_path) -> None:
    whole, resumed = Regression(), Regression()
    TrainingLoop(whole, tmp_path / "whole", OPTIONS).run()

    class KilledError(RuntimeError):
        pass

    def die(report) -> None:
        if report.step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        TrainingLoop(Regression(), tmp_path / "broken", OPTIONS).run(on_step=die)
    assert torch.load(tmp_path / "broken" / "checkpoint.pt")["step"] == 4
    TrainingLoop(resumed, tmp_path / "broken", OPTIONS).run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert torch.equal(resumed.weight, whole.weight)


def test_accumulated_batches_are_one_large_batch(tmp_path) -> None:
    parts, whole = Regression(), Regression(merged=3)
    TrainingLoop(parts, tmp_path / "parts", changed(gradient_accumulation=3)).run()
    TrainingLoop(whole, tmp_path / "whole", OPTIONS).run()
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    torch.testing.assert_close(parts.weight, whole.weight)
    assert entries(tmp_path / "parts")[0]["twice"] == pytest.approx(2.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_step_that_ran(tmp_path, number) -> None:
    def interrupt(report) -> None:
        if report.step == 6:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="step 6"):
        TrainingLoop(Regression(), tmp_path, OPTIONS).run(on_step=interrupt)
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 6
    assert signal.getsignal(number) is handler


def test_it_runs_in_a_thread_where_there_are_no_signals(tmp_path) -> None:
    thread = threading.Thread(target=TrainingLoop(Regression(), tmp_path, OPTIONS).run)
    thread.start()
    thread.join()
    assert len(losses(tmp_path)) == OPTIONS.num_steps


def test_checkpoints_show_the_average_and_leave_the_weights(tmp_path) -> None:
    objective = Regression()
    seen = []
    TrainingLoop(objective, tmp_path, OPTIONS).run(
        on_checkpoint=lambda _step: seen.append(objective.weight.detach().clone())
    )
    assert len(seen) == 3
    assert not torch.equal(seen[-1], objective.weight)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert torch.equal(state["module"]["0.weight"], objective.weight)


def test_validation_sees_the_average_and_is_logged(tmp_path) -> None:
    objective = Regression()
    seen = {}

    def validate(step: int) -> dict[str, float]:
        seen[step] = objective.weight[0, 0].item()
        return {"weight": seen[step]}

    TrainingLoop(objective, tmp_path, changed(validate_every=5, log_every=100)).run(on_validation=validate)
    assert {entry["step"]: entry["validation/weight"] for entry in entries(tmp_path)} == pytest.approx(seen)
    assert sorted(seen) == [5, 10]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_validation_has_the_precision_of_the_steps(tmp_path) -> None:
    """Full training has float32 weights only: nothing but the loop knows that matrices are bfloat16."""
    for mixed, expected in ((True, torch.bfloat16), (False, torch.float32)):
        objective, found = Regression(), []
        loop = TrainingLoop(objective, tmp_path / str(mixed), changed(num_steps=2, validate_every=1))
        loop._autocast = mixed  # which the option leaves off on CPUs that are slow at it
        objective.module[0].register_forward_hook(lambda *call, found=found: found.append(call[-1].dtype))

        def validate(_step: int, objective=objective) -> dict[str, float]:
            return {"output": float(objective.module(torch.ones(1, 3)).detach().mean())}

        loop.run(on_validation=validate)
        assert found == 4 * [expected]


def test_only_trained_weights_are_in_the_checkpoint_and_frozen_ones_stay(tmp_path) -> None:
    def partly_frozen() -> Regression:
        objective = Regression()
        objective.module.insert(0, torch.nn.Linear(3, 3))
        objective.module[0].requires_grad_(False)
        return objective

    objective = partly_frozen()
    before = objective.module[0].weight.clone()
    TrainingLoop(objective, tmp_path, OPTIONS).run()
    assert torch.equal(objective.module[0].weight, before)
    assert set(torch.load(tmp_path / "checkpoint.pt")["module"]) == {"1.weight", "1.bias"}
    TrainingLoop(partly_frozen(), tmp_path, changed(num_steps=13)).run()
    assert losses(tmp_path)[-1] < 0.5 * losses(tmp_path)[0]


def test_a_checkpoint_of_the_first_format_is_resumed(tmp_path) -> None:
    objective, resumed = Regression(), Regression()
    TrainingLoop(objective, tmp_path, OPTIONS).run()
    state = torch.load(tmp_path / "checkpoint.pt")
    torch.save({key: state[key] for key in ("step", "module", "average", "optimizer")}, tmp_path / "checkpoint.pt")
    loop = TrainingLoop(resumed, tmp_path, OPTIONS)
    loop.run()
    assert loop.steps_done == 12
    assert torch.equal(resumed.weight, objective.weight)


def test_a_checkpoint_of_another_network_is_refused(tmp_path) -> None:
    TrainingLoop(Regression(), tmp_path, OPTIONS).run()
    other = Regression()
    other.module[0] = torch.nn.Linear(4, 1)
    with pytest.raises(CheckpointError, match=r"0\.weight is \[1, 3\] in it, \[1, 4\] here.*new folder"):
        TrainingLoop(other, tmp_path, OPTIONS).run()
    other.module = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(3, 1))
    with pytest.raises(CheckpointError, match="do not match"):
        TrainingLoop(other, tmp_path, OPTIONS).run()


def test_a_loss_that_is_not_finite_stops_the_run_and_its_batch_is_saved(tmp_path) -> None:
    objective = Regression()
    honest = objective.loss

    def loss(step: int):
        value, numbers = honest(step)
        return value * (float("nan") if step == 5 else 1.0), numbers

    objective.loss = loss
    with pytest.raises(TrainingError, match=r"loss of step 5 is nan.*failed_step_000005_rank_0\.pt") as failure:
        TrainingLoop(objective, tmp_path, changed(seed=9)).run()
    assert "\n" not in str(failure.value)
    saved = torch.load(tmp_path / "failed_step_000005_rank_0.pt")
    assert (saved["step"], saved["draw"], saved["seed"]) == (5, 5, 9)
    assert torch.equal(saved["tensors"]["Sequential.0"], objective.inputs(5))


def test_a_gradient_that_overflows_once_is_left_out_and_many_stop_the_run(tmp_path) -> None:
    objective = Regression()
    honest, bad = objective.loss, {5}

    def loss(step: int):
        value, numbers = honest(step)
        if step in bad:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value, numbers

    objective.loss = loss
    TrainingLoop(objective, tmp_path / "once", OPTIONS).run()
    assert [entry["skipped"] for entry in entries(tmp_path / "once")] == [float(step == 5) for step in range(12)]
    assert torch.isfinite(objective.weight).all()
    bad |= set(range(12))
    with pytest.raises(TrainingError, match=f"gradients of {MAX_SKIPPED_STEPS} steps up to 9"):
        TrainingLoop(objective, tmp_path / "always", OPTIONS).run()


def test_steps_are_reported_and_speed_is_logged(tmp_path) -> None:
    reports = []
    TrainingLoop(Regression(), tmp_path, changed(log_every=4, gradient_accumulation=2)).run(on_step=reports.append)
    assert [report.step for report in reports] == list(range(1, 13))
    assert {report.num_steps for report in reports} == {12}
    seconds = sum(report.seconds for report in reports[:4])
    assert entries(tmp_path)[0]["samples_per_second"] == pytest.approx(4 * 2 * 16 / seconds, rel=1e-4)
    assert entries(tmp_path)[0]["loss"] == pytest.approx(sum(report.numbers["loss"] for report in reports[:4]) / 4)


def test_it_stops_at_its_time(tmp_path) -> None:
    loop = TrainingLoop(Regression(), tmp_path, changed(max_seconds=0.0))
    loop.run()
    assert loop.steps_done == 0
    assert (tmp_path / "checkpoint.pt").exists()


def test_learning_rate_warms_up_and_decays(tmp_path) -> None:
    loop = TrainingLoop(Regression(), tmp_path, OPTIONS)
    rates = [loop.learning_rate_at(step) for step in range(13)]
    assert rates[0] == pytest.approx(0.025)
    assert max(rates) == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0.0025)
    constant = TrainingLoop(Regression(), tmp_path, changed(final_rate_share=1.0))
    assert {constant.learning_rate_at(step) for step in range(2, 13)} == {0.05}


@pytest.mark.parametrize("name", ["gradient_accumulation", "checkpoint_every", "keep_last", "log_every"])
def test_counts_of_zero_are_refused(name) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is 0"):
        changed(**{name: 0})


def test_networks_that_cannot_be_trained_are_refused(tmp_path) -> None:
    objective = Regression()
    objective.module.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="nothing is trained"):
        TrainingLoop(objective, tmp_path, OPTIONS)
    objective = Regression()
    objective.module.to(torch.bfloat16)
    with pytest.raises(ConfigurationError, match=r"0\.weight is torch\.bfloat16"):
        TrainingLoop(objective, tmp_path, OPTIONS)


def test_prefetched_batches_are_those_asked_for() -> None:
    made = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    prefetcher = Prefetcher(make)
    assert [prefetcher.take(step) for step in (3, 4, 5, 9)] == [9, 16, 25, 81]
    assert made.count(4) == 1


def test_batches_are_made_one_at_a_time() -> None:
    """Whoever makes them may keep a state between them, as `BucketBatches` keeps its epoch."""
    threads = []
    batches = Prefetcher(lambda step: threads.append(threading.get_ident()) or step)
    assert [batches.take(step) for step in (0, 1, 7, 8)] == [0, 1, 7, 8]
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads


def test_batches_are_prefetched_in_the_strides_of_several_processes() -> None:
    made = []
    prefetcher = Prefetcher(made.append)
    for step in (1, 3, 5, 7):
        prefetcher.take(step)
    assert [made.count(step) for step in (5, 7)] == [1, 1]
    assert {step for step in made if step % 2 == 0} == {2}
