"""NF4, float8 and int8 layers: the arithmetic against its definition, networks that use them, and what is refused."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from swifti2v.errors import AdapterError, InvalidInputError, MemoryBudgetError
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.runner.acceleration import compile_blocks
from swifti2v.segments import FrameKind
from swifti2v.wan.context_attention import KVCache
from swifti2v.wan.lora import AdapterWeights, LoraDelta, fuse
from swifti2v.wan.quantized_linear import (
    LAYERS,
    NF4_BLOCK,
    NF4_VALUES,
    Float8Linear,
    Int8Linear,
    Nf4Linear,
    Quantization,
    QuantizedLinear,
    block_linears,
    check_quantized_device,
    quantization_of,
    store_weights,
    stored_narrow,
    use_quantized_matmul,
)
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import UMT5EncoderModel

    from swifti2v.memory.ways import Placement
    from swifti2v.wan.quantized_linear import WeightDtype
    from swifti2v.wan.transformer_configuration import ContextAttention

CPU = torch.device("cpu")
WIDE = {"attention_head_dim": 16}  # two heads of it: 32, where the tiny networks have 24
QUERY = "blocks.0.attn1.to_q"
each_matmul = pytest.mark.parametrize("kind", ["float8", "int8"])
each_kind = pytest.mark.parametrize("kind", ["float8", "int8", "nf4"])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def layer_of(kind: str, linear: nn.Linear) -> QuantizedLinear:
    return Nf4Linear(linear, dtype=linear.weight.dtype) if kind == "nf4" else LAYERS[kind](linear)


def quantize(network: Any, kind: Any) -> Any:
    if kind == "nf4":
        store_weights(network, "nf4", compute_dtype=torch.float32)
    else:
        use_quantized_matmul([network], kind, device=CPU)
    return network


def wan_output(network: Any) -> Tensor:
    """Return the output of diffusers' own transformer of 48 channels for four latent frames."""
    torch.manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(1, 48, 4, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 32)).sample


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96, bias=bias).to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different size each, as those of a network are."""
    torch.manual_seed(1)
    return (torch.randn(2, 10, 64) * torch.logspace(-3, 3, 10)[:, None]).to(dtype)


# ---- arithmetic


def float8_values() -> Tensor:
    """All finite numbers of e4m3 from its definition: four bits of exponent, bias 7, three of mantissa, no infinity."""
    small = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    others = [
        (1 + mantissa / 8) * 2.0 ** (e - 7) for e in range(1, 16) for mantissa in range(8) if (e, mantissa) != (15, 7)
    ]
    positive = torch.tensor(small + others, dtype=torch.float64)
    return torch.cat([-positive, positive]).unique()


def nearest(rows: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    places = (rows.double() / scale).unsqueeze(-1).sub(values).abs().argmin(-1)
    return values[places] * scale


def nearest_float8(rows: Tensor) -> Tensor:
    return nearest(rows, float8_values(), rows.double().abs().amax(-1, keepdim=True) / 448)


def nearest_nf4(weight: Tensor) -> Tensor:
    """Each block of 64, divided by its largest in bfloat16, at the nearest of the 16 values."""
    flat = nn.functional.pad(weight.flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scale = flat.double().abs().amax(1, keepdim=True).bfloat16().double()
    return (
        nearest(flat, torch.tensor(NF4_VALUES, dtype=torch.float64), scale).flatten()[: weight.numel()].view_as(weight)
    )


def integers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its largest times 127 in whole numbers, halves to the even one, and the scales."""
    scale = rows.float().abs().amax(-1, keepdim=True) / 127
    return (rows.float() / scale).double().round().long(), scale.double()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_float8_matmul_is_that_of_rows_at_the_nearest_float8_values(bias: bool) -> None:
    exact, given = linear(bias=bias), tokens()
    expected = nearest_float8(given) @ nearest_float8(exact.weight).t()
    if bias:
        expected += exact.bias.double()
    found = Float8Linear(exact)(given)
    assert (found.shape, found.dtype) == (torch.Size([2, 10, 96]), torch.float32)
    # A tie, or a rounding of the scale, may put a number at the other neighbor.
    assert relative_error(found, expected) < 2e-3
    assert 0.01 < relative_error(found, exact(given)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_matmul_is_that_of_torchao(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Float8MMConfig, Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    exact, given = linear(dtype=dtype), tokens(dtype)
    # What quantize_ with Float8DynamicActivationFloat8WeightConfig makes of a weight, on the devices it allows.
    theirs = Float8Tensor.from_hp(
        exact.weight.detach(),
        granularity=PerRow(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(granularity=PerRow()),
    )
    found = Float8Linear(exact)(given)
    expected = nn.functional.linear(given, theirs, exact.bias)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    # Ours divides in bfloat16: some numbers go to their other neighbor, no farther away.
    error = relative_error(expected, exact(given))
    assert error > 0.01
    assert relative_error(found, exact(given)) == pytest.approx(error, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_matmul_is_that_of_whole_numbers(bias: bool, dtype: torch.dtype) -> None:
    exact, given = linear(bias=bias, dtype=dtype), tokens(dtype)
    (rows, scale), (weight, weight_scale) = integers(given), integers(exact.weight)
    assert rows.abs().amax() == weight.abs().amax() == 127
    expected = (rows @ weight.t()).double() * scale * weight_scale.t()
    if bias:
        expected += exact.bias.double()
    found = Int8Linear(exact)(given)
    assert (found.shape, found.dtype) == (torch.Size([2, 10, 96]), dtype)
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
    error = relative_error(found, exact(given))
    assert 0.003 < error < 0.02
    assert error < 0.4 * relative_error(Float8Linear(exact)(given), exact(given))  # seven bits against three


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 17, 31, 32, 33, 64, 97])
def test_int8_matmul_of_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Few are padded, as the kernel wants it on a card; many are multiplied a part at a time. No token is changed."""
    layer = Int8Linear(linear())
    given = torch.randn(97, 64)
    expected = torch.cat([layer(row[None]) for row in given])[:num_rows]
    monkeypatch.setattr("swifti2v.wan.quantized_linear.ROWS_AT_ONCE", 32)
    asked, multiply = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: asked.append(one.shape) or multiply(one, other))
    assert torch.equal(layer(given[:num_rows]), expected)
    assert {shape[0] for shape in asked} == {32}
    assert len(asked) == -(-num_rows // 32)


@torch.no_grad()
@each_matmul
def test_zeros_stay_zeros_and_tokens_do_not_depend_on_each_other(kind: Quantization) -> None:
    """So parts of a window, and the shares of several cards (Ulysses), are what they are in the whole."""
    exact, given = linear(), tokens()
    exact.weight[3] = 0
    given[0, 2] = 0
    layer = LAYERS[kind](exact)
    found = layer(given)
    assert torch.equal(found[0, 2], exact.bias)
    assert torch.equal(found[..., 3], exact.bias[3].expand(2, 10))
    assert found.isfinite().all()
    assert torch.equal(torch.cat([layer(given[:, :3]), layer(given[:, 3:])], dim=1), found)


def test_nf4_values_are_those_of_the_paper() -> None:
    """Its appendix: quantiles at equal distances, seven below zero, zero, eight above, divided by the largest."""
    normal, offset = torch.distributions.Normal(0, 1), (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    actual = torch.tensor(NF4_VALUES, dtype=torch.float64)
    torch.testing.assert_close(actual, expected / expected.max(), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 96), (24, 24), (37, 5)])
def test_nf4_weights_are_at_the_nearest_values(
    shape: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    exact = nn.Linear(*shape, bias=bias)
    layer, expected = Nf4Linear(exact, dtype=torch.float32), nearest_nf4(exact.weight)
    assert layer.weight.shape == (-(-exact.weight.numel() // NF4_BLOCK) * NF4_BLOCK // 2,)
    torch.testing.assert_close(layer.dequantized(torch.float64), expected, rtol=1e-6, atol=0)
    given = torch.randn(2, 10, shape[0])
    made, product = layer(given), given.double() @ expected.t()
    assert made.dtype == torch.float32
    assert relative_error(made, product + exact.bias.double() if bias else product) < 1e-5
    whole = Nf4Linear.quantize(exact.weight)
    monkeypatch.setattr("swifti2v.wan.quantized_linear.BLOCKS_AT_ONCE", 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, Nf4Linear.quantize(exact.weight), strict=True))


@torch.no_grad()
def test_nf4_matmul_errs_less_than_with_integers_of_four_bits() -> None:
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
        found = relative_error(Nf4Linear(exact, dtype=torch.float32)(given), expected)
        assert found == pytest.approx(error, rel=0.03)
        blocks = weight.view(-1, NF4_BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / 7
        rounded = ((blocks / scale).round() * scale).view_as(weight)
        assert relative_error(given @ rounded.t(), expected) == pytest.approx(of_integers, rel=0.03)


@torch.no_grad()
def test_nf4_blocks_of_zeros_stay_zeros_and_a_sign_is_kept() -> None:
    exact = nn.Linear(64, 4)
    exact.weight[1] = 0
    exact.weight[2], exact.weight[3] = 1, -1
    weight = Nf4Linear(exact, dtype=torch.float32).dequantized(torch.float32)
    for row, value in ((1, 0.0), (2, 1.0), (3, -1.0)):
        assert torch.equal(weight[row], torch.full((64,), value))


# ---- networks


@each_kind
def test_the_linear_layers_of_the_blocks_and_no_others_are_replaced(
    tiny_wan_dit: Callable[..., Any], kind: WeightDtype
) -> None:
    network = tiny_wan_dit(**WIDE)
    quantize(network, "none")
    assert (quantization_of(network), stored_narrow(network)) == ("none", None)
    expected = wan_output(network)
    quantize(network, kind)
    assert quantization_of(network) == ("none" if kind == "nf4" else kind)
    assert stored_narrow(network) == kind
    projections = [f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    names = {f"blocks.{b}.{leaf}" for b in range(2) for leaf in (*projections, "ffn.net.0.proj", "ffn.net.2")}
    assert {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)} == names
    assert network.dtype == network.proj_out.weight.dtype == torch.float32
    assert not list(block_linears(network))
    found = wan_output(network)
    assert 1e-4 < relative_error(found, expected) < (0.2 if kind == "nf4" else 0.05)
    for dtype in ("float8", "nf4"):  # what holds few bits is not stored again
        store_weights(network, dtype, compute_dtype=torch.float32)
        assert torch.equal(wan_output(network), found)


@torch.no_grad()
def test_a_text_encoder_with_the_layers_whose_dtype_transformers_looks_at(tiny_text_encoder: UMT5EncoderModel) -> None:
    encoder, ids = tiny_text_encoder.to(torch.bfloat16), torch.arange(9).view(1, -1)
    expected = encoder(ids).last_hidden_state
    store_weights(encoder, "nf4", compute_dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    packed = [name for name, module in encoder.named_modules() if isinstance(module, Nf4Linear)]
    assert len(packed) == 2 * 7
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in packed
    found = encoder(ids).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert 1e-3 < relative_error(found, expected) < 0.2

    networks = PlacedNetworks(CPU)
    networks.place(encoder, "streamed", group="text", by_leaf=True)
    layer = encoder.encoder.block[0].layer[0].SelfAttention.q
    assert layer._diffusers_hook.hooks  # a group of its own, as any linear layer
    assert torch.equal(encoder(ids).last_hidden_state, found)
    networks.release()


def test_float8_storage_keeps_the_dtype_of_the_work(
    tiny_wan_dit: Callable[..., Any], tiny_text_encoder: UMT5EncoderModel
) -> None:
    network = tiny_wan_dit(num_layers=1)
    expected = wan_output(network)
    store_weights(network, "bfloat16", compute_dtype=torch.float32)
    assert torch.equal(wan_output(network), expected)
    store_weights(network, "float8", compute_dtype=torch.float32)
    assert network.blocks[0].ffn.net[2].weight.dtype == torch.float8_e4m3fn
    assert network.blocks[0].norm2.weight.dtype == torch.float32
    actual = wan_output(network)
    assert actual.dtype == torch.float32
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0.2, atol=0.2 * float(expected.abs().max()))
    with pytest.raises(MemoryBudgetError):
        store_weights(network, "int8", compute_dtype=torch.float32)
    # Pipelines cast the embedding to the encoder's dtype, that of its first parameter: the token table.
    encoder = tiny_text_encoder.to(torch.bfloat16)
    store_weights(encoder, "float8", compute_dtype=torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert encoder.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float8_e4m3fn


def test_weights_in_float8_can_still_be_stored_in_nf4(tiny_wan_dit: Callable[..., Any]) -> None:
    """A run may find no room for offloaded features beside the float8 that the loader has chosen."""
    network, packed = tiny_wan_dit(), tiny_wan_dit()
    expected = wan_output(network)
    store_weights(network, "float8", compute_dtype=torch.float32)
    for each in (network, packed):
        store_weights(each, "nf4", compute_dtype=torch.float32)
    assert stored_narrow(network) == "nf4"
    assert network.blocks[0].attn1.to_q.bias.dtype == torch.float32
    once, twice = (relative_error(wan_output(each), expected) for each in (packed, network))
    assert twice < 1.5 * once


@pytest.mark.parametrize("placement", ["resident", "loaded", "streamed"])
@each_kind
def test_placed_networks_give_the_same_output(
    tiny_wan_dit: Callable[..., Any], placement: Placement, kind: str
) -> None:
    network = quantize(tiny_wan_dit(**WIDE, num_layers=3), kind)
    expected = wan_output(network)
    networks = PlacedNetworks(CPU)
    networks.place(network, placement, group="one")
    assert torch.equal(wan_output(network), expected)
    networks.release()
    assert torch.equal(wan_output(network), expected)


@each_kind
def test_streaming_takes_the_weights_along_on_a_stream_of_its_own(tiny_wan_dit: Callable[..., Any], kind: str) -> None:
    """What diffusers keeps of a block on the host for a CUDA stream are other tensors than the block works with."""
    from diffusers.hooks.group_offloading import ModuleGroup

    layer = quantize(tiny_wan_dit(**WIDE), kind).blocks[0].attn1.to_q
    kept = {name: ModuleGroup._to_cpu(buffer, low_cpu_mem_usage=True) for name, buffer in layer.named_buffers()}
    assert set(kept) == {"weight", "scale", *(["pairs"] if kind == "nf4" else [])}
    values = {name: value.float().clone() for name, value in kept.items()}
    for name, buffer in layer.named_buffers():
        buffer.data = torch.zeros_like(kept[name])
    assert all(torch.equal(kept[name].float(), values[name]) for name in kept)


@pytest.mark.slow
@each_kind
def test_compiled_blocks_give_the_same_output(tiny_wan_dit: Callable[..., Any], kind: str) -> None:
    network = quantize(tiny_wan_dit(**WIDE), kind)
    expected = wan_output(network)
    torch._dynamo.reset()
    compile_blocks([network], backend="aot_eager" if kind == "nf4" else "eager")
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = sum(breaks.values())
    for _ in range(2):
        torch.testing.assert_close(wan_output(network), expected, rtol=1e-5, atol=1e-6)
    assert sum(breaks.values()) == before


def stage_two(context_attention: ContextAttention) -> StageTwoTransformer:
    torch.manual_seed(0)
    sizes = {"text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "num_attention_heads": 2}
    network = StageTwoTransformer(**sizes, **WIDE, context_attention=context_attention).eval()
    nn.init.normal_(network.frame_kind_table, std=0.3)
    return network


def output(network: Any, frames: slice = slice(0, 4), **more: Any) -> Tensor:
    """Of a window of an anchor and three targets, or of some of its frames."""
    torch.manual_seed(1)
    latents, text = torch.randn(1, 48, 4, 4, 6), torch.randn(1, 5, 32)
    times = torch.tensor([[0.0, 500.0, 500.0, 500.0]])
    kinds = torch.tensor([FrameKind.ANCHOR, *[FrameKind.TARGET] * 3])[frames]
    with torch.no_grad():
        return network(latents[:, :, frames], times[:, frames], text, frame_kinds=kinds, **more).sample


@pytest.mark.parametrize("context_attention", ["bidirectional", "frozen"])
@each_matmul
def test_stage_two_with_cached_text_wanted_frames_and_cached_context(
    context_attention: ContextAttention, kind: Quantization
) -> None:
    network, targets = stage_two(context_attention), slice(1, 4)
    exact = output(network)
    quantize(network, kind)
    expected = output(network)
    assert 1e-4 < relative_error(expected, exact) < 0.05
    with network.text_kept():
        for _ in range(2):
            torch.testing.assert_close(output(network), expected, rtol=0, atol=1e-5)
        wanted = output(network, output_frames=targets)
        torch.testing.assert_close(wanted, expected[:, :, targets], rtol=0, atol=1e-5)
    if context_attention == "frozen":
        cache = KVCache(len(network.blocks))
        output(network, kv_cache=cache)
        found = output(network, targets, frame_positions=torch.arange(1, 4), kv_cache=cache)
        torch.testing.assert_close(found, expected[:, :, targets], rtol=0, atol=1e-5)


# ---- what is refused


@each_kind
def test_loras_go_into_the_weights_before_they_are_quantized(tiny_wan_dit: Callable[..., Any], kind: str) -> None:
    network, adapted, fused = (tiny_wan_dit(**WIDE) for _ in range(3))
    delta = LoraDelta(down=torch.randn(2, 32), up=torch.randn(32, 2), scale=1.0)
    lora = AdapterWeights(deltas={QUERY: delta}, diffs={})
    adapted.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    run = partial(quantize, adapted, kind)
    if kind != "nf4":
        run = partial(use_quantized_matmul, [network, adapted], kind, device=CPU)
    with pytest.raises(AdapterError, match=rf"a LoRA is attached to {QUERY}; fuse it before"):
        run()
    assert stored_narrow(network) is stored_narrow(adapted) is None  # all or nothing
    quantize(network, kind)
    with pytest.raises(AdapterError, match="fuse it before quantizing"):
        fuse(network, lora)
    fuse(fused, lora)
    assert not torch.equal(wan_output(quantize(fused, kind)), wan_output(network))


@each_matmul
@pytest.mark.parametrize("dtype", ["float8", "nf4"])
def test_what_is_stored_narrow_gets_no_quantized_matmul(
    tiny_wan_dit: Callable[..., Any], kind: Quantization, dtype: WeightDtype
) -> None:
    network = tiny_wan_dit(**WIDE)
    store_weights(network, dtype, compute_dtype=torch.float32)
    with pytest.raises(InvalidInputError, match=rf"stored in {dtype} already, .* or use quantization none"):
        quantize(network, kind)


@pytest.mark.parametrize(("kind", "first", "way_out"), [("float8", (8, 9), "int8 or none"), ("int8", (8, 0), "none")])
def test_devices_without_such_a_matmul_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_wan_dit: Callable[..., Any], kind: Quantization, first: Any, way_out: str
) -> None:
    card, capabilities = (
        torch.device("cuda", 0),
        [(8, 6) if kind == "float8" else (7, 5), first, (9, 0), (12, 0), first],
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capabilities.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some card")
    with pytest.raises(InvalidInputError, match=rf"^some card .* use quantization {way_out}$"):
        use_quantized_matmul([tiny_wan_dit(**WIDE)], kind, device=card)
    for _ in range(3):
        check_quantized_device(kind, card)
    with pytest.raises(InvalidInputError):
        check_quantized_device(kind, torch.device("mps"))
    check_quantized_device("none", torch.device("mps"))
    if kind == "float8":
        with pytest.raises(InvalidInputError, match=r"blocks\.0\.attn1\.to_q has torch\.float32; load it as bfloat16"):
            use_quantized_matmul([tiny_wan_dit(**WIDE)], kind, device=card)


@each_matmul
def test_sides_that_the_kernels_do_not_take_are_refused(tiny_wan_dit: Callable[..., Any], kind: Quantization) -> None:
    network = tiny_wan_dit(attention_head_dim=10)  # two heads of it
    with pytest.raises(InvalidInputError, match=rf"is 20 by 20, .* multiples of {LAYERS[kind].side_multiple}; use"):
        quantize(network, kind)
    assert quantization_of(network) == "none"


# ---- on a card


@pytest.mark.gpu
@torch.no_grad()
@each_matmul
def test_a_card_gives_the_numbers_of_the_cpu_and_compiles(kind: Quantization, tiny_wan_dit: Callable[..., Any]) -> None:
    card, layer = torch.device("cuda"), LAYERS[kind]
    if torch.cuda.get_device_capability(card) < layer.least_capability:
        pytest.skip(f"no card with {kind} matmul")
    for num_tokens in (1, 17, 40, 5000):
        exact = linear(dtype=torch.bfloat16)
        given = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
        expected = layer(exact)(given)
        found = layer(exact, device=card).to(card)(given.to(card))
        assert relative_error(found.cpu(), expected) < 0.01
    network = tiny_wan_dit(**WIDE).to(card, torch.bfloat16)
    use_quantized_matmul([network], kind, device=card)
    latents = torch.randn(1, 48, 4, 8, 8, device=card, dtype=torch.bfloat16)
    text, times = torch.randn(1, 16, 32, device=card, dtype=torch.bfloat16), torch.tensor([500.0], device=card)
    expected = network(latents, times, text).sample
    torch._dynamo.reset()
    compile_blocks([network])
    assert relative_error(network(latents, times, text).sample, expected) < 0.05


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_card_dequantizes_what_the_cpu_has_quantized(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Nf4Linear(nn.Linear(192, 320).to(dtype), dtype=dtype)
    expected = layer.dequantized(dtype)
    given = torch.randn(7, 192, dtype=dtype)
    product = layer(given)
    card = layer.to("cuda")
    assert torch.equal(card.dequantized(dtype).cpu(), expected)
    assert relative_error(card(given.cuda()).cpu(), product) < 0.01
    weight = torch.randn(320, 192, generator=torch.Generator().manual_seed(1))
    here = Nf4Linear.quantize(weight)
    assert all(torch.equal(one.cpu(), two) for one, two in zip(Nf4Linear.quantize(weight.cuda()), here, strict=True))
    layer = Nf4Linear(nn.Linear(192, 320), dtype=dtype)
    layer.take_weight(weight, device=torch.device("cuda"))
    assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}
    assert torch.equal(layer.weight, here[0])
