"""Saving a trained LoRA: diffusers' format with alpha in its metadata, and ComfyUI's keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanImageToVideoPipeline
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from swifti2v.errors import AdapterError
from swifti2v.training.engine.distributed import whole
from swifti2v.training.engine.writing import writing
from swifti2v.wan.lora import LoraDelta, load_adapter, read_adapter_file
from swifti2v.wan.lora_keys import native_name

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LORA_NAME = "pytorch_lora_weights.safetensors"
COMFYUI_NAME = "comfyui_lora.safetensors"


def lora_state(transformer: Any, *, adapter_name: str = "default", keep: bool = True) -> dict[str, Tensor]:
    """Return the LoRA of a transformer, put together from all processes (all have to ask), float32 on the CPU.

    Args:
        transformer: with an adapter, spread over processes or not.
        adapter_name: of PEFT.
        keep: False in processes that do not write it.
    """
    state: dict[str, Tensor] = whole(get_peft_model_state_dict(transformer, adapter_name=adapter_name), keep=keep)
    return state


def save_lora(state: dict[str, Tensor], transformer: Any, folder: Path, *, adapter_name: str = "default") -> Path:
    """Write a LoRA as `WanImageToVideoPipeline.save_lora_weights` does, with its alpha in the metadata.

    Args:
        state: of `lora_state`.
        transformer: whose adapter it is.
        folder: made if it does not exist; the file in it is `LORA_NAME`.
        adapter_name: of PEFT.

    Raises:
        OutputError: it cannot be written.
    """
    settings = transformer.peft_config[adapter_name].to_dict()
    # diffusers writes the settings as JSON, which knows no sets.
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    partial = f".{LORA_NAME}.part.safetensors"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        WanImageToVideoPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=state,
            transformer_lora_adapter_metadata=json.loads(json.dumps(plain, default=str)),
            weight_name=partial,
        )
        return (folder / partial).replace(folder / LORA_NAME)


def export_comfyui(lora: Path, transformer: Any, output: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a LoRA with ComfyUI's keys: ``diffusion_model.blocks.0.self_attn.q.lora_down.weight``, ``.alpha``, ...

    Args:
        lora: file or folder in any format that `swifti2v.wan.lora` reads.
        transformer: the network it is for; its names are needed, so it may be on the meta device.
        output: the file.
        dtype: of the matrices.

    Raises:
        AdapterError: the file does not match the network.
        OutputError: `output` cannot be written.
    """
    adapter = load_adapter(read_adapter_file(lora), transformer)
    tensors: dict[str, Tensor] = {}
    for module, delta in adapter.deltas.items():
        if not isinstance(delta, LoraDelta) or delta.magnitude is not None:
            msg = f"{lora} changes {module} by a LoHa, LoKr or DoRA, and only plain LoRAs can be exported"
            raise AdapterError(msg)
        stem = f"diffusion_model.{native_name(module)}"
        tensors[f"{stem}.lora_down.weight"] = delta.down.to(dtype).contiguous()
        tensors[f"{stem}.lora_up.weight"] = delta.up.to(dtype).contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(delta.scale * delta.rank, dtype=torch.float32)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, output, metadata={"format": "pt"})
