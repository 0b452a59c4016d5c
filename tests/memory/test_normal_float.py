"""Weights in four bits: NF4 against its definition and other ways to four bits, and all that runs such networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from swifti2v.errors import AdapterError
from swifti2v.memory.normal_float import BLOCK_SIZE, VALUES, NormalFloatLinear, pack, pack_blocks
from swifti2v.memory.placement import PlacedNetworks, store_weights, stored_narrow
from swifti2v.runner.acceleration import compile_blocks
from swifti2v.wan.adapters import AdapterWeights, LoraDelta, attach, fuse
from tests.wan.few_bits import CPU, relative_error, wan_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import UMT5EncoderModel

    from swifti2v.memory.ways import Placement


def nearest(weight: Tensor) -> Tensor:
    """Each block of 64, over its largest in bfloat16, at the nearest of the 16 values: by trying all of them."""
    blocks = weight.double().view(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(1, keepdim=True).bfloat16().double()
    values = torch.tensor(VALUES, dtype=torch.float64)
    places = (blocks / scale).unsqueeze(-1).sub(values).abs().argmin(-1)
    return (values[places] * scale).view_as(weight)


def integers(weight: Tensor) -> Tensor:
    """Each block at the nearest of 15 equal steps from its largest to the negative of that."""
    blocks = weight.view(-1, BLOCK_SIZE)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    return ((blocks / scale).round() * scale).view_as(weight)


def test_the_values_are_those_of_the_paper() -> None:
    """Its appendix: quantiles at equal distances, seven below zero, zero, eight above, over the largest."""
    normal, offset = torch.distributions.Normal(0, 1), (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(torch.tensor(VALUES, dtype=torch.float64), expected / expected.max(), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (24, 24), (37, 5)])
def test_the_weight_is_at_the_nearest_values(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(*shape, bias=bias)
    layer = NormalFloatLinear(exact, dtype=torch.float32)
    padded = nn.functional.pad(exact.weight.flatten(), (0, -exact.weight.numel() % BLOCK_SIZE))
    expected = nearest(padded)[: exact.weight.numel()].view_as(exact.weight)
    assert layer.weight.shape == (-(-exact.weight.numel() // BLOCK_SIZE) * BLOCK_SIZE // 2,)
    torch.testing.assert_close(layer.unpacked(torch.float64), expected, rtol=1e-6, atol=0)
    given = torch.randn(2, 10, shape[0])
    made, product = layer(given), given.double() @ expected.t()
    assert made.dtype == torch.float32
    assert relative_error(made, product + exact.bias.double() if bias else product) < 1e-5


@torch.no_grad()
def test_a_product_errs_less_than_with_integers_of_four_bits() -> None:
    """The choice: Gaussian weights 9.2% against 10.8%, Student's t with five degrees of freedom 10.5% and 14.6%."""
    torch.manual_seed(0)
    given = torch.randn(256, 1024)
    for weight, error, of_integers in (
        (torch.randn(1024, 1024), 0.092, 0.108),
        (torch.distributions.StudentT(5.0).sample((1024, 1024)), 0.105, 0.146),
    ):
        exact = nn.Linear(1024, 1024, bias=False)
        exact.weight.copy_(weight)
        expected = exact(given)
        found = relative_error(NormalFloatLinear(exact, dtype=torch.float32)(given), expected)
        assert found == pytest.approx(error, rel=0.03)
        assert relative_error(given @ integers(weight).t(), expected) == pytest.approx(of_integers, rel=0.03)


@torch.no_grad()
def test_blocks_of_zeros_stay_zeros_and_a_sign_is_kept() -> None:
    exact = nn.Linear(64, 4)
    exact.weight[1] = 0
    exact.weight[2], exact.weight[3] = 1, -1
    weight = NormalFloatLinear(exact, dtype=torch.float32).unpacked(torch.float32)
    for row, value in ((1, 0.0), (2, 1.0), (3, -1.0)):
        assert torch.equal(weight[row], torch.full((64,), value))


def test_a_weight_of_many_blocks_is_packed_as_its_parts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(128, 64)
    whole = pack(weight)
    monkeypatch.setattr("swifti2v.memory.normal_float.BLOCKS_AT_ONCE", 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, pack(weight), strict=True))


def test_the_linear_layers_of_the_blocks_and_no_others_are_packed(tiny_wan_dit: Callable[..., Any]) -> None:
    network = tiny_wan_dit()
    expected = wan_output(network)
    before = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert stored_narrow(network) is None
    store_weights(network, "nf4", compute_dtype=torch.float32)
    packed = {name for name, module in network.named_modules() if isinstance(module, NormalFloatLinear)}
    assert packed == {name for name in before if name.startswith("blocks.")}
    assert len(packed) == 2 * 10
    assert stored_narrow(network) == "nf4"
    assert network.dtype == torch.float32
    found = wan_output(network)
    assert 1e-3 < relative_error(found, expected) < 0.2
    for dtype in ("nf4", "float8"):  # what is packed is not stored again
        store_weights(network, dtype, compute_dtype=torch.float32)
        assert torch.equal(wan_output(network), found)


@torch.no_grad()
def test_a_text_encoder_is_packed_with_the_layers_whose_dtype_transformers_looks_at(
    tiny_text_encoder: UMT5EncoderModel,
) -> None:
    encoder, ids = tiny_text_encoder.to(torch.bfloat16), torch.arange(9).view(1, -1)
    expected = encoder(ids).last_hidden_state
    store_weights(encoder, "nf4", compute_dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    packed = [name for name, module in encoder.named_modules() if isinstance(module, NormalFloatLinear)]
    assert len(packed) == 2 * 7
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in packed
    found = encoder(ids).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert 1e-3 < relative_error(found, expected) < 0.2


def test_weights_in_float8_can_be_packed_still(tiny_wan_dit: Callable[..., Any]) -> None:
    """A run may find no room for parked features beside the float8 that the loader has chosen."""
    network, packed = tiny_wan_dit(), tiny_wan_dit()
    expected = wan_output(network)
    store_weights(network, "float8", compute_dtype=torch.float32)
    store_weights(network, "nf4", compute_dtype=torch.float32)
    store_weights(packed, "nf4", compute_dtype=torch.float32)
    assert stored_narrow(network) == "nf4"
    assert network.blocks[0].attn1.to_q.bias.dtype == torch.float32
    once, twice = (relative_error(wan_output(each), expected) for each in (packed, network))
    assert twice < 1.5 * once


@pytest.mark.parametrize("placement", ["resident", "loaded", "streamed"])
def test_placed_networks_give_the_same_output(tiny_wan_dit: Callable[..., Any], placement: Placement) -> None:
    network = tiny_wan_dit(num_layers=3)
    pack_blocks(network, dtype=torch.float32)
    expected = wan_output(network)
    networks = PlacedNetworks(CPU)
    networks.place(network, placement, group="one")
    assert torch.equal(wan_output(network), expected)
    networks.release()
    assert torch.equal(wan_output(network), expected)


@torch.no_grad()
def test_a_packed_text_encoder_streams_by_layer(tiny_text_encoder: UMT5EncoderModel) -> None:
    ids = torch.arange(9).view(1, -1)
    pack_blocks(tiny_text_encoder, dtype=torch.float32)
    expected = tiny_text_encoder(ids).last_hidden_state
    networks = PlacedNetworks(CPU)
    networks.place(tiny_text_encoder, "streamed", group="text", by_leaf=True)
    layer = tiny_text_encoder.encoder.block[0].layer[0].SelfAttention.q
    assert layer._diffusers_hook.hooks  # a group of its own, as any linear layer
    assert torch.equal(tiny_text_encoder(ids).last_hidden_state, expected)
    networks.release()


def test_streaming_takes_the_weights_along_on_a_stream_of_its_own(tiny_wan_dit: Callable[..., Any]) -> None:
    """What diffusers keeps of a block on the host for a CUDA stream are other tensors than the block works with."""
    from diffusers.hooks.group_offloading import ModuleGroup

    network = tiny_wan_dit()
    pack_blocks(network, dtype=torch.float32)
    layer = network.blocks[0].attn1.to_q
    kept = {name: ModuleGroup._to_cpu(buffer, low_cpu_mem_usage=True) for name, buffer in layer.named_buffers()}
    assert set(kept) == {"weight", "scale", "pairs"}
    values = {name: value.clone() for name, value in kept.items()}
    for name, buffer in layer.named_buffers():
        buffer.data = torch.zeros_like(kept[name])
    assert all(torch.equal(kept[name], values[name]) for name in kept)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output(tiny_wan_dit: Callable[..., Any]) -> None:
    network = tiny_wan_dit()
    pack_blocks(network, dtype=torch.float32)
    expected = wan_output(network)
    torch._dynamo.reset()
    compile_blocks([network], backend="aot_eager")
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = sum(breaks.values())
    torch.testing.assert_close(wan_output(network), expected, rtol=1e-5, atol=1e-6)
    assert sum(breaks.values()) == before


def test_loras_go_into_the_weights_before_they_are_packed(tiny_wan_dit: Callable[..., Any]) -> None:
    name = "blocks.0.attn1.to_q"
    delta = LoraDelta(down=torch.randn(2, 24), up=torch.randn(24, 2), scale=1.0)
    lora = AdapterWeights(deltas={name: delta}, diffs={}, notes=())
    network = tiny_wan_dit()
    attached = attach(network, lora, name="one")
    with pytest.raises(AdapterError, match=rf"a LoRA is attached to {name}; fuse it before"):
        pack_blocks(network, dtype=torch.float32)
    assert stored_narrow(network) is None
    attached.remove()
    pack_blocks(network, dtype=torch.float32)
    with pytest.raises(AdapterError, match="fuse it before quantising"):
        fuse(network, lora)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_card_unpacks_what_the_cpu_has_packed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = NormalFloatLinear(nn.Linear(192, 320).to(dtype), dtype=dtype)
    expected = layer.unpacked(dtype)
    given = torch.randn(7, 192, dtype=dtype)
    product = layer(given)
    card = layer.to("cuda")
    assert torch.equal(card.unpacked(dtype).cpu(), expected)
    assert relative_error(card(given.cuda()).cpu(), product) < 0.01
    packed_there = pack(torch.randn(320, 192, generator=torch.Generator().manual_seed(1)).cuda())
    packed_here = pack(torch.randn(320, 192, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(one.cpu(), other) for one, other in zip(packed_there, packed_here, strict=True))
    layer = NormalFloatLinear(nn.Linear(192, 320), dtype=dtype)
    layer.take_weight(torch.randn(320, 192, generator=torch.Generator().manual_seed(1)), device=torch.device("cuda"))
    assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}
    assert torch.equal(layer.weight, packed_here[0])
