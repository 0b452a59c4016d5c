"""Files of checkpoints: downloads from the hub, JSON, weight files and their tensors, checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError, safe_open

from swifti2v.errors import AdapterError, CheckpointError, SwiftI2VError
from swifti2v.wan.checkpoint_index import INDEX_NAME, CheckpointIndex, read_index, write_index

# The HTTP library beneath differs between versions of the hub's client (httpx, httpx2); this is its base error.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_SHARD_INDEX = ".safetensors.index.json"
_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SwiftI2VError)


@dataclass(frozen=True)
class Hub:
    """How hub repositories are reached.

    Args:
        cache_dir: of `huggingface_hub`; None: its own.
        local_files_only: take what is in the cache and never ask the network.
    """

    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def fetch(self, repository: str, revision: str | None, patterns: Collection[str]) -> Path:
        """Bring the files of `repository` that match `patterns` onto this machine and return their folder.

        Raises:
            CheckpointError: no network, no such repository or revision, no access, not in the cache.
        """
        try:
            folder = huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                allow_patterns=list(patterns),
            )
        except (OSError, ValueError, EntryNotFoundError, _HTTP_ERROR) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:")
            name = repository if revision is None else f"{repository} at {revision}"
            msg = (
                f"cannot get {name} from the Hugging Face hub ({reason}); connect to the internet, or download it "
                f"elsewhere with `hf download {repository}` and bring its cache here (cache_dir, HF_HOME)"
            )
            raise CheckpointError(msg) from error
        return Path(str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `CheckpointError` naming the file if it is missing or is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; get the whole checkpoint again"
        raise CheckpointError(msg) from error
    except ValueError as error:
        msg = f"{path} is not JSON ({error}); it is damaged: get it again"
        raise CheckpointError(msg) from error
    if not isinstance(data, dict):
        msg = f"{path} does not hold a JSON object; it is damaged: get it again"
        raise CheckpointError(msg)
    return data


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder; raise `CheckpointError` if there are none."""
    if not folder.is_dir():
        msg = f"there is no folder {folder}; get the whole checkpoint again"
        raise CheckpointError(msg)
    for stem in ("diffusion_pytorch_model", "model"):
        if (index := folder / f"{stem}{_SHARD_INDEX}").is_file():
            shards = read_json(index).get("weight_map", {})
            return sorted({folder / name for name in shards.values()})
        if (file := folder / f"{stem}.safetensors").is_file():
            return [file]
    msg = f"{folder} holds no weights (diffusion_pytorch_model.safetensors or model.safetensors); get it again"
    raise CheckpointError(msg)


def stored_names(folder: Path) -> frozenset[str]:
    """Names of the tensors in the safetensors files of a model's folder; only headers are read.

    Opening a file checks that it is as long as its header says, so a truncated download is found here.

    Raises:
        CheckpointError: no weights, a shard missing, a file damaged or truncated.
    """
    names: set[str] = set()
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as reader:
                names.update(reader.keys())
        except (SafetensorError, OSError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            msg = f"cannot read the weights {file} ({reason}); the file is damaged or cut short: get it again"
            raise CheckpointError(msg) from error
    return frozenset(names)


@contextmanager
def as_checkpoint_error(place: Path) -> Iterator[None]:
    """Turn what diffusers and transformers raise on bad files into a `CheckpointError` that names them."""
    default_dtype = torch.get_default_dtype()
    try:
        yield
    except (CheckpointError, AdapterError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # not the fault of the files
    except _LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        msg = f"cannot load {place}: {reason}; the files do not fit together: get them again"
        raise CheckpointError(msg) from error
    finally:
        # A load that fails half-way leaves the process with the dtype of the weights as torch's default.
        torch.set_default_dtype(default_dtype)


def checksums(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root` but the index and hidden ones, by relative path, sorted."""
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    kept = sorted(
        file.as_posix()
        for file in files
        if file.as_posix() != INDEX_NAME and not any(part.startswith(".") for part in file.parts)
    )
    return {file: _sha256(root / file) for file in kept}


def write_checksums(root: Path) -> CheckpointIndex:
    """Write the checksums of all files of a checkpoint into its index and return that."""
    index = replace(read_index(root / INDEX_NAME), sha256=checksums(root))
    write_index(index, root / INDEX_NAME)
    return index


def verify_checksums(root: Path, sha256: Mapping[str, str], patterns: Collection[str]) -> None:
    """Check files against the index.

    Args:
        root: folder of the index.
        sha256: of the index.
        patterns: of the files that must be there; others are not looked at.

    Raises:
        CheckpointError: the index holds no checksums, a file is missing or differs.
    """
    if not sha256:
        msg = f"{root / INDEX_NAME} holds no checksums to verify; load without verification, or write them"
        raise CheckpointError(msg)
    for file, expected in sha256.items():
        if not any(fnmatchcase(file, pattern) for pattern in patterns):
            continue
        if not (root / file).is_file():
            msg = f"{root / file} is missing; get the checkpoint again"
            raise CheckpointError(msg)
        if _sha256(root / file) != expected:
            msg = f"{root / file} differs from its checksum: it is damaged or was changed; get it again"
            raise CheckpointError(msg)


def _sha256(file: Path) -> str:
    with file.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()
