"""The index of a checkpoint that a training makes of another: what it does not hold itself is named by its place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from swifti2v.wan.checkpoint_index import is_within

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.wan.checkpoint_index import CheckpointIndex
    from swifti2v.wan.checkpoints import ResolvedCheckpoint

CHECKPOINT_FOLDER = "checkpoint"
"""Where in the folder of a run the checkpoint lies that it makes."""

_TRAINED = "-trained"


def derived_index(base: ResolvedCheckpoint) -> CheckpointIndex:
    """Return the index of `base` as it holds from every folder of this machine, under another name.

    Parts that `base` holds itself (``./stage_one``) are named by their full paths; its checksums are left out.
    """
    index, one, two = base.index, base.index.stage_one, base.index.stage_two
    adapters = tuple(replace(adapter, source=_lasting(adapter.source, base.root)) for adapter in one.adapters)
    return replace(
        index,
        name=index.name.removesuffix(_TRAINED) + _TRAINED,
        stage_one=replace(one, source=_lasting(one.source, base.root), adapters=adapters),
        stage_two=replace(two, source=_lasting(two.source, base.root)),
        sha256={},
    )


def _lasting(source: str, root: Path) -> str:
    return str((root / source).resolve()) if is_within(source) else source
