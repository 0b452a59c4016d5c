"""LoRA files: every format of keys against weights merged by hand and diffusers' own loader; what is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from swifti2v.errors import AdapterError
from swifti2v.wan.lora import (
    AdapterFile,
    AlphaRule,
    adapters_of_experts,
    fuse,
    load_adapter,
    normalize,
    read_adapter_file,
)
from swifti2v.wan.lora_keys import ModuleNames, route_experts
from tests.wan.lora_formats import (
    BLOCK_MODULES,
    FORMATS,
    MODULES,
    WITH_ALPHA,
    a_b,
    assert_state,
    dots,
    down_up,
    each,
    forward,
    known_lora,
    merged_by_hand,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor, nn

    from tests.wan.lora_formats import Known

QUERY = "blocks.0.attn1.to_q"


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def random_upward(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


# ---- formats


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_weights_merged_by_hand(name: str, expert: Any) -> None:
    known = known_lora(expert, MODULES, with_alpha=name in WITH_ALPHA)
    expected = merged_by_hand(expert, known, strength=0.7)
    adapter = normalize(FORMATS[name](known), expert)
    assert adapter.deltas.keys() == known.keys()
    fuse(expert, adapter, strength=0.7)
    assert_state(expert, expected)


@pytest.fixture
def pipeline(tiny_wan_dit: Any, tiny_vae21: Any, tiny_text_encoder: Any, tiny_tokenizer: Any) -> Callable[[], Any]:
    from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline

    return lambda: WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer,
        text_encoder=tiny_text_encoder,
        vae=tiny_vae21,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        transformer=tiny_wan_dit(36, 16),
        transformer_2=tiny_wan_dit(36, 16),
    )


@pytest.mark.parametrize("name", ["1-native-comfyui", "2-native-peft", "4-diffusers", "5-kohya"])
def test_same_result_as_diffusers_loader(name: str, expert: Any, pipeline: Callable[[], Any]) -> None:
    # diffusers reads `.alpha` in blocks only, and its kohya converter knows no other modules.
    known = known_lora(expert, BLOCK_MODULES if name in WITH_ALPHA else MODULES, with_alpha=name in WITH_ALPHA)
    state = FORMATS[name](known)
    theirs = pipeline()
    # Copies: its converter scales the tensors that it is given in place.
    theirs.load_lora_weights({key: tensor.clone() for key, tensor in state.items()}, adapter_name="few_step")
    fuse(expert, normalize(state, expert))
    assert (forward(expert) - forward(theirs.transformer)).abs().max() < 1e-5
    assert (forward(expert) - forward(theirs.transformer_2)).abs().max() > 1e-2


def test_metadata_of_diffusers_keeps_alpha(expert: Any, tiny_wan_dit: Any, pipeline: Any, tmp_path: Path) -> None:
    trained = tiny_wan_dit(36, 16)
    pattern = {"blocks.1.attn1.to_q": 3}
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "ffn.net.2"], alpha_pattern=pattern)
    trained.add_adapter(config, adapter_name="default")
    random_upward(trained)
    theirs = pipeline()
    theirs.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained, adapter_name="default"),
        transformer_lora_adapter_metadata=trained.peft_config["default"].to_dict(),
    )
    adapter = load_adapter(read_adapter_file(tmp_path), expert)
    assert adapter.deltas[QUERY].scale == pytest.approx(10 / 4)
    assert adapter.deltas["blocks.1.attn1.to_q"].scale == pytest.approx(3 / 4)
    theirs.load_lora_weights(str(tmp_path))
    fuse(expert, adapter)
    assert (forward(expert) - forward(trained)).abs().max() < 1e-5
    assert (forward(expert) - forward(theirs.transformer)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["rslora", "dora", "loha", "lokr", "lokr whole"])
def test_folders_of_peft(method: str, expert: Any, tiny_wan_dit: Any, tmp_path: Path) -> None:
    """PEFT's own layers are the oracle."""
    from peft import LoHaConfig, LoKrConfig

    config = {
        "rslora": LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_k"]),
        "dora": LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["to_k"]),
        "loha": LoHaConfig(r=3, alpha=6, target_modules=["to_k", "ffn.net.2"]),
        "lokr": LoKrConfig(r=2, alpha=6, decompose_both=True, target_modules=["to_k", "ffn.net.2"]),
        "lokr whole": LoKrConfig(r=64, alpha=64, target_modules=["to_k"]),
    }[method]
    base = tiny_wan_dit(36, 16)
    wrapped = get_peft_model(base, config)
    untouched = forward(expert)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in ("lora_B", "hada_", "lokr_")):
                parameter.normal_(std=0.3)
    wrapped.save_pretrained(str(tmp_path))
    fuse(expert, load_adapter(read_adapter_file(tmp_path, alpha=6 if method != "lokr whole" else None), expert))
    assert (forward(expert) - forward(base)).abs().max() < 2e-5
    assert (forward(expert) - untouched).abs().max() > 1e-3


def test_rslora_can_be_turned_off_and_needs_alpha(expert: Any, tmp_path: Path) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    state = FORMATS["7-peft-raw"](known)
    with pytest.raises(AdapterError):
        normalize(state, expert, rule=AlphaRule(rslora=True))
    with_alpha = {name: (down, up, 8.0) for name, (down, up, _) in known.items()}
    expected = merged_by_hand(expert, with_alpha, rslora=True)
    fuse(expert, normalize(state, expert, rule=AlphaRule(alpha=8, rslora=True)))
    assert_state(expert, expected)
    settings = json.dumps({"transformer.use_rslora": True, "transformer.lora_alpha": 8})
    save_file(state, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": settings})
    plain = load_adapter(read_adapter_file(tmp_path / "x.safetensors", rslora=False), expert)
    assert plain.deltas[QUERY].scale == 8 / plain.deltas[QUERY].rank


@pytest.mark.parametrize("where", ["keys", "metadata"])
def test_an_alpha_of_zero_is_no_effect(where: str, expert: Any, tmp_path: Path) -> None:
    state = FORMATS["1-native-no-alpha"](known_lora(expert, BLOCK_MODULES))
    if where == "keys":
        state |= {key.replace("lora_up.weight", "alpha"): torch.tensor(0.0) for key in state if "lora_up" in key}
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 0})} if where == "metadata" else None
    save_file(state, tmp_path / "zero.safetensors", metadata=metadata)
    before = copy_of(expert)
    fuse(expert, load_adapter(read_adapter_file(tmp_path / "zero.safetensors", alpha=4), expert))
    assert_state(expert, before, atol=0)


def test_dora_by_its_formula_in_part(expert: Any) -> None:
    """Norms of rows as LyCORIS saves them, half of the way."""
    known = known_lora(expert, {QUERY: ""})
    down, up, alpha = known[QUERY]
    weight = expert.get_parameter(f"{QUERY}.weight").detach().clone()
    norms = torch.rand(24, 1) + 0.5
    changed = weight + alpha / down.shape[0] * up @ down
    wanted = weight + 0.5 * (norms * changed / changed.norm(dim=1, keepdim=True) - weight)
    stem = f"lycoris_{dots(QUERY)}"
    fuse(expert, normalize(down_up(stem, QUERY, known) | {f"{stem}.dora_scale": norms}, expert), strength=0.5)
    torch.testing.assert_close(expert.get_parameter(f"{QUERY}.weight").detach(), wanted)


def difference_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`.diff` keys as LightX2V's extractor writes them, and the same by parameter name."""
    generator = torch.Generator().manual_seed(3)
    by_parameter: dict[str, Tensor] = {}
    keys: dict[str, Tensor] = {}
    for theirs, ours in (
        ("blocks.0.diff_m", "blocks.0.scale_shift_table"),
        ("blocks.1.modulation.diff", "blocks.1.scale_shift_table"),
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
    keys["diffusion_model.blocks.1.modulation.diff"] = by_parameter["blocks.1.scale_shift_table"].squeeze(0)
    return keys, by_parameter


def test_differences_are_added_to_weight_bias_and_modulation(expert: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    keys, by_parameter = difference_tensors(expert)
    expected = merged_by_hand(expert, known, strength=0.5)
    for name, diff in by_parameter.items():
        expected[name] = expected[name] + 0.5 * diff
    adapter = normalize(FORMATS["1-native-no-alpha"](known) | keys, expert)
    assert adapter.diffs.keys() == by_parameter.keys()
    fuse(expert, adapter, strength=0.5)
    assert_state(expert, expected)


def test_convolution_as_lora(expert: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = expert.patch_embedding.weight
    down = torch.randn(3, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], 3, 1, 1, 1, generator=generator)
    expected = weight + torch.einsum("orxyz,rcthw->octhw", up, down)
    fuse(expert, normalize({"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}, expert))
    assert torch.allclose(expert.patch_embedding.weight, expected, atol=1e-5)


def test_fusing_beneath_peft_layers(expert: Any, tiny_wan_dit: Any) -> None:
    """As in training: the few-step LoRA goes into the weights, the trained one stays beside them."""
    trained = tiny_wan_dit(36, 16)
    trained.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="trained")
    state = FORMATS["1-native-no-alpha"](known_lora(expert, BLOCK_MODULES)) | difference_tensors(expert)[0]
    for model in (expert, trained):
        fuse(model, normalize(state, model))
    assert torch.equal(trained.blocks[0].attn1.to_q.base_layer.weight, expert.blocks[0].attn1.to_q.weight)
    assert torch.equal(forward(trained), forward(expert))


def test_bfloat16_weights_are_rounded_once(expert: Any) -> None:
    expert.to(torch.bfloat16)
    known = known_lora(expert, BLOCK_MODULES)
    exact = {
        name: expert.get_submodule(name).weight.double() + alpha / down.shape[0] * up.double() @ down.double()
        for name, (down, up, alpha) in known.items()
    }
    fuse(expert, normalize(FORMATS["1-native-comfyui"](known), expert))
    for name, weight in exact.items():
        error = (expert.get_submodule(name).weight.double() - weight).abs()
        assert bool((error <= weight.abs() * 2**-8 + 1e-6).all()), name


# ---- names


def test_spurious_image_branch_is_left_out_and_reported(expert: Any) -> None:
    known = known_lora(expert, BLOCK_MODULES, with_alpha=False)
    spurious = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": torch.ones(2, 24),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": torch.ones(24, 2),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(24),
        "diffusion_model.img_emb.proj.1.diff_b": torch.ones(24),
    }
    adapter = normalize(FORMATS["1-native-no-alpha"](known) | spurious, expert)
    assert adapter.deltas.keys() == known.keys()
    assert not adapter.diffs
    (note,) = adapter.notes
    assert "4 keys" in note
    with pytest.raises(AdapterError):
        normalize(spurious, expert)


def test_image_branch_is_read_where_the_network_has_one(tiny_wan_dit: Any) -> None:
    model = tiny_wan_dit(36, 16, image_dim=16, added_kv_proj_dim=24)
    known = known_lora(model, {"blocks.0.attn2.add_k_proj": "", "condition_embedder.image_embedder.ff.net.2": ""})
    state = down_up("diffusion_model.blocks.0.cross_attn.k_img", "blocks.0.attn2.add_k_proj", known)
    state |= down_up("diffusion_model.img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2", known)
    assert normalize(state, model).deltas.keys() == known.keys()
    with pytest.raises(AdapterError, match="1 of 1 keys"):
        normalize({"diffusion_model.blocks.7.cross_attn.k_img.alpha": torch.ones(1)}, model)


def test_no_two_modules_share_a_name(tiny_wan_dit: Any) -> None:
    model = tiny_wan_dit(36, 16, num_layers=12, image_dim=16, added_kv_proj_dim=24)
    names = ModuleNames(model)
    owners = {name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in names.shapes}
    for owner in owners:
        assert names.find(owner) == owner
        assert names.find("lora_unet_" + dots(owner)) == owner


# ---- two experts


@pytest.mark.parametrize(
    "prefix", ["diffusion_model.transformer_{}.", "_orig_mod.transformer_{}.", "transformer.transformer_{}."]
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
    for name, network in (("high", high), ("low", low)):
        fuse(network, adapters[name])
        assert_state(network, expected[name])
    with pytest.raises(AdapterError, match="choose one"):
        load_adapter(file, high)


def test_diffusers_names_of_both_components() -> None:
    state = {f"{part}.{QUERY}.lora_A.weight": torch.zeros(1) for part in ("transformer", "transformer_2")}
    routed = route_experts(state)
    assert routed is not None
    assert {name: list(keys) for name, keys in routed.items()} == {
        "high": [f"transformer.{QUERY}.lora_A.weight"],
        "low": [f"{QUERY}.lora_A.weight"],
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


def test_half_routed_file_is_refused() -> None:
    state = {"diffusion_model.transformer_1.blocks.0.diff_m": torch.zeros(1, 6, 24), "blocks.0.diff_m": torch.zeros(1)}
    with pytest.raises(AdapterError, match="1 of 2 keys"):
        route_experts(state)


# ---- what is refused


def broken(known: Known) -> dict[str, dict[str, Tensor]]:
    good = FORMATS["1-native-comfyui"](known)
    stem = "diffusion_model.blocks.0.self_attn.q"
    return {
        "half matching": good | {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in good.items()},
        "no down": {key: tensor for key, tensor in good.items() if key != f"{stem}.lora_down.weight"},
        "no up": {key: tensor for key, tensor in good.items() if key != f"{stem}.lora_up.weight"},
        "wrong width": good | {f"{stem}.lora_down.weight": torch.ones(2, 23)},
        "wrong rank": good | {f"{stem}.lora_up.weight": torch.ones(24, 9)},
        "wrong difference": good | {f"{stem}.diff_b": torch.ones(5)},
        "bias of a norm without one": {"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)},
        "not a number": good | {f"{stem}.lora_up.weight": torch.full((24, 2), math.nan)},
        "negative alpha": good | {f"{stem}.alpha": torch.tensor(-1.0)},
        "norms of columns": good | {f"{stem}.dora_scale": torch.ones(1, 24)},
        "half a loha": {f"{stem}.hada_w1_a": torch.ones(24, 2), f"{stem}.hada_w1_b": torch.ones(2, 24)},
        "two methods": good | {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(6, 6)},
        "wrong lokr": {f"{stem}.lokr_w1": torch.ones(4, 4), f"{stem}.lokr_w2": torch.ones(5, 6)},
        "tucker": {f"{stem}.lora_mid.weight": torch.ones(2, 2)},
        "twice": good | {"blocks.0.self_attn.q.lora_up.weight": torch.ones(24, 2)},
        "other network": {"lora_unet_down_blocks_0_attn_q.lora_down.weight": torch.ones(2, 24)},
        "empty": {},
    }


@pytest.mark.parametrize("case", broken({QUERY: (torch.ones(2, 24), torch.ones(24, 2), 1.0)}))
def test_refused_in_one_line_and_nothing_changed(case: str, expert: Any) -> None:
    before = copy_of(expert)
    with pytest.raises(AdapterError) as caught:
        fuse(expert, load_adapter(AdapterFile("some.safetensors", broken(known_lora(expert, MODULES))[case]), expert))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("some.safetensors: ")
    assert_state(expert, before, atol=0)


def test_damaged_and_missing_files(expert: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), good)
    (tmp_path / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "garbage.safetensors").write_bytes(b"not at all")
    torch.save({}, tmp_path / "old.pt")
    dora = json.dumps({"transformer.use_dora": True})
    for name, metadata in (("metadata.safetensors", "[1"), ("dora.safetensors", dora)):
        save_file({"a": torch.ones(1)}, tmp_path / name, metadata={"lora_adapter_metadata": metadata})
    (tmp_path / "empty").mkdir()
    names = ("truncated", "garbage", "metadata", "dora", "nowhere")
    for path in (*(tmp_path / f"{name}.safetensors" for name in names), tmp_path / "old.pt", tmp_path / "empty"):
        with pytest.raises(AdapterError) as caught:
            read_adapter_file(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_quantized_weights_are_refused_before_anything_changes(expert: Any) -> None:
    adapter = normalize(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), expert)
    expert.blocks[1].ffn.net[2].to(torch.float8_e4m3fn)
    before = copy_of(expert)
    with pytest.raises(AdapterError, match="before quantizing"):
        fuse(expert, adapter)
    assert all(torch.equal(expert.state_dict()[key].float(), before[key].float()) for key in before)
