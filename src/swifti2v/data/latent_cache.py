"""Latents on disk: encoded once, read at every step, refused when they no longer fit.

```
cache/
  index.json                  samples, buckets, description: written last, and again by every process that ends
  shards/<hash>.safetensors   some samples each; whole or not there
  skipped/<process>.json      clips that could not be read or encoded
```
Building goes on where it was stopped: finished shards are kept, and what is lost is the shard that was being made. A
clip whose file or caption changed is made anew; a cache of another codec or other settings is refused
(`description.py`). Processes with `rank` of `world_size` divide the videos among themselves and write into one folder
without locks.

Memory: a process holds the clip that is being encoded, one for each reader thread (clips of one video that overlap are
read together, and count each), and the tensors of a shard in the making, which are copied once as it is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from swifti2v.data.clips import Clip, ClipRequest, read_clips
from swifti2v.data.description import Description, differences, sample_hashes
from swifti2v.data.prefetch import prefetched
from swifti2v.data.report import Skipped
from swifti2v.data.shards import (
    SHARD_FOLDER,
    FreshSample,
    SampleRecord,
    StoredTensors,
    read_records,
    shard_paths,
    write_shard,
)
from swifti2v.errors import InvalidInputError, LatentCacheError
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from swifti2v.data.description import SourceCheck

INDEX_NAME = "index.json"
SKIPPED_FOLDER = "skipped"
FORMAT = 2

Encode = Callable[[Clip], dict[str, "Tensor"]]
"""What makes the tensors of a clip: of the same names and shapes for every clip of a bucket."""


@dataclass(frozen=True)
class CachedSample:
    """A sample as it was encoded.

    `tensors` are on the CPU, in the types that the encoder gave them; each is read when it is asked for.
    """

    name: str
    prompt: str
    bucket: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class CacheOptions:
    """How a cache is built; nothing here changes what is in it.

    Args:
        rank: of this process, from 0.
        world_size: number of processes that divide the videos.
        reader_threads: threads that read clips ahead of the encoder; 0 reads between encodings.
        max_shard_samples: a shard is written when it holds so many samples,
        max_shard_bytes: or so many bytes; this much is lost at most when the process is stopped.
        source_check: how a source file that changed is noticed.
    """

    rank: int = 0
    world_size: int = 1
    reader_threads: int = 1
    max_shard_samples: int = 16
    max_shard_bytes: int = 256 << 20
    source_check: SourceCheck = "mtime"

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` for a rank that does not exist or a limit that is not positive."""
        if not 0 <= self.rank < self.world_size:
            msg = f"rank {self.rank} is none of {self.world_size} processes; count from 0"
            raise InvalidInputError(msg)
        if min(self.max_shard_samples, self.max_shard_bytes) < 1 or self.reader_threads < 0:
            msg = "limits of a shard must be above 0, and reader_threads 0 or more"
            raise InvalidInputError(msg)


@dataclass(frozen=True)
class CacheProgress:
    """How far this process is.

    Args:
        done: clips that are encoded, those of earlier runs included.
        skipped: clips that could not be.
        total: clips that are this process's.
        name: of the last clip.
    """

    done: int
    skipped: int
    total: int
    name: str


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds.

    Args:
        description: what decided its tensors.
        num_missing: clips that were asked for and are neither in the cache nor skipped: another process has them yet
            to make, or was stopped.
        samples: by name.
        skipped: clips that could not be read or encoded.
    """

    description: Description
    num_missing: int
    samples: tuple[SampleRecord, ...]
    skipped: tuple[Skipped, ...]


class LatentCache:
    """A cache that is read: a sequence of samples, sorted by name.

    Attributes:
        folder: where it lies.
        description: what decided its tensors.
        skipped: clips that could not be read or encoded.
        num_missing: clips still to be made, by another process or the next run; 0 unless `allow_incomplete`.
    """

    def __init__(self, folder: Path, index: CacheIndex) -> None:
        self.folder = folder
        self.description = index.description
        self.skipped = index.skipped
        self.num_missing = index.num_missing
        self._records = index.samples
        buckets: dict[str, list[int]] = {}
        for place, record in enumerate(index.samples):
            buckets.setdefault(record.bucket, []).append(place)
        self._buckets = {name: tuple(places) for name, places in sorted(buckets.items())}

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        description: Description | None = None,
        clips: Iterable[ClipRequest] | None = None,
        allow_incomplete: bool = False,
    ) -> LatentCache:
        """Open a cache.

        Args:
            folder: of the cache.
            description: what must have decided its tensors; None takes whatever is there.
            clips: whose captions and files must be those that were encoded; None: they are not looked at.
            allow_incomplete: open it although clips are missing.

        Raises:
            LatentCacheError: there is none, it is stale (the message names what differs), incomplete or damaged.
        """
        index = read_index(folder)
        if description is not None:
            _refuse_stale(folder, description, index.description)
        if clips is not None:
            hashes = sample_hashes(index.description, clips)
            changed = [each.name for each in index.samples if hashes.get(each.name, each.hash) != each.hash]
            if changed:
                msg = (
                    f"the latent cache {str(folder)!r} is stale: {len(changed)} clips have another file or caption, "
                    f"{changed[0]} for one; build it again: only these are made anew"
                )
                raise LatentCacheError(msg)
        if index.num_missing and not allow_incomplete:
            msg = f"the latent cache {str(folder)!r} lacks {index.num_missing} clips; build it again, and it goes on"
            raise LatentCacheError(msg)
        return cls(folder, index)

    @property
    def buckets(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the samples of each bucket; within one, tensors have the same names and shapes."""
        return self._buckets

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._records)

    def __getitem__(self, index: int) -> CachedSample:
        """Return a sample, whose tensors are read one by one; raise `LatentCacheError` if its shard is damaged."""
        record = self._records[index]
        return CachedSample(record.name, record.prompt, record.bucket, StoredTensors(self.folder, record))


def build_cache(
    clips: Iterable[ClipRequest],
    folder: Path,
    *,
    encode: Encode,
    description: Description,
    options: CacheOptions | None = None,
    on_progress: Callable[[CacheProgress], None] | None = None,
) -> LatentCache:
    """Encode the clips that the cache does not hold yet, and return it.

    A clip that cannot be read, or whose tensors are not finite, is skipped and counted. What `encode` raises ends the
    build; finished shards stay.

    Args:
        clips: all of them, on every rank; this process makes its share.
        folder: of the cache; made if it does not exist.
        encode: makes the tensors of a clip; called in this thread, one clip at a time.
        description: all that decides the tensors beside the clips themselves: plain data, with a digest of the codec.
        options: see there.
        on_progress: called after every clip.

    Returns:
        The cache as it is when this process ends; others may still be at work (`LatentCache.num_missing`).

    Raises:
        InvalidInputError: no clips, or two of one name.
        LatentCacheError: the folder holds a cache of another codec or with other settings, or a damaged shard; or the
            tensors of two clips of a bucket differ in shape.
        OutputError: the cache cannot be written: the disk is full, for instance. Run again to go on.
    """
    options = options or CacheOptions()
    requests = _checked(clips)
    for name in (SHARD_FOLDER, SKIPPED_FOLDER):
        make_folder(folder / name)
    description = json.loads(json.dumps(description))  # as it is read back
    hashes = sample_hashes(description, requests, options.source_check)
    finished = _finished_records(folder, hashes, description)
    writer = f"rank{options.rank}of{options.world_size}"
    for leftover in (folder / SHARD_FOLDER).glob(f".*{writer}.part"):
        leftover.unlink(missing_ok=True)
    share = _share(requests, options)
    shards = _ShardWriter(folder, hashes, finished, description=description, options=options, writer=writer)
    _encode_share(share, finished, shards, encode=encode, on_progress=on_progress or _ignore)
    _write_skipped(folder, shards.skipped, writer)
    write_index(folder, hashes, description=description, writer=writer)
    return LatentCache.open(folder, description=description, allow_incomplete=True)


def _checked(clips: Iterable[ClipRequest]) -> list[ClipRequest]:
    requests = list(clips)
    if not requests:
        msg = "there are no clips to cache; see which are usable with `swifti2v data check`"
        raise InvalidInputError(msg)
    names: set[str] = set()
    for request in requests:
        if request.name in names:
            msg = f"two clips have the name {request.name!r}; names tell samples apart, make them differ"
            raise InvalidInputError(msg)
        names.add(request.name)
    return requests


def _share(requests: list[ClipRequest], options: CacheOptions) -> list[list[ClipRequest]]:
    """Return this process's clips, those of one video together, because a video is read in one pass."""
    by_path = sorted(requests, key=lambda request: (str(request.path), request.fps))
    videos = [list(group) for _, group in groupby(by_path, key=lambda request: (request.path, request.fps))]
    return videos[options.rank :: options.world_size]


def _encode_share(
    share: list[list[ClipRequest]],
    finished: Mapping[str, SampleRecord],
    shards: _ShardWriter,
    *,
    encode: Encode,
    on_progress: Callable[[CacheProgress], None],
) -> None:
    total = sum(len(video) for video in share)
    left = [[request for request in video if request.name not in finished] for video in share]
    done = total - sum(len(video) for video in left)
    jobs = (partial(read_clips, video) for video in left if video)
    with closing(prefetched(jobs, num_threads=shards.options.reader_threads)) as clips:
        for item in clips:
            if isinstance(item, Skipped):
                shards.skip(item)
            elif shards.add(item, encode(item)):
                done += 1
            on_progress(CacheProgress(done, len(shards.skipped), total, item.name))
            del item  # or it would stay in memory while the next is waited for
    shards.flush()


class _ShardWriter:
    """Gathers encoded samples and writes a shard whenever there are enough."""

    def __init__(
        self,
        folder: Path,
        hashes: Mapping[str, str],
        finished: Mapping[str, SampleRecord],
        *,
        description: Description,
        options: CacheOptions,
        writer: str,
    ) -> None:
        self.options = options
        self.skipped: list[Skipped] = []
        self._folder = folder
        self._hashes = hashes
        self._description = description
        self._writer = writer
        self._samples: list[FreshSample] = []
        # One of each bucket: what a sample's tensors must look like.
        self._examples = {record.bucket: record for record in finished.values()}

    def skip(self, item: Skipped) -> None:
        self.skipped.append(item)

    def add(self, clip: Clip, tensors: dict[str, Tensor]) -> bool:
        """Take a sample; return False if it is of no use."""
        kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        bad = [name for name, tensor in kept.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            self.skip(Skipped(clip.name, "not finite", f"the encoder made NaN or infinity in {', '.join(bad)}"))
            return False
        sample = FreshSample(clip.name, clip.prompt, clip.bucket, self._hashes[clip.name], kept)
        self._check(sample)
        self._samples.append(sample)
        num_bytes = sum(sample.num_bytes for sample in self._samples)
        if len(self._samples) >= self.options.max_shard_samples or num_bytes >= self.options.max_shard_bytes:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what there is."""
        if self._samples:
            write_shard(self._folder, self._samples, description=self._description, writer=self._writer)
            self._samples = []

    def _check(self, sample: FreshSample) -> None:
        shapes = {name: list(tensor.shape) for name, tensor in sample.tensors.items()}
        record = SampleRecord(sample.name, sample.prompt, sample.bucket, sample.hash, shapes, "", 0)
        _check_shapes([self._examples.setdefault(sample.bucket, record), record])


def _ignore(_progress: CacheProgress) -> None:
    """Report to nobody."""


def read_index(folder: Path) -> CacheIndex:
    """Read the index of a cache.

    Raises:
        LatentCacheError: there is none, it is damaged or of another format, or a shard that it names is missing.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        msg = (
            f"{str(folder)!r} holds no finished latent cache ({INDEX_NAME} is missing); build it, or let it be finished"
        )
        raise LatentCacheError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            msg = f"{str(path)!r} is of format {content['format']}, not {FORMAT}; build the cache in another folder"
            raise LatentCacheError(msg)
        index = CacheIndex(
            description=content["description"],
            num_missing=content["num_missing"],
            samples=tuple(SampleRecord(**record) for record in content["samples"]),
            skipped=tuple(Skipped(**item) for item in content["skipped"]),
        )
    except LatentCacheError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{str(path)!r} is damaged; remove it and build the cache again: its shards are kept"
        raise LatentCacheError(msg) from error
    _check_shards(folder, index)
    return index


def _finished_records(folder: Path, hashes: Mapping[str, str], description: Description) -> dict[str, SampleRecord]:
    """Return what the shards hold of the wanted clips, by name; samples of other or changed clips are left out.

    Raises:
        LatentCacheError: a shard is damaged, or was made by another codec or with other settings.
    """
    records: dict[str, SampleRecord] = {}
    for path in shard_paths(folder):
        found, samples = read_records(path)
        _refuse_stale(folder, description, found)
        for record in samples:
            if hashes.get(record.name) == record.hash:
                records.setdefault(record.name, record)
    return records


def _refuse_stale(folder: Path, expected: Description, found: Description) -> None:
    if differing := differences(expected, found):
        msg = f"the latent cache {str(folder)!r} is stale: other are {differing}; use another folder, or remove it"
        raise LatentCacheError(msg)


def _write_skipped(folder: Path, skipped: Iterable[Skipped], writer: str) -> None:
    """Keep what a process had to leave out."""
    content = json.dumps([asdict(item) for item in skipped]).encode()
    write_atomically(folder / SKIPPED_FOLDER / f"{writer}.json", content, writer=writer)


def write_index(folder: Path, hashes: Mapping[str, str], *, description: Description, writer: str) -> None:
    """Write the index of all shards and all skipped clips, without locks.

    Every process that ends does this, then looks again: if another has put something into the folder in the meantime,
    it writes once more. Whoever writes last has seen everything.

    Raises:
        LatentCacheError: a shard is damaged or stale, or two samples of a bucket differ in shape.
        OutputError: it cannot be written.
    """
    seen = None
    while (contents := _contents(folder)) != seen:
        seen = contents
        samples = _finished_records(folder, hashes, description)
        _check_shapes(samples.values())
        skipped = {item.name: item for item in _read_skipped(folder) if item.name in hashes.keys() - samples.keys()}
        content: dict[str, Any] = {
            "format": FORMAT,
            "description": description,
            "num_missing": len(hashes) - len(samples) - len(skipped),
            "samples": [asdict(samples[name]) for name in sorted(samples)],
            "skipped": [asdict(skipped[name]) for name in sorted(skipped)],
        }
        write_atomically(folder / INDEX_NAME, json.dumps(content).encode(), writer=writer)


def _check_shapes(records: Iterable[SampleRecord]) -> None:
    """Raise `LatentCacheError` unless the tensors of each bucket have the same names and shapes."""
    first: dict[str, SampleRecord] = {}
    for record in records:
        known = first.setdefault(record.bucket, record)
        if known.shapes != record.shapes:
            msg = (
                f"{record.name} and {known.name} are of bucket {record.bucket} but have tensors {record.shapes} and "
                f"{known.shapes}; let the encoder pad them to one shape"
            )
            raise LatentCacheError(msg)


def _check_shards(folder: Path, index: CacheIndex) -> None:
    there = {path.name for path in shard_paths(folder)}
    missing = sorted({record.shard for record in index.samples} - there)
    if missing:
        msg = (
            f"the latent cache {str(folder)!r} lacks {len(missing)} shards, the first is {SHARD_FOLDER}/{missing[0]}; "
            "copy all of it, or build it again: only what is missing is made anew"
        )
        raise LatentCacheError(msg)


def _contents(folder: Path) -> list[tuple[str, int]]:
    paths = [*shard_paths(folder), *sorted((folder / SKIPPED_FOLDER).glob("*.json"))]
    return [(path.name, path.stat().st_mtime_ns) for path in paths]


def _read_skipped(folder: Path) -> list[Skipped]:
    items: list[Skipped] = []
    for path in sorted((folder / SKIPPED_FOLDER).glob("*.json")):
        try:
            items.extend(Skipped(**item) for item in json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            msg = f"{str(path)!r} is damaged; remove it and build the cache again"
            raise LatentCacheError(msg) from error
    return items
