"""Adapters attached to a network, fused into it, and shared out to two experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import AdapterError
from swifti2v.wan.adapters import (
    AdapterFile,
    adapters_of_experts,
    attach,
    fuse,
    load_adapter,
    normalise,
    route_experts,
)
from tests.wan.lora_formats import (
    BLOCK_MODULES,
    FORMATS,
    MODULES,
    a_b,
    assert_state,
    each,
    expert_like,
    forward,
    known_lora,
    merged_by_hand,
)

if TYPE_CHECKING:
    from torch import Tensor, nn


def difference_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`.diff` keys as LightX2V's extractor writes them, and the same by parameter name."""
    generator = torch.Generator().manual_seed(3)
    by_parameter: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for theirs, ours in (
        ("blocks.0.diff_m", "blocks.0.scale_shift_table"),
        ("blocks.1.diff_m", "blocks.1.scale_shift_table"),
        ("head.diff_m", "scale_shift_table"),
        ("head.head.diff", "proj_out.weight"),
        ("head.head.diff_b", "proj_out.bias"),
        ("patch_embedding.diff", "patch_embedding.weight"),
        ("patch_embedding.diff_b", "patch_embedding.bias"),
        ("blocks.0.norm3.diff", "blocks.0.norm2.weight"),
        ("blocks.0.norm3.diff_b", "blocks.0.norm2.bias"),
        ("blocks.0.self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight"),
        ("blocks.1.cross_attn.norm_k.diff", "blocks.1.attn2.norm_k.weight"),
        ("blocks.1.self_attn.q.diff_b", "blocks.1.attn1.to_q.bias"),
        ("blocks.1.ffn.0.diff_b", "blocks.1.ffn.net.0.proj.bias"),
        ("text_embedding.0.diff_b", "condition_embedder.text_embedder.linear_1.bias"),
        ("time_projection.1.diff_b", "condition_embedder.time_proj.bias"),
    ):
        by_parameter[ours] = torch.randn(model.get_parameter(ours).shape, generator=generator) * 0.1
        keys[f"diffusion_model.{theirs}"] = by_parameter[ours]
    return keys, by_parameter


def test_differences_are_added_to_weight_bias_and_modulation(expert: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    keys, by_parameter = difference_tensors(expert)
    before, untouched = {key: value.clone() for key, value in expert.state_dict().items()}, forward(expert)
    expected = merged_by_hand(expert, known, strength=0.5)
    for name, diff in by_parameter.items():
        expected[name] = expected[name] + 0.5 * diff

    adapter = normalise(FORMATS["1-native-no-alpha"](known) | keys, expert)
    assert adapter.diffs.keys() == by_parameter.keys()
    attached = attach(expert, adapter, name="distilled", strength=0.5)
    switched_on = forward(expert)
    attached.disable()
    assert torch.equal(forward(expert), untouched)
    attached.enable()
    assert torch.equal(forward(expert), switched_on)
    attached.remove()
    assert all(torch.equal(expert.state_dict()[key], before[key]) for key in before)

    fuse(expert, adapter, strength=0.5)
    assert_state(expert, expected)
    assert (forward(expert) - switched_on).abs().max() < 1e-5


def test_convolution_as_lora(expert: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = expert.patch_embedding.weight
    down = torch.randn(3, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], 3, 1, 1, 1, generator=generator)
    state = {"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}
    expected = weight + torch.einsum("orxyz,rcthw->octhw", up, down)
    attached = attach(expert, normalise(state, expert), name="conv")
    with_layer = forward(expert)
    attached.remove()
    fuse(expert, normalise(state, expert))
    assert torch.allclose(expert.patch_embedding.weight, expected, atol=1e-5)
    assert (forward(expert) - with_layer).abs().max() < 1e-4


def test_two_attached_adapters_come_off_in_any_order(expert: Any) -> None:
    expert.to(torch.bfloat16)  # rounding would show if values were subtracted again
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    _, first = difference_tensors(expert)
    first_file = {"diffusion_model.patch_embedding.diff_b": first["patch_embedding.bias"] * 3}
    second_file = {"patch_embedding.diff_b": first["patch_embedding.bias"] / 3}
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    one = attach(expert, normalise(first_file | FORMATS["3-diffsynth"](known), expert), name="one")
    two = attach(expert, normalise(second_file | FORMATS["3-diffsynth"](known), expert), name="two", strength=0.3)
    assert expert.active_adapters() == ["one", "two"]
    one.remove()
    only_second = before["patch_embedding.bias"].float() + 0.3 * second_file["patch_embedding.diff_b"]
    assert torch.equal(expert.get_submodule("patch_embedding").bias, only_second.to(torch.bfloat16))
    assert expert.active_adapters() == ["two"]
    two.remove()
    assert all(torch.equal(expert.state_dict()[key], before[key]) for key in before)
    with pytest.raises(AdapterError, match="removed"):
        one.enable()


def test_attaching_leaves_a_trained_adapter_trained_and_active(expert: Any) -> None:
    from peft import LoraConfig

    expert.requires_grad_(False)
    expert.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="low_res")
    trained = {name for name, parameter in expert.named_parameters() if parameter.requires_grad}
    attached = attach(
        expert, normalise(FORMATS["4-diffusers"](known_lora(expert_like(expert), BLOCK_MODULES)), expert), name="few"
    )
    assert {name for name, parameter in expert.named_parameters() if parameter.requires_grad} == trained
    assert expert.active_adapters() == ["low_res", "few"]
    attached.remove()
    assert expert.active_adapters() == ["low_res"]
    assert {name for name, parameter in expert.named_parameters() if parameter.requires_grad} == trained


def test_fusing_beneath_an_attached_adapter(expert: Any, tiny_wan_dit: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    keys, _ = difference_tensors(expert)
    state = FORMATS["1-native-no-alpha"](known) | keys
    attached = attach(expert, normalise(state, expert), name="one")
    fuse(expert, normalise(state, expert), strength=0.5)
    attached.remove()
    fused = tiny_wan_dit(36, 16)
    fuse(fused, normalise(state, fused), strength=0.5)
    assert_state(expert, fused.state_dict(), atol=0)


def test_bfloat16_weights_are_rounded_once(expert: Any) -> None:
    expert.to(torch.bfloat16)
    known = known_lora(expert, BLOCK_MODULES)
    exact = {
        name: expert.get_submodule(name).weight.double() + alpha / down.shape[0] * up.double() @ down.double()
        for name, (down, up, alpha) in known.items()
    }
    fuse(expert, normalise(FORMATS["1-native-comfyui"](known), expert))
    for name, weight in exact.items():
        error = (expert.get_submodule(name).weight.double() - weight).abs()
        assert bool((error <= weight.abs() * 2**-8 + 1e-6).all()), name


# ----------------------------------------------------------------------------------------------- two experts


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.transformer_{}.", "transformer_{}.", "transformer.transformer_{}."]
)
def test_file_of_both_experts(prefix: str, expert: Any, tiny_wan_dit: Any) -> None:
    high, low = expert, tiny_wan_dit(36, 16)
    known = known_lora(high, BLOCK_MODULES, with_alpha=False)
    flipped = {name: (down, -up, alpha) for name, (down, up, alpha) in known.items()}
    expected = {"high": merged_by_hand(high, known), "low": merged_by_hand(low, flipped)}
    state = {
        prefix.format(number) + key: tensor
        for number, lora in ((1, known), (2, flipped))
        for key, tensor in each(lora, lambda n, lora=lora: a_b(MODULES[n], n, lora)).items()
    }
    file = AdapterFile("both.safetensors", state)
    adapters = adapters_of_experts(file, {"high": high, "low": low})
    fuse(high, adapters["high"])
    fuse(low, adapters["low"])
    assert_state(high, expected["high"])
    assert_state(low, expected["low"])
    with pytest.raises(AdapterError, match="choose one"):
        load_adapter(file, high)


def test_diffusers_names_of_both_components(expert: Any) -> None:
    state = {f"{part}.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1) for part in ("transformer", "transformer_2")}
    routed = route_experts(state)
    assert routed is not None
    assert {name: list(keys) for name, keys in routed.items()} == {
        "high": ["transformer.blocks.0.attn1.to_q.lora_A.weight"],
        "low": ["blocks.0.attn1.to_q.lora_A.weight"],
    }


def test_choice_of_expert_for_a_file_of_one(expert: Any, tiny_wan_dit: Any) -> None:
    experts = {"high": expert, "low": tiny_wan_dit(36, 16)}
    file = AdapterFile("one.safetensors", FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)))
    assert route_experts(file.state_dict) is None
    assert set(adapters_of_experts(file, experts)) == {"high", "low"}
    assert set(adapters_of_experts(file, experts, expert="low")) == {"low"}
    assert set(adapters_of_experts(file, {"high": expert})) == {"high"}
    with pytest.raises(AdapterError, match="low-noise"):
        adapters_of_experts(file, {"high": expert}, expert="low")


def test_half_routed_file_is_refused(expert: Any) -> None:
    state = {"diffusion_model.transformer_1.blocks.0.diff_m": torch.zeros(1, 6, 24), "blocks.0.diff_m": torch.zeros(1)}
    with pytest.raises(AdapterError, match="1 of 2 keys name no expert"):
        route_experts(state)
