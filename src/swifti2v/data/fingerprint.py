"""What a latent cache was made from, as one line of text that can be compared part by part.

A fingerprint is canonical JSON: ``codec`` (hash of configuration and weights), ``settings`` (by name, so that a message
can say which differs) and, if clips are given, ``sources`` (hash over each clip's place and source file).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from swifti2v.data.file_stamps import file_stamp

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from swifti2v.data.clips import ClipRequest

SourceCheck = Literal["mtime", "content"]
"""How a changed source file is noticed: by size and time of change (fast), or by a hash of its content."""

SOURCES = "sources"
_DIGITS = 16
_READ_BYTES = 1 << 20


def fingerprint_of(
    *,
    codec: str,
    settings: Mapping[str, object],
    clips: Iterable[ClipRequest] | None = None,
    source_check: SourceCheck = "mtime",
) -> str:
    """Return the fingerprint of a cache.

    Args:
        codec: from `weights_digest`, or any text that changes whenever the encoder does.
        settings: whatever else decides the tensors: sizes, dtype, construction of the reference, ...; plain data.
        clips: if given, a fingerprint that changes with any of their files or prompts.
        source_check: how a changed file is noticed.
    """
    parts: dict[str, object] = {"codec": codec, "settings": dict(settings)}
    if clips is not None:
        stamps = clip_stamps(clips, source_check)
        parts[SOURCES] = _short(json.dumps(stamps, sort_keys=True).encode())
    return _canonical(parts)


def weights_digest(config: Mapping[str, object], weights: Mapping[str, Tensor]) -> str:
    """Return a hash of a network: its configuration, and the names, types, shapes and bits of its weights."""
    digest = hashlib.sha256(_canonical(dict(config)).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def clip_stamps(clips: Iterable[ClipRequest], source_check: SourceCheck) -> dict[str, str]:
    """Return, by the name of each clip, a hash of its place, prompt, shape and source file ("absent" if missing)."""
    files: dict[Path, str] = {}
    stamps = {}
    for clip in clips:
        if clip.path not in files:
            files[clip.path] = _file_stamp(clip.path, source_check)
        place = [clip.first_frame, clip.num_frames, clip.fps, list(clip.size), clip.prompt, files[clip.path]]
        stamps[clip.name] = _short(json.dumps(place).encode())
    return stamps


def recipe_of(fingerprint: str) -> str:
    """Return the fingerprint without its sources: what a change of one source file leaves as it was."""
    parts = _parts(fingerprint)
    parts.pop(SOURCES, None)
    return _canonical(parts)


def difference(expected: str, found: str) -> str:
    """Say in a few words where two fingerprints differ; "" if `found` is all that `expected` asks for.

    A part that `expected` lacks (its sources) is not compared.
    """
    wanted, there = _parts(expected), _parts(found)
    clauses = []
    for part in sorted(wanted.keys() | (there.keys() - {SOURCES})):
        if wanted.get(part) == there.get(part):
            continue
        if isinstance(wanted.get(part), dict) and isinstance(there.get(part), dict):
            clauses.extend(_setting_clauses(wanted[part], there[part]))
        elif part == SOURCES:
            clauses.append("the source files or captions")
        else:
            clauses.append(f"the {part} ({there.get(part, 'none')}, now {wanted.get(part, 'none')})")
    return ", ".join(clauses)


def _setting_clauses(wanted: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [
        f"the setting {name} ({_value(there, name)}, now {_value(wanted, name)})"
        for name in sorted(wanted.keys() | there.keys())
        if wanted.get(name) != there.get(name) or (name in wanted) != (name in there)
    ]


def _value(settings: dict[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"


def _parts(fingerprint: str) -> dict[str, Any]:
    """Parts of a fingerprint; text of another origin is one part."""
    try:
        parts = json.loads(fingerprint)
    except ValueError:
        parts = None
    return parts if isinstance(parts, dict) else {"fingerprint": fingerprint}


def _canonical(parts: Mapping[str, object]) -> str:
    return json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)


def _file_stamp(path: Path, source_check: SourceCheck) -> str:
    try:
        if source_check == "mtime":
            return file_stamp(path)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
        return digest.hexdigest()
    except OSError:
        return "absent"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
