"""Bars: one for each piece of work, and none where nobody would see them."""

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
    assert "a [b]" in out
    assert "4/4" in out
    assert "Stage II 1/4" in out
    assert "2/8" in out


def test_no_bars_when_quiet_or_without_a_terminal() -> None:
    with progress.progress_bars(quiet=True) as show:
        assert show is None
    with progress.progress_bars(quiet=False) as show:  # pytest's standard error is no terminal
        assert show is None
