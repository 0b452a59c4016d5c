"""Every LoRA key format against weights merged by hand, and against diffusers' own loader where it reads the format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import AdapterError
from swifti2v.wan.adapter_keys import ModuleNames
from swifti2v.wan.adapters import (
    AlphaRule,
    attach,
    fuse,
    load_adapter,
    normalise,
    read_adapter_file,
)
from tests.wan.lora_formats import (
    BLOCK_MODULES,
    FORMATS,
    MODULES,
    WITH_ALPHA,
    assert_state,
    dots,
    down_up,
    expert_like,
    forward,
    known_lora,
    merged_by_hand,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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


def test_no_two_modules_share_a_name(tiny_wan_dit: Any) -> None:
    model = tiny_wan_dit(36, 16, num_layers=12, image_dim=16, added_kv_proj_dim=24)
    names = ModuleNames(model)
    owners = {name.rpartition(".")[0] if name.endswith((".weight", ".bias")) else name for name in names.shapes}
    for owner in owners:
        assert names.find(owner) == owner
        assert names.find("lora_unet_" + dots(owner)) == owner
