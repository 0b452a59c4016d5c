"""The same networks, run faster: the same numbers; and what is not there is refused with a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.runner.acceleration import (
    Acceleration,
    accelerated,
    check_shared,
    compile_blocks,
    share_sequence,
)
from swifti2v.runner.ahead import made_ahead
from swifti2v.runner.loading import load_parts
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROCESS = Path(__file__).with_name("sharing_process.py")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InvalidInputError, match="attention 'quick' is not known; use auto, native"):
        Acceleration(attention="quick")
    with pytest.raises(InvalidInputError, match="quantization 'int2' is not known; use none, float8 or int8"):
        Acceleration(quantization="int2")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="num_processes is 0"):
        Acceleration(num_processes=0)


def test_parts_are_set_up_as_asked(tiny_checkpoint: Path) -> None:
    parts = load_parts(tiny_checkpoint, device="cpu")
    assert (parts.overlap, accelerated(parts, Acceleration(overlap=False)).overlap) == ("decode", "none")
    assert len(parts.transformers) == 3
    with pytest.raises(InvalidInputError, match="2 processes are to share the work and 1 are there; start them with"):
        accelerated(parts, Acceleration(num_processes=2))


def test_heads_that_do_not_divide(tiny_wan_dit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    with pytest.raises(InvalidInputError, match="2 heads of attention do not divide among 3 processes"):
        share_sequence([tiny_wan_dit()], 3)


def test_runs_that_do_not_divide_are_refused_before_they_begin(tiny_checkpoint: Path) -> None:
    """Of 64x64, Stage I has one token a frame and three frames; of 128x64 twice as many."""
    parts = load_parts(tiny_checkpoint, device="cpu")
    wide = {"size": Size(128, 64)}
    check_shared(parts, parts.defaults, 1)
    check_shared(parts, parts.defaults.settled(wide), 2)
    with pytest.raises(InvalidInputError, match="3 tokens of a window do not divide among 2 processes"):
        check_shared(parts, parts.defaults, 2)
    kept = parts.defaults.settled(wide | {"keep_context": True})
    check_shared(parts, kept, 1)
    with pytest.raises(InvalidInputError, match="start one process"):
        check_shared(parts, kept, 2)


@pytest.mark.slow
def test_two_processes_that_share_a_sequence_get_the_latents_of_one(tmp_path: Path) -> None:
    command = [sys.executable, str(PROCESS)]
    processes = [
        subprocess.Popen(  # noqa: S603 - our own script
            [*command, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        found = json.loads(output.splitlines()[-1])
        assert found["scale"] > 0.1
        assert len(found["differences"]) == 4
        assert max(found["differences"]) <= 1e-5 * found["scale"]
        assert "9 tokens of a window do not divide among 2 processes" in found["refusal"]


@pytest.mark.slow
def test_compiled_blocks_give_the_eager_output_for_every_length_of_window(tiny_wan_dit: Callable[..., Any]) -> None:
    """Traced to graphs without breaks and run as they are; code generation is the compiler's own matter."""
    network = StageTwoTransformer.from_wan(tiny_wan_dit()).eval()
    text = torch.randn(1, 5, 32)
    windows = {frames: torch.randn(1, 48, frames, 4, 6) for frames in (4, 5, 3)}

    def run(frames: int) -> torch.Tensor:
        return network(windows[frames], torch.tensor([[0.0] + [500.0] * (frames - 1)]), text).sample

    with torch.no_grad():
        expected = {frames: run(frames) for frames in windows}
        torch._dynamo.reset()
        compile_blocks([network], backend="aot_eager")
        with network.text_kept():
            for frames in (4, 5, 5, 3):
                torch.testing.assert_close(run(frames), expected[frames], rtol=1e-5, atol=1e-6)
    counts = torch._dynamo.utils.counters
    assert counts["stats"]["unique_graphs"] >= 3
    assert not counts["graph_break"]


@pytest.mark.slow
def test_a_clip_takes_three_graphs_and_later_sizes_are_compiled_too(tiny_wan_dit: Callable[..., Any]) -> None:
    """The windows of 81 frames: the first (which reads the text once), the middle ones, and one like the first."""
    network = StageTwoTransformer.from_wan(tiny_wan_dit(num_layers=1)).eval()
    text = torch.randn(1, 5, 32)
    torch._dynamo.reset()
    compile_blocks([network], backend="eager")
    counts = torch._dynamo.utils.counters
    before = counts["stats"]["unique_graphs"]

    def graphs_after_a_clip(width: int) -> int:
        def produce() -> Iterator[torch.Tensor]:
            with network.text_kept():
                for frames in (4, 5, 5, 5, 5, 5, 4):
                    for _step in range(2):
                        timestep = torch.tensor([[0.0] + [500.0] * (frames - 1)])
                        yield network(torch.randn(1, 48, frames, 4, width), timestep, text).sample

        # In the thread where Stage II works beside the decoder.
        for _ in made_ahead(produce(), device=torch.device("cpu")):
            pass
        return int(counts["stats"]["unique_graphs"]) - before

    # PyTorch gives up at 8 unless it is told otherwise.
    assert [graphs_after_a_clip(width) for width in (4, 4, 6, 8)] == [3, 3, 6, 9]
