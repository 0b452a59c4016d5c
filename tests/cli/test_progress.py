"""Bars in a terminal, lines elsewhere, nothing when quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from swifti2v.cli import progress

if TYPE_CHECKING:
    import pytest


def test_bars_show_each_piece_of_work_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **_: Console(force_terminal=True, width=100))
    with progress.progress_bars(quiet=False) as show:
        assert show is not None
        show("a [b]", 1, None)
        show("a [b]", 4, 4)
        show("stage", 2, 8, label="Stage II 1/4")
    out = capsys.readouterr().out
    assert all(text in out for text in ("a [b]", "4/4", "Stage II 1/4", "2/8"))


def test_lines_come_at_every_tenth_of_a_phase(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bars(quiet=False) as show:  # pytest's standard error is no terminal
        assert show is not None
        for done in range(401):
            show("stage_one", done, 400, label="Stage I")
            if done % 100 == 0:
                show("frames", 1 + done // 100, None)
        show("stage_one", 3, 400)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.replace("\n", "").isprintable(), "no control characters"
    lines = captured.err.splitlines()
    wanted = [f"Stage I: {10 * tenth}% ({40 * tenth} of 400), 0 s" for tenth in range(11)]
    assert [line for line in lines if line.startswith("Stage")] == wanted
    assert [line for line in lines if line.startswith("frames")] == ["frames: 1, 0 s"]


def test_nothing_is_said_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bars(quiet=True) as show:
        assert show is None
    assert capsys.readouterr().err == ""
