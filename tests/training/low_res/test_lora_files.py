"""Trained LoRAs on disk: read by our loader and by diffusers' own, in its format and with ComfyUI's keys."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers import WanImageToVideoPipeline
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_wan_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file

from swifti2v.errors import OutputError
from swifti2v.training.low_res.lora import LoraOptions, add_lora
from swifti2v.training.low_res.lora_files import export_comfyui, lora_state, save_lora
from swifti2v.wan.lora import fuse, load_adapter, read_adapter_file

RANK, ALPHA = 4, 10.0


@pytest.fixture
def trained(tiny_wan_dit):
    """A transformer with a LoRA of random numbers."""
    transformer = tiny_wan_dit(36, 16)
    add_lora(transformer, LoraOptions(rank=RANK, alpha=ALPHA))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return transformer


@pytest.fixture
def arguments():
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 36, 2, 4, 4, generator=generator)
    return latents, torch.tensor([900.0]), torch.randn(1, 5, 32, generator=generator)


def output(transformer, arguments) -> torch.Tensor:
    with torch.no_grad():
        return transformer(*arguments).sample


def saved(trained, folder):
    return save_lora(lora_state(trained), trained, folder)


def test_our_loader_reads_what_was_saved(trained, tiny_wan_dit, arguments, tmp_path) -> None:
    plain = tiny_wan_dit(36, 16)
    before = output(plain, arguments)
    fuse(plain, load_adapter(read_adapter_file(saved(trained, tmp_path)), plain))
    torch.testing.assert_close(output(plain, arguments), output(trained, arguments), atol=1e-4, rtol=1e-4)
    assert (output(plain, arguments) - before).abs().max() > 0.01


def test_diffusers_reads_what_was_saved_with_its_alpha(trained, tiny_wan_dit, arguments, tmp_path) -> None:
    saved(trained, tmp_path)
    plain = tiny_wan_dit(36, 16)
    plain.load_lora_adapter(tmp_path, prefix="transformer", use_safetensors=True)
    torch.testing.assert_close(output(plain, arguments), output(trained, arguments), atol=1e-5, rtol=1e-5)
    pipeline_state = WanImageToVideoPipeline.lora_state_dict(tmp_path)
    assert all(key.startswith("transformer.blocks.") for key in pipeline_state)


def test_the_metadata_holds_alpha_and_nothing_of_this_machine(trained, tmp_path) -> None:
    with safe_open(saved(trained, tmp_path), framework="pt") as file:
        text = file.metadata()["lora_adapter_metadata"]
    settings = json.loads(text)
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (RANK, ALPHA)
    assert str(tmp_path) not in text
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_comfyui_keys_are_those_of_wan_and_diffusers_converts_them_back(
    trained, tiny_wan_dit, arguments, tmp_path
) -> None:
    path = tmp_path / "comfyui.safetensors"
    export_comfyui(saved(trained, tmp_path), tiny_wan_dit(36, 16), path, dtype=torch.float32)
    tensors = load_file(path)
    pattern = r"diffusion_model\.blocks\.\d\.((self|cross)_attn\.[qkvo]|ffn\.[02])\.(lora_(down|up)\.weight|alpha)"
    assert all(re.fullmatch(pattern, key) for key in tensors)
    assert len(tensors) == 2 * 10 * 3
    assert {float(tensors[key]) for key in tensors if key.endswith("alpha")} == {ALPHA}
    converted = _convert_non_diffusers_wan_lora_to_diffusers(dict(tensors))
    for module in ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"):
        layer = trained.blocks[1].get_submodule(module)
        change = (
            converted[f"transformer.blocks.1.{module}.lora_B.weight"]
            @ converted[f"transformer.blocks.1.{module}.lora_A.weight"]
        )
        torch.testing.assert_close(change, layer.get_delta_weight("default"), atol=1e-5, rtol=1e-5)
    plain = tiny_wan_dit(36, 16)
    fuse(plain, load_adapter(read_adapter_file(path), plain))
    torch.testing.assert_close(output(plain, arguments), output(trained, arguments), atol=1e-4, rtol=1e-4)


def test_export_needs_names_only(trained, tmp_path) -> None:
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        names_only = WanTransformer3DModel.from_config(trained.config)
    export_comfyui(saved(trained, tmp_path), names_only, tmp_path / "half.safetensors")
    assert {tensor.dtype for key, tensor in load_file(tmp_path / "half.safetensors").items() if "lora" in key} == {
        torch.float16
    }


def test_a_folder_that_cannot_be_written_is_one_line(trained, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="make room and start again"):
        save_lora(lora_state(trained), trained, tmp_path / "file" / "lora")
