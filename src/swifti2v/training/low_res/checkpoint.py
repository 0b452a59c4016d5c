"""The checkpoint that a run of the Low-Res LoRA makes: its base, and the LoRA of each expert that has one.

```
checkpoint/
  swifti2v.json                                       the base's, with the adapters below
  adapters/high/pytorch_lora_weights.safetensors      diffusers' format; comfyui_lora.safetensors beside it
  adapters/low/...
```
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from swifti2v.training.derived_index import derived_index
from swifti2v.training.engine.writing import writing
from swifti2v.training.low_res.lora import Expert
from swifti2v.training.low_res.lora_files import LORA_NAME
from swifti2v.wan.checkpoint_index import INDEX_NAME, AdapterEntry, write_index

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from swifti2v.wan.checkpoints import ResolvedCheckpoint

LOW_RES = "low_res"
"""Role of the adapters."""

EXPERTS: tuple[Expert, ...] = get_args(Expert)


def adapter_folder(checkpoint: Path, expert: Expert) -> Path:
    """Return where in a checkpoint the LoRA of an expert lies."""
    return checkpoint / "adapters" / expert


def write_low_res_index(base: ResolvedCheckpoint, checkpoint: Path) -> None:
    """Write the index over the LoRAs that `checkpoint` holds by now, so that it can be used at any time.

    They take the place of the base's own adapters of role `LOW_RES`, without which they were trained; the others, the
    few-step ones among them, stay.

    Raises:
        OutputError: it cannot be written.
    """
    trained = [expert for expert in EXPERTS if (adapter_folder(checkpoint, expert) / LORA_NAME).is_file()]
    index = derived_index(base)
    own = [
        AdapterEntry(f"./adapters/{expert}", weight_name=LORA_NAME, expert=expert, role=LOW_RES) for expert in trained
    ]
    adapters = (*_others(index.stage_one.adapters, trained), *own)
    made = replace(index, stage_one=replace(index.stage_one, adapters=adapters))
    with writing(checkpoint):
        write_index(made, checkpoint / INDEX_NAME)


def _others(adapters: Collection[AdapterEntry], trained: Collection[Expert]) -> Iterator[AdapterEntry]:
    """Yield `adapters` without those of role `LOW_RES` for the experts that have a new one."""
    for entry in adapters:
        if entry.role != LOW_RES:
            yield entry
            continue
        for expert in EXPERTS:
            if entry.expert in (expert, "both") and expert not in trained:
                yield replace(entry, expert=expert)
