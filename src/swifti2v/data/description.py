"""What decides the tensors of a latent cache, as one description, and a hash of it for each sample.

A description is plain data: the digest of the codec's weights, sizes, rates, how references are made, ... The hash of a
sample is that of the description together with the sample's own part: its place in the video, its caption and the state
of its file. So a sample may be used exactly if its hash is the one that is expected; the description itself is kept in
the cache only to say what differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from swifti2v.data.clips import ClipRequest

Description = Mapping[str, Any]
SourceCheck = Literal["mtime", "content"]
"""How a changed source file is noticed: by size and time of change (fast), or by a hash of its content."""

_DIGITS = 16
_SAMPLED_BYTES = 1 << 20


def weights_digest(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> str:
    """Return a hash of a network: its configuration, and the names, types, shapes and bits of its weights."""
    digest = hashlib.sha256(_canonical(config).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def sample_hashes(
    description: Description, clips: Iterable[ClipRequest], source_check: SourceCheck = "mtime"
) -> dict[str, str]:
    """Return, by the name of each clip, the hash of all that decides its tensors."""
    files: dict[Path, str] = {}
    hashes = {}
    for clip in clips:
        if clip.path not in files:
            files[clip.path] = _file_state(clip.path, source_check)
        own = [clip.first_frame, clip.num_frames, clip.fps, list(clip.size), clip.prompt, files[clip.path]]
        text = _canonical({"cache": description, "sample": own})
        hashes[clip.name] = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
    return hashes


def differences(expected: Description, found: Description) -> str:
    """Say what differs: ``encoding.seed (0, now 1), codec (c1, now c2)``; "" if nothing does."""
    there, wanted = _flat(found), _flat(expected)
    names = [name for name in sorted(wanted | there) if wanted.get(name, "not set") != there.get(name, "not set")]
    return ", ".join(f"{name} ({there.get(name, 'not set')}, now {wanted.get(name, 'not set')})" for name in names)


def file_stamp(path: Path) -> str:
    """Return size and time of change; raise `OSError` if there is no such file."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def content_key(path: Path) -> str:
    """Return size and a hash of the first and the last megabyte, equal for copies; raise `OSError` as `open` does."""
    size_bytes = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLED_BYTES))
        file.seek(max(file.tell(), size_bytes - _SAMPLED_BYTES))
        digest.update(file.read(_SAMPLED_BYTES))
    return f"{size_bytes} {digest.hexdigest()}"


def _file_state(path: Path, source_check: SourceCheck) -> str:
    try:
        if source_check == "mtime":
            return file_stamp(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "absent"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the leaves of nested mappings as JSON, by dotted names."""
    leaves: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = _canonical(value)
    return leaves


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
