"""Shards of a latent cache: safetensors files that say themselves what they hold.

A shard's header carries the description of the cache (`description.py`) and a record of each sample; tensors are named
``<place in the shard>/<name>``. So shards need no journal: whoever lists the folder knows what is done. A shard's name
is a hash of its samples' names, hence processes that share the work never write to one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from swifti2v.errors import LatentCacheError
from swifti2v.media.atomic_files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from swifti2v.data.description import Description

SHARD_FOLDER = "shards"
FORMAT = "swifti2v-latents-2"


@dataclass(frozen=True)
class SampleRecord:
    """Where a sample lies, and what it is.

    Args:
        name: unique in a cache.
        prompt: its caption.
        bucket: samples of one bucket have tensors of the same names and shapes.
        hash: of all that decides its tensors (`description.sample_hashes`).
        shapes: of its tensors, by name.
        shard: file name of its shard.
        place: in the shard.
    """

    name: str
    prompt: str
    bucket: str
    hash: str
    shapes: dict[str, list[int]]
    shard: str
    place: int


@dataclass(frozen=True)
class FreshSample:
    """A sample that has just been encoded and is not yet on the disk; `tensors` lie on the CPU."""

    name: str
    prompt: str
    bucket: str
    hash: str
    tensors: dict[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def write_shard(folder: Path, samples: Sequence[FreshSample], *, description: Description, writer: str) -> None:
    """Write samples as one shard, whole or not at all.

    Raises:
        OutputError: it cannot be written; a full disk, for instance.
    """
    names = "\n".join(sample.name for sample in samples)
    path = folder / SHARD_FOLDER / f"{hashlib.sha256(names.encode()).hexdigest()[:20]}.safetensors"
    records = [
        SampleRecord(
            name=sample.name,
            prompt=sample.prompt,
            bucket=sample.bucket,
            hash=sample.hash,
            shapes={name: list(tensor.shape) for name, tensor in sample.tensors.items()},
            shard=path.name,
            place=place,
        )
        for place, sample in enumerate(samples)
    ]
    metadata = {
        "format": FORMAT,
        "description": json.dumps(description),
        "samples": json.dumps(list(map(asdict, records))),
    }
    tensors = {
        f"{place}/{name}": tensor for place, sample in enumerate(samples) for name, tensor in sample.tensors.items()
    }
    write_atomically(path, safetensors.torch.save(tensors, metadata), writer=writer)


def shard_paths(folder: Path) -> list[Path]:
    """Return the finished shards of a cache, by name."""
    return sorted((folder / SHARD_FOLDER).glob("*.safetensors"))


def read_records(path: Path) -> tuple[Description, list[SampleRecord]]:
    """Return the description of a shard and the records of its samples; no tensor is read.

    Raises:
        LatentCacheError: it is damaged, or no shard of such a cache.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                msg = f"{str(path)!r} is no shard of a latent cache; remove it, or use another folder"
                raise LatentCacheError(msg)
            records = [SampleRecord(**record) for record in json.loads(metadata["samples"])]
            return json.loads(metadata["description"]), records
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, LatentCacheError):
            raise
        raise damaged(path) from error


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of one sample by name, each read when it is asked for, and nothing else of its shard.

    A sample has as many references as variants were made of it, of which a step draws one. Names and their number cost
    no reading. The shard is looked at here, so that a damaged one is noticed where the sample is taken.

    Args:
        folder: of the cache.
        record: of the sample.

    Raises:
        LatentCacheError: the shard is missing or damaged.
    """

    def __init__(self, folder: Path, record: SampleRecord) -> None:
        self._path = folder / SHARD_FOLDER / record.shard
        self._record = record
        try:
            self._file = _opened(self._path)
            lacking = {f"{record.place}/{name}" for name in record.shapes} - set(self._file.keys())
        except (SafetensorError, OSError) as error:
            raise damaged(self._path) from error
        if lacking:
            raise damaged(self._path)

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        if name not in self._record.shapes:
            raise KeyError(name)
        try:
            tensor: Tensor = self._file.get_tensor(f"{self._record.place}/{name}")
        except (SafetensorError, OSError) as error:
            raise damaged(self._path) from error
        return tensor

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; reads nothing."""
        return name in self._record.shapes

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._record.shapes)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._record.shapes)


def _opened(path: Path) -> Any:
    """Open a shard; safetensors gives its handle no types."""
    return safe_open(path, framework="pt")


def damaged(path: Path) -> LatentCacheError:
    """Return the error for a shard that cannot be read."""
    msg = f"the shard {str(path)!r} is missing or damaged; remove it if it is there and build the cache again"
    return LatentCacheError(f"{msg}: only its samples are made anew")
