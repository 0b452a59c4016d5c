"""What the tests of checkpoints share: the LoRAs of the tiny checkpoint, its weights, and changes of its index."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TARGET = "blocks.0.attn1.to_q"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def lora(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.randn(2, 24, generator=generator),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.randn(24, 2, generator=generator),
    }


def edit_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((root / "swifti2v.json").read_text())
    change(data)
    (root / "swifti2v.json").write_text(json.dumps(data))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)
