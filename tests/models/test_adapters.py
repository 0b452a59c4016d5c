"""Every LoRA key format against weights merged by hand, and against diffusers' own loader where it reads the format."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from swifti2v.errors import AdapterError
from swifti2v.models.adapter_keys import ModuleNames
from swifti2v.models.adapters import (
    AdapterFile,
    AlphaRule,
    adapters_of_experts,
    attach,
    fuse,
    load_adapter,
    normalise,
    read_adapter_file,
    route_experts,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


# Formats with `.alpha` keys, by the number in facts/wan-and-few-step.md 1.7.
WITH_ALPHA: dict[str, Callable[[Known], dict[str, Tensor]]] = {
    "1-native-comfyui": lambda k: each(k, lambda n: down_up(f"diffusion_model.{MODULES[n]}", n, k)),
    "1-native-bare": lambda k: each(k, lambda n: down_up(MODULES[n], n, k)),
    "1-native-model-prefix": lambda k: each(k, lambda n: down_up(f"model.diffusion_model.{MODULES[n]}", n, k)),
    "5-kohya": lambda k: each(k, lambda n: down_up(f"lora_unet_{dots(MODULES[n])}", n, k)),
    "5-kohya-double-underscore": lambda k: each(k, lambda n: down_up(f"lora_unet__{dots(MODULES[n])}", n, k)),
    "5-kohya-diffusers-names": lambda k: each(k, lambda n: down_up(f"lora_unet_{dots(n)}", n, k)),
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
    "7-peft-raw-native": lambda k: each(k, lambda n: a_b(f"base_model.model.{MODULES[n]}", n, k)),
}
FORMATS = WITH_ALPHA | WITHOUT_ALPHA


@pytest.fixture
def expert(tiny_wan_dit: Callable[..., Any]) -> Any:
    return tiny_wan_dit(36, 16)


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


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_weights_merged_by_hand(name: str, expert: Any) -> None:
    known = known_lora(expert, MODULES, with_alpha=name in WITH_ALPHA)
    before, untouched = {key: value.clone() for key, value in expert.state_dict().items()}, forward(expert)
    expected = merged_by_hand(expert, known, strength=0.7)
    adapter = normalise(FORMATS[name](known), expert)
    assert adapter.deltas.keys() == known.keys()

    attached = attach(expert, adapter, name="few_step", strength=0.7)
    through_layers = forward(expert)
    attached.disable()
    assert torch.equal(forward(expert), untouched)
    attached.enable()
    assert torch.equal(forward(expert), through_layers)
    attached.remove()
    after = expert.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)

    fuse(expert, adapter, strength=0.7)
    assert_state(expert, expected)
    expert.load_state_dict(expected)
    assert (through_layers - forward(expert)).abs().max() < 1e-5
    assert (through_layers - untouched).abs().max() > 1e-2


@pytest.fixture
def pipeline(
    expert: Any, tiny_wan_dit: Any, tiny_vae21: Any, tiny_text_encoder: Any, tiny_tokenizer: Any
) -> Callable[[], Any]:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    def make() -> Any:
        return WanImageToVideoPipeline(
            tokenizer=tiny_tokenizer,
            text_encoder=tiny_text_encoder,
            vae=tiny_vae21,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            transformer=tiny_wan_dit(36, 16),
            transformer_2=tiny_wan_dit(36, 16),
        )

    return make


@pytest.mark.parametrize("name", ["1-native-comfyui", "2-native-peft", "4-diffusers", "5-kohya"])
def test_same_result_as_diffusers_loader(name: str, expert: Any, pipeline: Callable[[], Any]) -> None:
    # diffusers reads `.alpha` in blocks only, and its kohya converter knows no other modules.
    known = known_lora(expert, BLOCK_MODULES if name in WITH_ALPHA else MODULES, with_alpha=name in WITH_ALPHA)
    state = FORMATS[name](known)
    theirs = pipeline()
    # Copies: its converter scales the tensors that it is given in place.
    theirs.load_lora_weights({key: tensor.clone() for key, tensor in state.items()}, adapter_name="few_step")

    fuse(expert, normalise(state, expert))
    assert (forward(expert) - forward(theirs.transformer)).abs().max() < 1e-5
    assert (forward(expert) - forward(theirs.transformer_2)).abs().max() > 1e-2


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


@pytest.mark.parametrize(
    ("key", "parameter"),
    [
        ("head.modulation.diff", "scale_shift_table"),
        ("diffusion_model.blocks.1.modulation.diff", "blocks.1.scale_shift_table"),
    ],
)
def test_modulation_spelt_as_a_parameter(key: str, parameter: str, expert: Any) -> None:
    diff = torch.ones_like(expert.get_parameter(parameter)).squeeze(0)
    expected = expert.get_parameter(parameter) + 1
    fuse(expert, normalise({key: diff}, expert))
    assert torch.equal(expert.get_parameter(parameter), expected)


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


def expert_like(wrapped: Any) -> Any:
    """The same network without PEFT layers."""
    return type(wrapped).from_config(wrapped.config)


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


def test_metadata_of_diffusers_keeps_alpha(expert: Any, tiny_wan_dit: Any, pipeline: Any, tmp_path: Path) -> None:
    from diffusers import WanImageToVideoPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    trained = tiny_wan_dit(36, 16)
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_q", "ffn.net.2"], alpha_pattern={"blocks.1.attn1.to_q": 3}
    )
    trained.add_adapter(config, adapter_name="default")
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    WanImageToVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained, adapter_name="default"),
        transformer_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
    )
    file = read_adapter_file(tmp_path)
    adapter = load_adapter(file, expert)
    assert adapter.deltas["blocks.0.attn1.to_q"].scale == pytest.approx(10 / 4)
    assert adapter.deltas["blocks.1.attn1.to_q"].scale == pytest.approx(3 / 4)
    theirs = pipeline()
    theirs.load_lora_weights(str(tmp_path))
    fuse(expert, adapter)
    assert (forward(expert) - forward(trained)).abs().max() < 1e-5
    assert (forward(expert) - forward(theirs.transformer)).abs().max() < 1e-5


def test_peft_folder_with_rslora(expert: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = expert_like(expert)
    base.load_state_dict(expert.state_dict())
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_k"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(str(tmp_path))
    adapter = load_adapter(read_adapter_file(tmp_path), expert)
    assert adapter.deltas["blocks.0.attn2.to_k"].scale == pytest.approx(6 / 2)
    fuse(expert, adapter)
    assert (forward(expert) - forward(base)).abs().max() < 1e-5
    plain = load_adapter(read_adapter_file(tmp_path / "adapter_model.safetensors", rslora=False), expert)
    assert plain.deltas["blocks.0.attn2.to_k"].scale == pytest.approx(6 / 4)


def test_rslora_needs_alpha(expert: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    with pytest.raises(AdapterError, match="alpha"):
        normalise(FORMATS["7-peft-raw"](known), expert, rule=AlphaRule(rslora=True))
    adapter = normalise(FORMATS["7-peft-raw"](known), expert, rule=AlphaRule(alpha=8, rslora=True))
    with_alpha = {name: (down, up, 8.0) for name, (down, up, _) in known.items()}
    expected = merged_by_hand(expert, with_alpha, rslora=True)
    fuse(expert, adapter)
    assert_state(expert, expected)


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


# ----------------------------------------------------------------------------------------------- refusals


def test_spurious_image_branch_is_left_out_and_said(expert: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    spurious = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 24),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(24, 2),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(24),
        "diffusion_model.img_emb.proj.1.diff_b": torch.ones(24),
    }
    adapter = normalise(FORMATS["1-native-no-alpha"](known) | spurious, expert)
    assert adapter.deltas.keys() == known.keys()
    assert not adapter.diffs
    assert len(adapter.notes) == 1
    assert "4 keys" in adapter.notes[0]
    assert "k_img" in adapter.notes[0]
    with pytest.raises(AdapterError, match="no LoRA weights"):
        normalise(spurious, expert)


def test_image_branch_is_read_where_the_network_has_one(tiny_wan_dit: Any) -> None:
    model = tiny_wan_dit(36, 16, image_dim=16, added_kv_proj_dim=24)
    known = known_lora(model, {"blocks.0.attn2.add_k_proj": "", "condition_embedder.image_embedder.ff.net.2": ""})
    state = down_up("diffusion_model.blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj", known)
    state |= down_up("diffusion_model.img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", known)
    assert normalise(state, model).deltas.keys() == known.keys()
    with pytest.raises(AdapterError, match="1 of 1 keys"):
        normalise({"diffusion_model.blocks.7.cross_attn.k_img.alpha": torch.ones(1)}, model)


def broken(known: Known) -> dict[str, tuple[dict[str, Tensor], str]]:
    good = FORMATS["1-native-comfyui"](known)
    stem = "diffusion_model.blocks.0.self_attn.q"
    extra_block = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in good.items()}
    return {
        "half matching": (good | extra_block, r"30 of 90 keys belong to no module.*blocks\.7"),
        "no down": ({k: v for k, v in good.items() if k != f"{stem}.lora_down.weight"}, "lacks down"),
        "no up": ({k: v for k, v in good.items() if k != f"{stem}.lora_up.weight"}, "lacks up"),
        "wrong width": (good | {f"{stem}.lora_down.weight": torch.ones(2, 23)}, r"\[2, 23\].*do not fit"),
        "wrong rank": (good | {f"{stem}.lora_up.weight": torch.ones(24, 9)}, "do not fit"),
        "wrong difference": (good | {f"{stem}.diff_b": torch.ones(5)}, r"\[5\]"),
        "bias of a norm without one": ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, "belong to no module"),
        "not a number": (good | {f"{stem}.lora_up.weight": torch.full((24, 2), math.nan)}, "not finite"),
        "alpha of zero": (good | {f"{stem}.alpha": torch.tensor(0.0)}, "alpha of blocks.0.attn1.to_q is 0"),
        "dora": (good | {f"{stem}.dora_scale": torch.ones(24, 1)}, "DoRA"),
        "loha": ({"lycoris_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        "twice": (good | {"blocks.0.self_attn.q.lora_up.weight": torch.ones(24, 2)}, "second up"),
        "other network": ({"lora_unet_down_blocks_0_attn_q.lora_down.weight": torch.ones(2, 24)}, "no module of this"),
        "empty": ({}, "holds no LoRA weights"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "half matching",
        "no down",
        "no up",
        "wrong width",
        "wrong rank",
        "wrong difference",
        "bias of a norm without one",
        "not a number",
        "alpha of zero",
        "dora",
        "loha",
        "twice",
        "other network",
        "empty",
    ],
)
def test_refused_in_one_line_and_nothing_changed(case: str, expert: Any) -> None:
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    state, message = broken(known_lora(expert, BLOCK_MODULES))[case]
    with pytest.raises(AdapterError, match=message) as caught:
        fuse(expert, load_adapter(AdapterFile("some.safetensors", state), expert))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("some.safetensors: ")
    assert all(torch.equal(expert.state_dict()[key], before[key]) for key in before)


def test_damaged_and_missing_files(expert: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), good)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not at all")
    pickled = tmp_path / "old.pt"
    torch.save({}, pickled)
    metadata = tmp_path / "metadata.safetensors"
    save_file({"a": torch.ones(1)}, metadata, metadata={"lora_adapter_metadata": "[1"})
    (tmp_path / "empty").mkdir()
    for path, message in (
        (truncated, "get it again"),
        (garbage, "get it again"),
        (pickled, "convert it to safetensors"),
        (metadata, "metadata"),
        (tmp_path / "nowhere.safetensors", "no LoRA file"),
        (tmp_path / "empty", "pass the LoRA file"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            read_adapter_file(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_dora_metadata_is_refused(tmp_path: Path) -> None:
    settings = json.dumps({"transformer.use_dora": True, "transformer.lora_alpha": 4})
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(AdapterError, match="DoRA"):
        read_adapter_file(tmp_path / "x.safetensors")


def test_quantised_weights_are_refused_before_anything_changes(expert: Any) -> None:
    adapter = normalise(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), expert)
    last = expert.blocks[1].ffn.net[2]
    last.to(torch.float8_e4m3fn)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    with pytest.raises(AdapterError, match="before quantising"):
        fuse(expert, adapter)
    assert all(torch.equal(expert.state_dict()[key].float(), before[key].float()) for key in before)


def test_names_in_use_are_refused(expert: Any) -> None:
    adapter = normalise({"blocks.0.diff_m": torch.zeros(1, 6, 24)}, expert)
    attach(expert, adapter, name="one")
    for name in ("one", "with.dot"):
        with pytest.raises(AdapterError, match=re.escape(repr(name))):
            attach(expert, adapter, name=name)


def test_no_two_modules_share_a_name(tiny_wan_dit: Any) -> None:
    model = tiny_wan_dit(36, 16, num_layers=12, image_dim=16, added_kv_proj_dim=24)
    names = ModuleNames(model)
    owners = {name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in names.shapes}
    for owner in owners:
        assert names.find(owner) == owner
        assert names.find("lora_unet_" + dots(owner)) == owner


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
