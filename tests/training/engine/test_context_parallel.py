"""Processes that share each sample do what one does that has it whole: the same losses, the same gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.distributed import Processes, joined_processes
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.engine.samples import BatchesOfProcess
from tests.training.engine.shared_samples import GROUPS, KINDS, STEPS, stage_two, train
from tests.training.torchrun import run_on

SCRIPT = Path(__file__).with_name("shared_samples.py")
ALONE = Processes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the kinds of training, by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    run_on(2, SCRIPT, folder, *KINDS)
    return folder


def entries(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one(runs: Path, tmp_path: Path, kind: str) -> None:
    train(kind, tmp_path, ALONE)
    # bfloat16 rounds sums of tokens, which are in another order, to three digits.
    assert_alike(runs / kind, tmp_path, tolerance=0.03 if kind == "bfloat16" else 1e-4)


@pytest.mark.slow
def test_two_groups_have_a_batch_each(tmp_path: Path) -> None:
    """Four processes: what one does that takes the two batches of a step in turn."""
    run_on(4, SCRIPT, tmp_path, GROUPS)
    train(GROUPS, tmp_path / "alone", ALONE)
    assert_alike(tmp_path / GROUPS, tmp_path / "alone", tolerance=1e-4)


def assert_alike(run: Path, alone: Path, *, tolerance: float) -> None:
    ours, theirs = entries(run), entries(alone)
    assert len(ours) == STEPS
    for name in ("loss", "samples", "tokens"):
        if name in theirs[0]:
            assert [each[name] for each in ours] == pytest.approx([each[name] for each in theirs], abs=tolerance)
    for found, expected in zip(*(torch.load(folder / "gradients.pt") for folder in (run, alone)), strict=True):
        assert found.keys() == expected.keys()
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert largest > 0.01
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=tolerance * max(1.0, largest), rtol=0, msg=name)


def test_a_group_has_one_batch() -> None:
    class Steps:
        def batch_of(self, step: int) -> list[int]:
            return [step]

    members = [Processes(rank=rank, count=4, context=2) for rank in range(4)]
    assert [(each.batch_rank, each.batch_count) for each in members] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [BatchesOfProcess(Steps(), each).batch_of(6 + each.batch_rank) for each in members] == [[3]] * 4


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"context_parallel 2 does not divide 1 processes; set it to 1"),
        joined_processes(context_parallel=2),
    ):
        pass
    options = LoopOptions(num_steps=1, context_parallel=2)
    with pytest.raises(ConfigurationError, match="this training shares no samples; set it to 1"):
        TrainingLoop(stage_two("shard"), tmp_path, options)
    with pytest.raises(ConfigurationError, match="Linear of 0 heads cannot be shared by 2"):
        Processes(count=2, context=2).share_tokens(nn.Linear(1, 1))
    with pytest.raises(ConfigurationError, match="StageTwoTransformer of 2 heads cannot be shared by 3"):
        Processes(count=3, context=3).share_tokens(stage_two("shard").module)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="has accelerators")
def test_processes_without_accelerators_share_nothing() -> None:
    with pytest.raises(ConfigurationError, match="needs an accelerator for each process"):
        Processes(count=2, context=2).share_tokens(stage_two("shard").module)
