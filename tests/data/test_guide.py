"""The Python of docs/guides/data.md runs as it is written, at a smaller size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from swifti2v.data.latent_cache import LatentCache
from swifti2v.data.report import Reason

if TYPE_CHECKING:
    import pytest

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")


def test_the_code_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_video: Any, moving: Any) -> None:
    (tmp_path / "videos").mkdir()
    for seed in range(3):
        write_video(tmp_path / "videos" / f"{seed}.mp4", moving(24, seed=seed, width=160, height=128))
        (tmp_path / "videos" / f"{seed}.txt").write_text(f"prompt {seed}")
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    small = code.replace("1280, 704", "128, 96").replace("=81", "=17")
    assert small.count("=17") == 2
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(small, "data.md", "exec"), names)  # noqa: S102 - our own guide
    cache = LatentCache.open(tmp_path / "cache")
    assert [sample.prompt for sample in cache] == ["prompt 0", "prompt 1", "prompt 2"]
    assert names["latents"].shape[2:] == torch.Size((17, 6, 8))


def test_every_reason_is_explained() -> None:
    table = GUIDE[GUIDE.index("| reason |") :].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()]
    assert set(re.findall(r"`([a-z ]+)`", " ".join(first_cells))) == set(get_args(Reason))
