"""AdamW with moments in 8 bits: close to AdamW, a quarter of its bytes, resumed bit by bit, on one process and two."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.distributed import Processes
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.engine.optimizers import make_optimizer, set_learning_rate, take_step, whole_state
from tests.training.engine.eight_bit_runs import OPTIONS, STOP, Objective, train_and_resume
from tests.training.torchrun import run_on

SCRIPT = Path(__file__).with_name("eight_bit_runs.py")
CPU = torch.device("cpu")


@pytest.fixture
def torchao() -> None:
    """Skip without the package of the extra `train` that has the 8-bit optimizer."""
    pytest.importorskip("torchao.optim")


def stepped(name: Any, weight: torch.Tensor, gradients: list[torch.Tensor]) -> tuple[nn.Parameter, Any]:
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer(name, [parameter], learning_rate=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    for number, gradient in enumerate(gradients):
        parameter.grad = gradient
        set_learning_rate(optimizer, 0.01 / (number + 1))
        take_step(optimizer, CPU)
    return parameter, optimizer


def gradients_of(weight: torch.Tensor) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(weight.shape, generator=generator) for _ in range(5)]


def checkpoints(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    whole, parts = (torch.load(folder / name / "checkpoint.pt") for name in ("whole", "parts"))
    return whole, parts


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["module"], expected["module"], atol=0, rtol=0)
    torch.testing.assert_close(found["optimizer"]["state"], expected["optimizer"]["state"], atol=0, rtol=0)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ConfigurationError, match=r"needs torchao.*pip install 'swifti2v\[adamw8bit\]', or use adamw"):
        TrainingLoop(Objective(), tmp_path, OPTIONS)


def test_rates_reach_the_steps_of_plain_adamw() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    parameter, _ = stepped("adamw", weight, gradients_of(weight))
    expected = nn.Parameter(weight.clone())
    theirs = torch.optim.AdamW([expected], lr=1.0, weight_decay=0.01, betas=(0.9, 0.98))
    for number, gradient in enumerate(gradients_of(weight)):
        expected.grad = gradient
        theirs.param_groups[0]["lr"] = 0.01 / (number + 1)
        theirs.step()
    assert torch.equal(parameter, expected)


@pytest.mark.usefixtures("torchao")
def test_steps_are_close_to_those_of_adamw() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    ours, theirs = (stepped(name, weight, gradients_of(weight))[0].detach() for name in ("adamw8bit", "adamw"))
    moved, apart = (theirs - weight).norm(), (ours - theirs).norm()
    assert 0 < float(apart) < 0.02 * float(moved)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("shape", "quantized"), [((32, 256), True), ((16, 4, 64), True), ((300, 32), False), ((9000,), False)]
)
def test_only_whole_rows_are_in_eight_bits(shape: tuple[int, ...], quantized: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter, optimizer = stepped("adamw8bit", weight, gradients_of(weight))
    moment = optimizer.state[parameter]["exp_avg"]
    assert hasattr(moment, "codes") is quantized
    saved = whole_state(optimizer)["state"][0]
    assert ("exp_avg_scales" in saved) is quantized
    assert saved["exp_avg"].dtype == torch.float32
    if quantized:
        # A byte each, a float32 for 256 of them, and the table of 256 levels.
        held = sum(getattr(moment, name).nbytes for name in ("codes", "scale"))
        assert held == weight.numel() * (1 + 4 / 256)
        expected = torch.zeros(shape)
        for gradient in gradients_of(weight):
            expected.lerp_(gradient, 0.1)
        assert float((saved["exp_avg"] - expected).norm()) < 0.03 * float(expected.norm())


@pytest.mark.usefixtures("torchao")
def test_a_stopped_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    train_and_resume(tmp_path, Processes())
    whole, parts = checkpoints(tmp_path)
    assert_equal(parts, whole)
    assert (tmp_path / "parts" / "log.jsonl").read_text().count("loss") == OPTIONS.num_steps


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("before", "after"), [("adamw", "adamw8bit"), ("adamw8bit", "adamw")])
def test_a_run_goes_on_with_the_other_optimizer(tmp_path: Path, before: Any, after: Any) -> None:
    """From the same checkpoint, it goes where the first would have gone, but for the rounding."""

    def trained(options: LoopOptions) -> torch.Tensor:
        objective = Objective()
        TrainingLoop(objective, tmp_path, options).run()
        return objective.module.down.weight.detach().clone()

    start = trained(replace(OPTIONS, num_steps=STOP, checkpoint_every=STOP, optimizer=before, final_rate_share=1.0))
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    changed = trained(replace(OPTIONS, optimizer=after, final_rate_share=1.0))
    (tmp_path / "checkpoint.pt").write_bytes(kept)
    same = trained(replace(OPTIONS, optimizer=before, final_rate_share=1.0))
    assert 0 < float((changed - same).norm()) < 0.05 * float((same - start).norm())


@pytest.mark.slow
@pytest.mark.usefixtures("torchao")
def test_two_processes_resume_bit_by_bit_and_one_goes_on(tmp_path: Path) -> None:
    run_on(2, SCRIPT, tmp_path)
    whole, parts = checkpoints(tmp_path)
    assert_equal(parts, whole)
    (tmp_path / "alone").mkdir()
    (tmp_path / "stopped.pt").rename(tmp_path / "alone" / "checkpoint.pt")
    objective = Objective()
    TrainingLoop(objective, tmp_path / "alone", replace(OPTIONS, gradient_accumulation=2)).run()
    # Sums in another order may round a moment to the next of its levels.
    torch.testing.assert_close(dict(objective.module.state_dict()), whole["module"], atol=5e-4, rtol=0)
