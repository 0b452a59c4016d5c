"""The cache: what is in it, killed builds, processes that build together, memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import safetensors
import torch

from swifti2v.data import shards as shard_files
from swifti2v.data.batches import BucketBatches
from swifti2v.data.clips import Clip, ClipRequest, read_clips
from swifti2v.data.latent_cache import CacheOptions, CacheProgress, LatentCache
from swifti2v.errors import InvalidInputError, LatentCacheError
from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8
from swifti2v.wan.streaming import open_codec
from tests.data.cache_building import FINGERPRINT, Counting, build, contents, encode, shards

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKLWan


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Forked children must not wait for threads of torch that they do not have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class TestContents:
    @pytest.mark.parametrize("reader_threads", [0, 1, 3])
    def test_every_clip_as_it_was_encoded(
        self, tmp_path: Path, requests: list[ClipRequest], reader_threads: int
    ) -> None:
        build(requests, tmp_path, options=CacheOptions(reader_threads=reader_threads, max_shard_samples=3))
        cache = LatentCache.open(tmp_path, fingerprint=FINGERPRINT)
        assert len(cache) == 10
        assert cache.fingerprint == FINGERPRINT
        found = contents(cache)
        for request in requests:
            prompt, bucket, tensors = found[request.name]
            number = int(request.name[0])
            levels = [20 + 60 * number + request.first_frame + place for place in range(request.num_frames)]
            assert (prompt, bucket) == ("x" * (number + 1), f"48x32x{request.num_frames}")
            assert tensors["latents"] == [[[[float(level)]] for level in levels]] * 3
            assert tensors["prompt_embeds"] == [[number + 1.0] * 3] * 2
        assert [cache[index].name for index in range(10)] == sorted(found)

    def test_buckets_never_mix_shapes(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        cache = build(requests, tmp_path)
        assert {name: len(indices) for name, indices in cache.buckets.items()} == {"48x32x5": 9, "48x32x9": 1}
        batches = BucketBatches(cache, 4, 0)
        for step in range(batches.batches_per_epoch):
            torch.stack([cache[index].tensors["latents"] for index in batches.batch_of(step)])

    def test_safetensors_reads_the_shards(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        build(requests[:1], tmp_path, encode=lambda clip: {"reference.0": torch.ones(2, 3, dtype=torch.bfloat16)})
        (path,) = (tmp_path / "shards").iterdir()
        with safetensors.safe_open(path, "pt") as file:
            assert list(file.keys()) == ["0/reference.0"]
            assert json.loads(file.metadata()["samples"])[0]["name"] == "0.mkv@0"
        assert LatentCache.open(tmp_path)[0].tensors["reference.0"].dtype == torch.bfloat16

    def test_only_what_is_asked_for_is_read(
        self, tmp_path: Path, requests: list[ClipRequest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A step reads one reference of many; names cost nothing, and a lost shard is noticed at once."""
        build(requests, tmp_path)
        read: list[str] = []

        class Noted:
            def __init__(self, path: Path, framework: str) -> None:
                self._file = safetensors.safe_open(path, framework)

            def keys(self) -> list[str]:
                return self._file.keys()

            def get_tensor(self, name: str) -> torch.Tensor:
                read.append(name.partition("/")[2])
                return self._file.get_tensor(name)

        monkeypatch.setattr(shard_files, "safe_open", Noted)
        cache = LatentCache.open(tmp_path)
        sample = cache[0]
        assert "latents" in sample.tensors
        assert "reference.9" not in sample.tensors
        assert len(list(sample.tensors)) == len(sample.tensors) > 1
        assert read == []
        assert sample.tensors["latents"].shape[0] == 3
        assert read == ["latents"]
        with pytest.raises(KeyError):
            sample.tensors["reference.9"]
        for path in (tmp_path / "shards").iterdir():
            path.unlink()
        with pytest.raises(LatentCacheError, match="missing or damaged"):
            cache[0]

    def test_progress(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        seen: list[CacheProgress] = []
        build(requests, tmp_path, on_progress=seen.append)
        assert [(item.done, item.skipped, item.total) for item in seen] == [(done, 0, 10) for done in range(1, 11)]
        assert {item.name for item in seen} == {request.name for request in requests}

    @pytest.mark.parametrize(("samples", "num_bytes", "expected"), [(3, 10**9, 4), (100, 150, 5), (100, 1, 10)])
    def test_limits_of_a_shard(
        self, tmp_path: Path, requests: list[ClipRequest], samples: int, num_bytes: int, expected: int
    ) -> None:
        """A sample takes 5 x 3 x 4 + 24 = 84 bytes, one 132."""
        options = CacheOptions(max_shard_samples=samples, max_shard_bytes=num_bytes, reader_threads=0)
        build(requests, tmp_path, options=options)
        assert len(shards(tmp_path)) == expected


class TestClipsThatFail:
    def test_a_video_that_cannot_be_read_is_counted(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        broken = tmp_path / "broken.mp4"
        broken.write_bytes(b"no video")
        bad = ClipRequest("broken.mp4@0", broken, "x", 0, 5, 16.0, Size(48, 32))
        cache = build([*requests[:2], bad], tmp_path / "cache")
        assert len(cache) == 2
        assert [(item.name, item.reason) for item in cache.skipped] == [("broken.mp4@0", "damaged")]
        assert cache.num_missing == 0
        assert LatentCache.open(tmp_path / "cache", fingerprint=FINGERPRINT).skipped == cache.skipped

    def test_what_is_not_finite_is_counted(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        def failing(clip: Clip) -> dict[str, torch.Tensor]:
            return {"latents": encode(clip)["latents"] / (0.0 if clip.name == "1.mkv@5" else 1.0)}

        cache = build(requests, tmp_path, encode=failing)
        assert len(cache) == 9
        assert [(item.name, item.reason) for item in cache.skipped] == [("1.mkv@5", "not finite")]

    def test_another_shape_in_a_bucket(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        def ragged(clip: Clip) -> dict[str, torch.Tensor]:
            return {"prompt_embeds": torch.zeros(len(clip.prompt), 4)}

        with pytest.raises(LatentCacheError, match="let the encoder pad them"):
            build(requests, tmp_path, encode=ragged)

    def test_nothing_or_names_twice(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        with pytest.raises(InvalidInputError, match="no clips"):
            build([], tmp_path)
        with pytest.raises(InvalidInputError, match="two clips have the name"):
            build([requests[0], requests[0]], tmp_path)
        with pytest.raises(InvalidInputError):
            CacheOptions(rank=2, world_size=2)
        with pytest.raises(InvalidInputError):
            CacheOptions(max_shard_samples=0)


class TestResume:
    @pytest.mark.parametrize(("at", "reader_threads"), [(0, 0), (1, 1), (5, 0), (9, 1)])
    def test_an_encoder_that_fails(
        self, tmp_path: Path, requests: list[ClipRequest], at: int, reader_threads: int
    ) -> None:
        def fail() -> None:
            raise RuntimeError("out of memory")

        first = Counting(at, fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            build(
                requests,
                tmp_path,
                encode=first,
                options=CacheOptions(reader_threads=reader_threads, max_shard_samples=2),
            )
        kept = shards(tmp_path)
        second = Counting()
        cache = build(requests, tmp_path, encode=second)
        assert len(second.names) == 10 - 2 * (at // 2)  # a shard holds 2: the one in the making is all that is lost
        assert set(second.names) & set(first.names) == set(first.names[2 * (at // 2) :])
        assert kept.items() <= shards(tmp_path).items()
        assert contents(cache) == contents(build(requests, tmp_path / "whole"))

    @pytest.mark.parametrize("at", [3, 8])
    def test_a_process_that_is_killed(self, tmp_path: Path, requests: list[ClipRequest], at: int) -> None:
        process = multiprocessing.get_context("fork").Process(
            target=build,
            args=(requests, tmp_path),
            kwargs={"encode": Counting(at, lambda: os.kill(os.getpid(), signal.SIGKILL))},
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        with pytest.raises(LatentCacheError, match="no finished latent cache"):
            LatentCache.open(tmp_path)
        again = Counting()
        cache = build(requests, tmp_path, encode=again)
        assert len(again.names) == 10 - 2 * (at // 2)
        assert contents(cache) == contents(build(requests, tmp_path / "whole"))

    def test_killed_while_a_file_is_written(
        self, tmp_path: Path, requests: list[ClipRequest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Half a file stands beside its name, as a power failure leaves it."""
        build(requests[:4], tmp_path)
        (tmp_path / "shards" / ".0123.safetensors.rank0of1.part").write_bytes(b"half")
        (tmp_path / "index.json").unlink()
        again = Counting()
        assert len(build(requests, tmp_path, encode=again)) == 10
        assert len(again.names) == 6
        assert not list((tmp_path / "shards").glob(".*"))

    def test_a_finished_cache_is_not_made_again(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        build(requests, tmp_path)
        before = shards(tmp_path)
        again = Counting()
        assert len(build(requests, tmp_path, encode=again)) == 10
        assert again.names == []
        assert shards(tmp_path) == before

    def test_more_data_and_changed_captions(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        from dataclasses import replace

        build(requests[:5], tmp_path)
        changed = [replace(requests[0], prompt="another"), *requests[1:4], *requests[5:]]
        again = Counting()
        cache = build(changed, tmp_path, encode=again)
        assert sorted(again.names) == sorted([requests[0].name, *(item.name for item in requests[5:])])
        found = contents(cache)
        assert set(found) == {item.name for item in changed}
        assert found[requests[0].name][0] == "another"

    def test_a_changed_video_is_made_again(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        import shutil

        copy = Path(shutil.copy(requests[0].path, tmp_path / "copy.mkv"))
        request = ClipRequest("copy.mkv@0", copy, "x", 0, 5, 16.0, Size(48, 32))
        old = contents(build([request], tmp_path / "cache"))
        shutil.copy(requests[-1].path, copy)
        again = Counting()
        new = contents(build([request], tmp_path / "cache", encode=again))
        assert again.names == ["copy.mkv@0"]
        assert new != old


class TestProcesses:
    def test_ranks_make_one_cache(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(
                target=build,
                args=(requests, tmp_path / "shared"),
                kwargs={"options": CacheOptions(rank=rank, world_size=3, max_shard_samples=2, reader_threads=0)},
            )
            for rank in range(3)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        shared = LatentCache.open(tmp_path / "shared", fingerprint=FINGERPRINT)
        assert contents(shared) == contents(build(requests, tmp_path / "alone"))

    def test_ranks_divide_the_clips(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        counted = [Counting(), Counting()]
        for rank, encoder in enumerate(counted):
            options = CacheOptions(rank=rank, world_size=2, reader_threads=0)
            cache = build(requests, tmp_path, encode=encoder, options=options)
            if rank == 0:
                assert cache.num_missing == 10 - len(encoder.names) > 0
                with pytest.raises(LatentCacheError, match=f"lacks {cache.num_missing} clips"):
                    LatentCache.open(tmp_path)
        assert sorted(counted[0].names + counted[1].names) == sorted(request.name for request in requests)
        assert len(LatentCache.open(tmp_path)) == 10

    def test_another_number_of_processes_goes_on(self, tmp_path: Path, requests: list[ClipRequest]) -> None:
        first, rest = Counting(), Counting()
        build(requests, tmp_path, encode=first, options=CacheOptions(rank=1, world_size=3))
        assert len(build(requests, tmp_path, encode=rest)) == 10
        assert not set(first.names) & set(rest.names)

    def test_an_index_written_meanwhile_is_not_lost(
        self, tmp_path: Path, requests: list[ClipRequest], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process ends between our look at the shards and our index: the index must hold both."""
        from swifti2v.data import cache_index

        real, calls = cache_index.write_atomically, iter([True])

        def slow(path: Path, content: bytes, *, writer: str = "") -> None:
            if path.name == "index.json" and writer == "rank0of2" and next(calls, False):
                build(requests, tmp_path, options=CacheOptions(rank=1, world_size=2))
            real(path, content, writer=writer)

        monkeypatch.setattr(cache_index, "write_atomically", slow)
        build(requests, tmp_path, options=CacheOptions(rank=0, world_size=2))
        assert len(LatentCache.open(tmp_path)) == 10


def test_one_clip_for_the_encoder_and_one_for_each_reader(
    tmp_path: Path, requests: list[ClipRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the arrays that `read_clips` makes and that are still alive while a clip is encoded."""
    import time
    import weakref

    from swifti2v.data import clips

    alive: list[weakref.ref[Any]] = []
    real = clips._empty_frames

    def counted(request: ClipRequest) -> Any:
        frames = real(request)
        alive.append(weakref.ref(frames))
        return frames

    monkeypatch.setattr(clips, "_empty_frames", counted)
    apart = [request for request in requests if request.num_frames == 5]
    most: list[int] = []

    def slow(clip: Clip) -> dict[str, torch.Tensor]:
        time.sleep(0.05)
        most.append(sum(reference() is not None for reference in alive))
        return encode(clip)

    for reader_threads in (0, 1, 2):
        most.clear()
        build(apart, tmp_path / str(reader_threads), encode=slow, options=CacheOptions(reader_threads=reader_threads))
        assert max(most) <= 1 + reader_threads
    assert len(alive) == 27


def test_latents_of_a_codec_are_those_of_diffusers(
    tmp_path: Path, requests: list[ClipRequest], tiny_vae22: AutoencoderKLWan
) -> None:
    """Streamed into the cache, against diffusers' own encoding of the whole clip (mean 0, std 1)."""
    codec = open_codec(tiny_vae22)

    @torch.no_grad()
    def stream(clip: Clip) -> dict[str, torch.Tensor]:
        chunks = from_uint8(clip.frames).split([1] + [4] * (len(clip.frames) // 4), dim=2)
        return {"latents": torch.cat(list(codec.encode_stream(chunks)), dim=2)[0]}

    cache = build(requests[-2:], tmp_path, encode=stream)
    for sample in cache:
        (request,) = (request for request in requests if request.name == sample.name)
        (clip,) = read_clips([request])
        assert isinstance(clip, Clip)
        with torch.no_grad():
            whole = tiny_vae22.encode(from_uint8(clip.frames)).latent_dist.mode()[0]
        assert sample.tensors["latents"].shape == (48, (request.num_frames - 1) // 4 + 1, 2, 3)
        torch.testing.assert_close(sample.tensors["latents"], whole, atol=1e-5, rtol=1e-5)
