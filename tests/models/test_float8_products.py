"""Float8 products: the arithmetic against independent ones, which layers get them, and all that runs such a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from swifti2v.errors import AdapterError, InvalidInputError
from swifti2v.memory.placement import PlacedNetworks, is_stored_narrow, store_weights
from swifti2v.models.adapters import AdapterWeights, LoraDelta, attach, fuse
from swifti2v.models.context_attention import ContextMemory
from swifti2v.models.float8_products import (
    LEAST_CAPABILITY,
    Float8Linear,
    block_linears,
    check_float8_device,
    has_float8_products,
    use_float8_products,
)
from swifti2v.models.transformer import StageTwoTransformer
from swifti2v.pipelines.acceleration import compile_blocks
from swifti2v.segments import FrameKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from swifti2v.memory.plan import Placement
    from swifti2v.models.transformer_configuration import ContextAttention

CPU = torch.device("cpu")
WIDE = {"attention_head_dim": 16}  # two heads of it: 32, where the tiny networks have 24


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96, bias=bias).to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different size each, as those of a network are."""
    torch.manual_seed(1)
    return (torch.randn(2, 10, 64) * torch.logspace(-3, 3, 10)[:, None]).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def float8_values() -> Tensor:
    """All finite numbers of e4m3 from its definition: four bits of exponent, bias 7, three of mantissa, no infinity."""
    small = [mantissa / 8 * 2.0**-6 for mantissa in range(8)]
    others = [
        (1 + mantissa / 8) * 2.0 ** (e - 7) for e in range(1, 16) for mantissa in range(8) if (e, mantissa) != (15, 7)
    ]
    positive = torch.tensor(small + others, dtype=torch.float64)
    return torch.cat([-positive, positive]).unique()


def nearest(rows: Tensor) -> Tensor:
    """Each row, scaled so that its largest is 448, at the nearest float8 values."""
    rows = rows.double()
    scale = rows.abs().amax(-1, keepdim=True) / 448
    values = float8_values()
    places = (rows / scale).unsqueeze(-1).sub(values).abs().argmin(-1)
    return values[places] * scale


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_rows_at_the_nearest_float8_values(bias: bool) -> None:
    exact, given = linear(bias=bias), tokens()
    expected = nearest(given) @ nearest(exact.weight).t()
    if bias:
        expected += exact.bias.double()
    found = Float8Linear(exact, device=CPU)(given)
    assert (found.shape, found.dtype) == (torch.Size([2, 10, 96]), torch.float32)
    # A tie, or a rounding of the scale, may put a number at the other neighbour.
    assert relative_error(found, expected) < 2e-3
    assert 0.01 < relative_error(found, exact(given)) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_torchao(dtype: torch.dtype) -> None:
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
    found = Float8Linear(exact, device=CPU)(given)
    expected = nn.functional.linear(given, theirs, exact.bias)
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    # Ours divides in bfloat16: some numbers go to their other neighbour, no farther away.
    error = relative_error(expected, exact(given))
    assert error > 0.01
    assert relative_error(found, exact(given)) == pytest.approx(error, rel=0.05)


@torch.no_grad()
def test_rows_of_zeros_stay_zeros() -> None:
    exact, given = linear(), tokens()
    exact.weight[3] = 0
    given[0, 2] = 0
    found = Float8Linear(exact, device=CPU)(given)
    assert torch.equal(found[0, 2], exact.bias)
    assert torch.equal(found[..., 3], exact.bias[3].expand(2, 10))
    assert found.isfinite().all()


@torch.no_grad()
def test_tokens_do_not_depend_on_each_other() -> None:
    """So parts of a window, and the shares of several cards (Ulysses), are what they are in the whole."""
    layer, given = Float8Linear(linear(), device=CPU), tokens()
    parts = [layer(given[:, :3]), layer(given[:, 3:])]
    assert torch.equal(torch.cat(parts, dim=1), layer(given))


def test_the_linear_layers_of_the_blocks_and_no_others_are_replaced(
    tiny_wan_dit: Callable[..., WanTransformer3DModel],
) -> None:
    network = tiny_wan_dit(**WIDE)
    before = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert not has_float8_products(network)
    use_float8_products([network], device=CPU)
    assert has_float8_products(network)
    projections = [f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    expected = {f"blocks.{b}.{leaf}" for b in range(2) for leaf in (*projections, "ffn.net.0.proj", "ffn.net.2")}
    assert {name for name, module in network.named_modules() if isinstance(module, Float8Linear)} == expected
    after = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert after == before - expected
    assert "proj_out" in after
    assert network.dtype == torch.float32
    assert network.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert not list(block_linears(network))  # a second time changes nothing


def stage_two(context_attention: ContextAttention = "bidirectional") -> StageTwoTransformer:
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
    with torch.no_grad():
        (sample,) = network(latents[:, :, frames], times[:, frames], text, return_dict=False, **more)
    return sample


def test_the_relative_error_of_a_forward(tiny_wan_dit: Callable[..., Any]) -> None:
    for network, run in ((tiny_wan_dit(**WIDE, num_layers=4), plain_output), (stage_two(), output)):
        expected = run(network)
        use_float8_products([network], device=CPU)
        assert 1e-4 < relative_error(run(network), expected) < 0.05


def plain_output(network: Any) -> Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(1, 48, 4, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 32)).sample


@pytest.mark.parametrize("context_attention", ["bidirectional", "frozen"])
def test_text_that_is_kept_and_frames_that_are_wanted(context_attention: ContextAttention) -> None:
    network = stage_two(context_attention)
    use_float8_products([network], device=CPU)
    kinds = torch.tensor([FrameKind.ANCHOR, *[FrameKind.TARGET] * 3])
    expected = output(network, frame_kinds=kinds)
    with network.text_kept():
        for _ in range(2):
            torch.testing.assert_close(output(network, frame_kinds=kinds), expected, rtol=0, atol=1e-5)
        wanted = output(network, frame_kinds=kinds, output_frames=slice(1, 4))
        torch.testing.assert_close(wanted, expected[:, :, 1:], rtol=0, atol=1e-5)


def test_frozen_context_that_is_kept() -> None:
    network = stage_two("frozen")
    use_float8_products([network], device=CPU)
    kinds = torch.tensor([FrameKind.ANCHOR, *[FrameKind.TARGET] * 3])
    memory = ContextMemory(len(network.blocks))
    expected = output(network, frame_kinds=kinds, context_memory=memory)
    targets = slice(1, 4)
    found = output(
        network, targets, frame_kinds=kinds[targets], frame_positions=torch.arange(1, 4), context_memory=memory
    )
    torch.testing.assert_close(found, expected[:, :, targets], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_output() -> None:
    network = stage_two()
    use_float8_products([network], device=CPU)
    expected = output(network)
    torch._dynamo.reset()
    compile_blocks([network], backend="eager")
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = sum(breaks.values())
    with network.text_kept():
        for _ in range(2):
            torch.testing.assert_close(output(network), expected, rtol=1e-5, atol=1e-6)
    assert sum(breaks.values()) == before


@pytest.mark.parametrize("placement", ["resident", "loaded", "streamed"])
def test_placed_networks_give_the_same_output(tiny_wan_dit: Callable[..., Any], placement: Placement) -> None:
    network = tiny_wan_dit(**WIDE, num_layers=3)
    use_float8_products([network], device=CPU)
    expected = plain_output(network)
    networks = PlacedNetworks(CPU)
    networks.place(network, placement, group="one")
    assert torch.equal(plain_output(network), expected)
    networks.release()
    assert torch.equal(plain_output(network), expected)


def test_streaming_takes_the_weights_along_on_a_stream_of_its_own(tiny_wan_dit: Callable[..., Any]) -> None:
    """What diffusers keeps of a block on the host for a CUDA stream are other tensors than the block works with."""
    from diffusers.hooks.group_offloading import ModuleGroup

    network = tiny_wan_dit(**WIDE)
    use_float8_products([network], device=CPU)
    layer = network.blocks[0].attn1.to_q
    kept = {name: ModuleGroup._to_cpu(buffer, low_cpu_mem_usage=True) for name, buffer in layer.named_buffers()}
    assert set(kept) == {"weight", "scale"}
    values = {name: value.float().clone() for name, value in kept.items()}
    for name, buffer in layer.named_buffers():
        buffer.data = torch.zeros_like(kept[name])
    assert all(torch.equal(kept[name].float(), values[name]) for name in kept)


def test_what_holds_float8_is_not_stored_in_float8_again(tiny_wan_dit: Callable[..., Any]) -> None:
    network = tiny_wan_dit(**WIDE)
    use_float8_products([network], device=CPU)
    expected = plain_output(network)
    assert is_stored_narrow(network)
    store_weights(network, "float8", compute_dtype=torch.float32)
    assert network.proj_out.weight.dtype == torch.float32
    assert torch.equal(plain_output(network), expected)


def test_what_is_stored_in_float8_gets_no_float8_products(tiny_wan_dit: Callable[..., Any]) -> None:
    network = tiny_wan_dit(**WIDE)
    store_weights(network, "float8", compute_dtype=torch.float32)
    with pytest.raises(InvalidInputError, match=r"stored in float8 already, .* or use quantization none"):
        use_float8_products([network], device=CPU)


def lora(name: str) -> AdapterWeights:
    delta = LoraDelta(down=torch.randn(2, 32), up=torch.randn(32, 2), scale=1.0)
    return AdapterWeights(deltas={name: delta}, diffs={}, notes=())


def test_loras_go_into_the_weights_before_they_are_rounded(tiny_wan_dit: Callable[..., Any]) -> None:
    name = "blocks.0.attn1.to_q"
    network, fused = tiny_wan_dit(**WIDE), tiny_wan_dit(**WIDE)
    attached = attach(network, lora(name), name="one")
    with pytest.raises(AdapterError, match=rf"a LoRA is attached to {name}; fuse it before"):
        use_float8_products([fused, network], device=CPU)
    assert not has_float8_products(fused)  # all or nothing
    attached.remove()
    use_float8_products([network], device=CPU)
    with pytest.raises(AdapterError, match="fuse it before quantising"):
        fuse(network, lora(name))
    fuse(fused, lora(name))
    use_float8_products([fused], device=CPU)
    assert not torch.equal(plain_output(fused), plain_output(network))


def test_devices_without_float8_products_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_wan_dit: Callable[..., Any]
) -> None:
    card, capabilities = torch.device("cuda", 0), [(8, 6), (8, 9), (9, 0), (12, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capabilities.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(InvalidInputError, match=r"^RTX 3090 has no float8 products \(capability 8\.6, .*none$"):
        use_float8_products([tiny_wan_dit(**WIDE)], device=card)
    with pytest.raises(InvalidInputError, match="are for CUDA cards, and not for mps; use quantization none"):
        check_float8_device(torch.device("mps"))
    for _ in range(3):
        check_float8_device(card)
    with pytest.raises(InvalidInputError, match=r"blocks\.0\.attn1\.to_q has torch\.float32; load it as bfloat16"):
        use_float8_products([tiny_wan_dit(**WIDE)], device=card)


def test_sides_that_the_kernels_do_not_take_are_refused(tiny_wan_dit: Callable[..., Any]) -> None:
    network = tiny_wan_dit()
    with pytest.raises(InvalidInputError, match=r"blocks\.0\.attn1\.to_q is 24 by 24, .* multiples of 16; use"):
        use_float8_products([network], device=CPU)
    assert not has_float8_products(network)


@pytest.mark.gpu
@torch.no_grad()
def test_a_card_gives_the_numbers_of_the_cpu() -> None:
    card = torch.device("cuda")
    if torch.cuda.get_device_capability(card) < LEAST_CAPABILITY:
        pytest.skip("no card with float8 products")
    exact, given = linear(dtype=torch.bfloat16), tokens(torch.bfloat16)
    expected = Float8Linear(exact, device=CPU)(given)
    found = Float8Linear(exact, device=card).to(card)(given.to(card))
    assert relative_error(found.cpu(), expected) < 0.01
