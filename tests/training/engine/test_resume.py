"""A run that is killed again and again, as a machine would kill it, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_runs.py")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alone", "followed"])
def test_killed_ten_times_the_losses_are_those_of_a_run_that_was_not(tmp_path, kind) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path), "5", kind]
    subprocess.run(command, check=True, timeout=1800, env=environment)  # noqa: S603 - our own script
    killed_at = json.loads((tmp_path / "killed_at.json").read_text())
    assert len(killed_at) == 10

    def losses(name: str) -> dict[int, tuple[float, float | None]]:
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        found = {line["step"]: (line["loss"], line.get("critic_loss")) for line in lines}
        assert all((critic is None) is (kind == "alone") for _, critic in found.values())
        assert len(found) == len(lines) == 150
        return found

    assert losses("killed") == losses("whole")
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert all(torch.equal(killed["module"][name], tensor) for name, tensor in whole["module"].items())
    if kind == "followed":
        torch.testing.assert_close(killed["critic"], whole["critic"], atol=0, rtol=0)
        assert killed["critic"].keys() == {"module", "optimizer"}
    pairs = zip(killed["average"]["shadow_params"], whole["average"]["shadow_params"], strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()) == [
        "step_000145.pt",
        "step_000150.pt",
    ]
