"""LoRAs in every format of keys, and the weights that they give, merged by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Known = dict[str, tuple[Tensor, Tensor, float]]

# Wan's own name of every module that a LoRA can change, written out by hand (facts: Wan2.2 wan/modules/model.py).
IN_A_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
BLOCK_MODULES = {
    f"blocks.{block}.{ours}": f"blocks.{block}.{theirs}" for block in range(2) for ours, theirs in IN_A_BLOCK.items()
}
MODULES = BLOCK_MODULES | OUTSIDE


def known_lora(model: nn.Module, modules: dict[str, str], *, with_alpha: bool = True) -> Known:
    """Random (down, up, alpha) of each module; ranks and alphas differ from module to module."""
    generator = torch.Generator().manual_seed(7)
    known = {}
    for place, name in enumerate(modules):
        rows, columns = model.get_submodule(name).weight.flatten(1).shape
        rank = 2 + place % 3
        down = torch.randn(rank, columns, generator=generator) * 0.2
        up = torch.randn(rows, rank, generator=generator) * 0.2
        known[name] = (down, up, rank * 0.5 + place % 2 if with_alpha else float(rank))
    return known


def merged_by_hand(model: nn.Module, known: Known, strength: float = 1.0, rslora: bool = False) -> dict[str, Tensor]:
    """State dict of `model` with ``strength * alpha / rank * up @ down`` added in float64."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, (down, up, alpha) in known.items():
        rank = down.shape[0]
        scale = strength * alpha / (math.sqrt(rank) if rslora else rank)
        weight = state[f"{name}.weight"].double()
        state[f"{name}.weight"] = (weight + scale * (up.double() @ down.double()).reshape(weight.shape)).float()
    return state


def down_up(stem: str, name: str, known: Known, *, alpha: bool = True) -> dict[str, Tensor]:
    down, up, value = known[name]
    keys = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    return keys | ({f"{stem}.alpha": torch.tensor(value)} if alpha else {})


def a_b(stem: str, name: str, known: Known, infix: str = "") -> dict[str, Tensor]:
    down, up, _ = known[name]
    return {f"{stem}.lora_A{infix}.weight": down, f"{stem}.lora_B{infix}.weight": up}


def each(known: Known, write: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for name in known for key, tensor in write(name).items()}


def dots(name: str) -> str:
    return name.replace(".", "_")


def wrapped(name: str) -> str:
    """With the components that FSDP, activation checkpointing and torch.compile put between."""
    head, _, tail = name.rpartition(".")
    return f"{head}._checkpoint_wrapped_module._orig_mod.{tail}" if head else f"_orig_mod.{name}"


# Formats with `.alpha` keys, by the number in facts/wan-and-few-step.md 1.7.
WITH_ALPHA: dict[str, Callable[[Known], dict[str, Tensor]]] = {
    "1-native-comfyui": lambda k: each(k, lambda n: down_up(f"diffusion_model.{MODULES[n]}", n, k)),
    "1-native-bare": lambda k: each(k, lambda n: down_up(MODULES[n], n, k)),
    "1-native-model-prefix": lambda k: each(k, lambda n: down_up(f"model.diffusion_model.{MODULES[n]}", n, k)),
    "5-kohya": lambda k: each(k, lambda n: down_up(f"lora_unet_{dots(MODULES[n])}", n, k)),
    "5-kohya-double-underscore": lambda k: each(k, lambda n: down_up(f"lora_unet__{dots(MODULES[n])}", n, k)),
    "5-kohya-diffusers-names": lambda k: each(k, lambda n: down_up(f"lora_unet_{dots(n)}", n, k)),
    "5-kohya-mixed": lambda k: each(k, lambda n: down_up(f"lora_unet_{MODULES[n].replace('.', '_', 2)}", n, k)),
    "1-native-compiled": lambda k: each(k, lambda n: down_up(f"_orig_mod.{MODULES[n]}", n, k)),
    "6-lycoris": lambda k: each(k, lambda n: down_up(f"lycoris_{dots(MODULES[n])}", n, k)),
}
# Formats without: the scale is 1, alpha = rank.
WITHOUT_ALPHA: dict[str, Callable[[Known], dict[str, Tensor]]] = {
    "1-native-no-alpha": lambda k: each(k, lambda n: down_up(f"diffusion_model.{MODULES[n]}", n, k, alpha=False)),
    "2-native-peft": lambda k: each(k, lambda n: a_b(f"diffusion_model.{MODULES[n]}", n, k)),
    "2-native-peft-default": lambda k: each(k, lambda n: a_b(f"diffusion_model.{MODULES[n]}", n, k, ".default")),
    "3-diffsynth": lambda k: each(k, lambda n: a_b(MODULES[n], n, k, ".default")),
    "3-diffsynth-prefix": lambda k: each(k, lambda n: a_b(f"pipe.dit.{MODULES[n]}", n, k, ".default")),
    "4-diffusers": lambda k: each(k, lambda n: a_b(f"transformer.{n}", n, k)),
    "7-peft-raw": lambda k: each(k, lambda n: a_b(f"base_model.model.{n}", n, k)),
    "7-peft-raw-sharded": lambda k: each(
        k, lambda n: a_b(f"base_model.model._fsdp_wrapped_module.{wrapped(n)}", n, k, ".default")
    ),
    "7-peft-raw-native": lambda k: each(k, lambda n: a_b(f"base_model.model.{MODULES[n]}", n, k)),
}
FORMATS = WITH_ALPHA | WITHOUT_ALPHA


def forward(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(1, model.config.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, 5, model.config.text_dim, generator=generator)
    with torch.no_grad():
        return model(frames, torch.tensor([700.0]), text).sample


def assert_state(model: nn.Module, expected: dict[str, Tensor], atol: float = 2e-6) -> None:
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(actual[name], tensor, atol=atol, rtol=0), name
