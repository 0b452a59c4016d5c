"""In bfloat16, Stage II's tokens stay in float32 between the layers, as under Wan's own autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from swifti2v.wan import transformer_block
from swifti2v.wan.transformer import StageTwoTransformer

SETTINGS = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 16,
    "ffn_dim": 256,
    "num_layers": 12,
    "in_channels": 48,
    "out_channels": 48,
}


@pytest.fixture(scope="module")
def stock() -> WanTransformer3DModel:
    """Diffusers' class, its weights those that bfloat16 can tell, the ones it keeps in float32 left so."""
    torch.manual_seed(0)
    made = WanTransformer3DModel(**SETTINGS).eval()
    for name, weight in made.named_parameters():
        if not any(kept in name for kept in WanTransformer3DModel._keep_in_fp32_modules):
            weight.data = weight.data.bfloat16()
    return made


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 48, 5, 8, 12, generator=generator).bfloat16().to(dtype)
    text = torch.randn(1, 7, 16, generator=generator).bfloat16().to(dtype)
    return latents, torch.tensor([[0.0, 0.0, 875.3, 875.3, 875.3]]), text


def relative_error(made: Tensor, exact: Tensor) -> float:
    return float((made.float() - exact).norm() / exact.norm())


@torch.no_grad()
def test_bfloat16_costs_less_than_half_of_what_it_does_in_diffusers_class(stock: WanTransformer3DModel) -> None:
    exact = StageTwoTransformer.from_wan(copy.deepcopy(stock).float())(*inputs(torch.float32)).sample
    latents, timestep, text = inputs(torch.bfloat16)
    theirs = stock(latents, timestep.repeat_interleave(4 * 6, dim=1), text).sample
    ours = StageTwoTransformer.from_wan(copy.deepcopy(stock))(latents, timestep, text).sample

    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < relative_error(theirs, exact) / 2


@torch.no_grad()
@pytest.mark.parametrize("wanted", [slice(0, 5), slice(2, 5)])
def test_a_window_in_parts_gives_the_same(
    stock: WanTransformer3DModel, wanted: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = StageTwoTransformer.from_wan(copy.deepcopy(stock))
    whole = network(*inputs(torch.bfloat16), output_frames=wanted).sample
    monkeypatch.setattr(transformer_block, "PART_TOKENS", 2 * 4 * 6)
    in_parts = network(*inputs(torch.bfloat16), output_frames=wanted).sample
    # Matrix products of other heights round otherwise: a few last places of bfloat16.
    assert relative_error(in_parts, whole.float()) < 2e-3


def test_with_gradients_tokens_are_in_the_dtype_of_the_work(stock: WanTransformer3DModel) -> None:
    network = StageTwoTransformer.from_wan(copy.deepcopy(stock))
    seen = []
    network.blocks[0].register_forward_pre_hook(lambda _block, arguments: seen.append(arguments[0].dtype))
    network(*inputs(torch.bfloat16))
    with torch.no_grad():
        network(*inputs(torch.bfloat16))
    assert seen == [torch.bfloat16, torch.float32]
