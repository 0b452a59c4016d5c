"""`index.json` of a latent cache: the samples of all shards, merged without locks.

Every process that ends writes the index of what it finds, then looks again: if another has put something beside it in
the meantime, it writes once more. Whoever writes last has seen everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swifti2v.data.fingerprint import difference, recipe_of
from swifti2v.data.report import Skipped
from swifti2v.data.shards import SHARD_FOLDER, SampleRecord, read_records, shard_paths
from swifti2v.errors import LatentCacheError
from swifti2v.media.atomic_files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

INDEX_NAME = "index.json"
SKIPPED_FOLDER = "skipped"
FORMAT = 1


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds.

    Args:
        fingerprint: what it was made from.
        num_missing: clips that were asked for and are neither in the cache nor skipped: another process has them yet
            to make, or was stopped.
        samples: by name.
        skipped: clips that could not be read or encoded.
    """

    fingerprint: str
    num_missing: int
    samples: tuple[SampleRecord, ...]
    skipped: tuple[Skipped, ...]


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
        version = content["format"]
        index = CacheIndex(
            fingerprint=content["fingerprint"],
            num_missing=content["num_missing"],
            samples=tuple(SampleRecord(**record) for record in content["samples"]),
            skipped=tuple(Skipped(**item) for item in content["skipped"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{str(path)!r} is damaged; remove it and build the cache again: its shards are kept"
        raise LatentCacheError(msg) from error
    if version != FORMAT:
        msg = f"{str(path)!r} is of format {version}, and {FORMAT} is read; build the cache in another folder"
        raise LatentCacheError(msg)
    _check_shards(folder, index)
    return index


def finished_records(folder: Path, stamps: Mapping[str, str], *, fingerprint: str) -> dict[str, SampleRecord]:
    """Return what the shards hold of the wanted clips, by name; samples of other or changed clips are left out.

    Raises:
        LatentCacheError: a shard is damaged, or was made by another codec or with other settings.
    """
    recipe = recipe_of(fingerprint)
    records: dict[str, SampleRecord] = {}
    for path in shard_paths(folder):
        found, samples = read_records(path)
        refuse_stale(folder, recipe, found)
        for record in samples:
            if stamps.get(record.name) == record.stamp:
                records.setdefault(record.name, record)
    return records


def refuse_stale(folder: Path, expected: str, found: str) -> None:
    """Raise `LatentCacheError`, naming what differs, unless `found` is a fingerprint that `expected` allows."""
    differences = difference(expected, found)
    if differences:
        msg = f"the latent cache {str(folder)!r} is stale: other are {differences}; use another folder, or remove it"
        raise LatentCacheError(msg)


def write_skipped(folder: Path, skipped: Iterable[Skipped], *, writer: str) -> None:
    """Keep what a process had to leave out; raise `OutputError` if it cannot be written."""
    content = json.dumps([asdict(item) for item in skipped]).encode()
    write_atomically(folder / SKIPPED_FOLDER / f"{writer}.json", content, writer=writer)


def write_index(folder: Path, stamps: Mapping[str, str], *, fingerprint: str, writer: str) -> None:
    """Write the index of all shards and all skipped clips.

    Raises:
        LatentCacheError: a shard is damaged or stale, or two samples of a bucket differ in shape.
        OutputError: it cannot be written.
    """
    seen = None
    while (contents := _contents(folder)) != seen:
        seen = contents
        samples = finished_records(folder, stamps, fingerprint=fingerprint)
        check_shapes(samples.values())
        skipped = {item.name: item for item in _read_skipped(folder) if item.name in stamps.keys() - samples.keys()}
        content: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "num_missing": len(stamps) - len(samples) - len(skipped),
            "samples": [asdict(samples[name]) for name in sorted(samples)],
            "skipped": [asdict(skipped[name]) for name in sorted(skipped)],
        }
        write_atomically(folder / INDEX_NAME, json.dumps(content).encode(), writer=writer)


def check_shapes(records: Iterable[SampleRecord]) -> None:
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
