"""What is wrong with a cache: stale, damaged, foreign; and what is wrong with the disk."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.data.latent_cache import LatentCache
from swifti2v.errors import LatentCacheError, OutputError
from swifti2v.media import atomic_files
from tests.data.cache_building import DESCRIPTION, Counting, build, shards

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.data.clips import ClipRequest


class TestStaleAndDamaged:
    @pytest.mark.parametrize(
        ("other", "words"),
        [
            ({"codec": "c2", "settings": {"dtype": "float32"}}, 'codec ("c1", now "c2")'),
            ({"codec": "c1", "settings": {"dtype": "bf16"}}, 'settings.dtype ("float32", now "bf16")'),
            ({}, 'codec ("c1", now not set)'),
        ],
    )
    def test_a_stale_cache_is_refused_and_says_what_differs(
        self, tmp_path: Path, requests: list[ClipRequest], other: dict[str, Any], words: str
    ) -> None:
        build(requests[:2], tmp_path)
        for act in (
            lambda: LatentCache.open(tmp_path, description=other),
            lambda: build(requests[:2], tmp_path, description=other),
        ):
            with pytest.raises(LatentCacheError, match="is stale") as caught:
                act()
            assert words in str(caught.value)

    def test_changed_captions_are_noticed_where_asked_and_made_anew(
        self, tmp_path: Path, requests: list[ClipRequest]
    ) -> None:
        build(requests, tmp_path)
        changed = [replace(requests[0], prompt="another"), *requests[1:]]
        LatentCache.open(tmp_path, description=DESCRIPTION, clips=requests)
        with pytest.raises(LatentCacheError, match="is stale"):
            LatentCache.open(tmp_path, description=DESCRIPTION, clips=changed)
        again = Counting()
        build(changed, tmp_path, encode=again)
        assert again.names == [requests[0].name]  # what did not change is kept
        LatentCache.open(tmp_path, clips=changed)

    def test_no_cache(self, tmp_path: Path) -> None:
        with pytest.raises(LatentCacheError, match="no finished latent cache"):
            LatentCache.open(tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "text", "missing"])
    def test_a_damaged_shard(self, tmp_path: Path, requests: list[ClipRequest], damage: str) -> None:
        cache = build(requests, tmp_path)
        path = tmp_path / "shards" / cache._records[0].shard
        content = path.read_bytes()
        if damage == "missing":
            path.unlink()
            with pytest.raises(LatentCacheError, match="lacks 1 shards"):
                LatentCache.open(tmp_path)
        else:
            path.write_bytes(content[:-20] if damage == "truncated" else b"text" * 50)
            with pytest.raises(LatentCacheError, match="missing or damaged; remove it"):
                build(requests, tmp_path)
        with pytest.raises(LatentCacheError, match="missing or damaged"):
            cache[0]
        path.unlink(missing_ok=True)
        again = Counting()
        assert len(build(requests, tmp_path, encode=again)) == 10
        assert len(again.names) == 2

    @pytest.mark.parametrize(
        ("content", "words"),
        [("{", "is damaged"), ("[]", "is damaged"), ('{"format": 2}', "is damaged"), ('{"format": 1}', "format 1")],
    )  # fmt: skip
    def test_a_damaged_index(self, tmp_path: Path, requests: list[ClipRequest], content: str, words: str) -> None:
        build(requests[:2], tmp_path)
        (tmp_path / "index.json").write_text(content)
        with pytest.raises(LatentCacheError, match=words):
            LatentCache.open(tmp_path)
        again = Counting()
        assert len(build(requests[:2], tmp_path, encode=again)) == 2
        assert again.names == []

    def test_a_foreign_shard(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        from safetensors.torch import save_file

        build(requests[:2], tmp_path)
        save_file({"a": torch.ones(1)}, tmp_path / "shards" / "zz.safetensors")
        with pytest.raises(LatentCacheError, match="is no shard of a latent cache"):
            build(requests[:2], tmp_path)


class TestFullDisk:
    def test_one_line_and_nothing_lost(
        self, tmp_path: Path, requests: list[ClipRequest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, written = os.fsync, iter(range(100))

        def full(descriptor: int) -> None:
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)  # folders are flushed too, for the names in them
            if is_file and next(written) >= 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(atomic_files.os, "fsync", full)
        with pytest.raises(OutputError) as caught:
            build(requests, tmp_path)
        assert "No space left on device" in str(caught.value)
        assert "free some space and run again" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob(".*"))
        assert len(shards(tmp_path)) == 2
        monkeypatch.undo()
        again = Counting()
        assert len(build(requests, tmp_path, encode=again)) == 10
        assert len(again.names) == 6

    def test_a_file_in_the_way(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(OutputError, match="cannot be made"):
            build(requests, tmp_path / "cache")

    def test_an_older_file_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        atomic_files.write_atomically(tmp_path / "a", b"old")

        def refuse(_descriptor: int) -> None:
            raise OSError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(atomic_files.os, "fsync", refuse)
        with pytest.raises(OutputError, match="Permission denied"):
            atomic_files.write_atomically(tmp_path / "a", b"new")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]
