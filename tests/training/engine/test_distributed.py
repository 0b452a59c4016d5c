"""Two processes that torchrun starts do what one process does with the whole batch, replicated and sharded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from swifti2v.training.engine.distributed import (
    Processes,
    joined_processes,
    networks_of,
    placed_like,
    whole,
)
from swifti2v.training.engine.learner import own_state
from swifti2v.training.engine.loop import TrainingLoop
from swifti2v.training.engine.samples import BatchesOfProcess
from swifti2v.training.low_res.lora_files import LORA_NAME, lora_state, save_lora
from tests.training.engine.two_processes import STEPS, STOP, Objective, low_res_objective, options
from tests.training.torchrun import run_on

SCRIPT = Path(__file__).with_name("two_processes.py")
SHARDINGS = ("replicate", "shard")


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def trained_in_one(folder: Path) -> Objective:
    objective = Objective(merged=2)
    loop = TrainingLoop(objective, folder, options())
    loop.run(on_checkpoint=lambda _step: torch.save(own_state(objective.module), folder / "averaged.pt"))
    return objective


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `replicate` and `shard`: the same training by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    run_on(2, SCRIPT, folder)
    trained_in_one(folder / "one")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_processes_have_the_losses_of_one(runs, sharding) -> None:
    ours, theirs = losses(runs / sharding), losses(runs / "one")
    assert len(ours) == STEPS
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(theirs) > min(theirs) + 0.1
    lines = [json.loads(line) for line in (runs / sharding / "log.jsonl").read_text().splitlines()]
    assert all("samples_per_second" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_weights_and_their_average_are_those_of_one(runs, sharding) -> None:
    ours, theirs = (torch.load(runs / name / "checkpoint.pt") for name in (sharding, "one"))
    torch.testing.assert_close(ours["module"], theirs["module"], atol=1e-4, rtol=0)
    averaged, expected = (torch.load(runs / name / "averaged.pt") for name in (sharding, "one"))
    torch.testing.assert_close(averaged, expected, atol=1e-4, rtol=0)
    assert not torch.equal(averaged["text.weight"], ours["module"]["text.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_validation_sees_the_average_and_changes_nothing(runs, sharding) -> None:
    """Not even of the layers that FSDP keeps gathered after a forward without a backward: the outermost ones."""
    folder = runs / f"validated_{sharding}"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/output" in line] == [3, 6, 9]
    assert [line["loss"] for line in lines if "loss" in line] == losses(runs / sharding)
    ours, undisturbed = (torch.load(each / "checkpoint.pt") for each in (folder, runs / sharding))
    torch.testing.assert_close(ours["module"], undisturbed["module"], atol=0, rtol=0)
    seen, plain = torch.load(folder / "seen.pt"), Objective().module
    assert not torch.equal(seen["average"]["text.weight"], ours["module"]["text.weight"])
    plain.load_state_dict(seen["average"])
    with torch.no_grad():
        expected = plain["network"](plain["text"](torch.ones(2, 5)))
    torch.testing.assert_close(seen["output"], expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_checkpoint_of_two_processes_is_resumed_by_one(runs, sharding, tmp_path) -> None:
    shutil.copy(runs / sharding / "first.pt", tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == STOP
    trained_in_one(tmp_path)
    assert losses(tmp_path) == pytest.approx(losses(runs / "one")[STOP:], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_low_res_lora_is_the_same_on_two_processes(runs, sharding, tmp_path) -> None:
    alone = low_res_objective()
    accumulated = replace(options(), gradient_accumulation=2)
    TrainingLoop(alone, tmp_path, accumulated).run(
        on_checkpoint=lambda _step: save_lora(lora_state(alone.module), alone.module, tmp_path)
    )
    assert losses(runs / f"lora_{sharding}") == pytest.approx(losses(tmp_path), abs=1e-4)
    ours, theirs = (load_file(folder / LORA_NAME) for folder in (runs / f"lora_{sharding}", tmp_path))
    assert len(ours) == 2 * 2 * 10
    # The frozen network is bfloat16, where the last bit is 0.4%.
    torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=0)


@pytest.mark.slow
def test_shards_are_parts_and_replicas_are_whole(runs) -> None:
    total = sum(parameter.numel() for parameter in Objective().module.parameters())
    held = {
        sharding: [int((runs / sharding / f"numbers_of_rank_{rank}.txt").read_text()) for rank in range(2)]
        for sharding in SHARDINGS
    }
    assert held["replicate"] == [total, total]
    assert sum(held["shard"]) == total
    assert max(held["shard"]) < 0.7 * total


@pytest.mark.slow
def test_a_bad_loss_in_one_process_stops_both(runs) -> None:
    errors = [(runs / f"error_of_rank_{rank}.txt").read_text() for rank in range(2)]
    assert errors[0].startswith("the loss of step 3 is not finite in another process")
    assert errors[1].startswith("the loss of step 3 is nan; its batch is in")
    assert [path.name for path in (runs / "bad").glob("failed*")] == ["failed_step_000003_rank_1.pt"]
    saved = torch.load(runs / "bad" / "failed_step_000003_rank_1.pt")
    assert saved["draw"] == 7
    assert saved["tensors"]["text.0"].shape == (4, 5)


@pytest.mark.slow
def test_processes_that_do_not_share_a_folder_stop(runs) -> None:
    for rank in range(2):
        assert (
            f"from the steps [{STEPS}, 0]; give all of them the same folder"
            in (runs / f"folders_of_rank_{rank}.txt").read_text()
        )


def test_each_process_takes_its_own_batches_of_a_step() -> None:
    class Steps:
        def batch_of(self, step: int) -> list[int]:
            return [step]

    for rank in range(3):
        batches = BatchesOfProcess(Steps(), Processes(rank=rank, count=3))
        assert [batches.batch_of(3 * step + rank) for step in range(4)] == [[0], [1], [2], [3]]


def test_one_process_is_what_there_is_without_torchrun() -> None:
    with joined_processes() as processes:
        assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
        assert processes.any(True)
        assert not processes.any(False)
        assert processes.gather({"loss": 1.0}) == [{"loss": 1.0}]


def test_processes_wait_longer_than_a_checkpoint_takes(monkeypatch) -> None:
    """80 GB at 10 MB/s are two hours; NCCL's own limit is ten minutes."""
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with joined_processes() as processes:
        assert (processes.rank, processes.count) == (1, 2)
    assert given["backend"] == "gloo"
    assert given["timeout"].total_seconds() > 80e9 / 10e6


def test_one_process_leaves_the_network_plain() -> None:
    network = nn.Linear(2, 2)
    Processes().distribute(network, "shard")
    assert type(network.weight) is nn.Parameter


def test_networks_of_containers_are_their_members() -> None:
    inner, outer = nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))
    assert networks_of(outer) == [outer]
    assert networks_of(nn.ModuleDict({"a": inner, "b": nn.ModuleList([outer])})) == [inner, outer]


def test_whole_and_placed_copy_plain_tensors() -> None:
    tensor = torch.ones(2, requires_grad=True)
    found = whole({"a": [tensor, 3], "b": None})
    assert not found["a"][0].requires_grad
    assert (found["a"][1], found["b"]) == (3, None)
    assert whole({"a": tensor}, keep=False) == {"a": None}
    copied = placed_like(torch.zeros(2), tensor)
    copied += 1
    assert torch.equal(tensor, torch.ones(2))
