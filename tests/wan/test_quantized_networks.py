"""Networks with products in eight bits: which layers get them, what runs such networks, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from swifti2v.errors import AdapterError, InvalidInputError
from swifti2v.memory.placement import PlacedNetworks, store_weights, stored_narrow
from swifti2v.pipelines.acceleration import compile_blocks
from swifti2v.segments import FrameKind
from swifti2v.wan.adapters import AdapterWeights, LoraDelta, attach, fuse
from swifti2v.wan.context_attention import ContextMemory
from swifti2v.wan.quantized_products import (
    LAYERS,
    Quantization,
    QuantizedLinear,
    block_linears,
    check_quantized_device,
    quantization_of,
    use_quantized_products,
)
from swifti2v.wan.transformer import StageTwoTransformer
from tests.wan.few_bits import CPU, each_kind, relative_error, wan_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import WanTransformer3DModel
    from torch import Tensor

    from swifti2v.memory.networks import Storage
    from swifti2v.memory.placement import Placement
    from swifti2v.wan.transformer_configuration import ContextAttention

WIDE = {"attention_head_dim": 16}  # two heads of it: 32, where the tiny networks have 24


@each_kind
def test_the_linear_layers_of_the_blocks_and_no_others_are_replaced(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], kind: Quantization
) -> None:
    network = tiny_wan_dit(**WIDE)
    before = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert quantization_of(network) == "none"
    use_quantized_products([network], "none", device=CPU)
    assert quantization_of(network) == "none"
    use_quantized_products([network], kind, device=CPU)
    assert quantization_of(network) == kind
    projections = [f"attn{i}.{leaf}" for i in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")]
    expected = {f"blocks.{b}.{leaf}" for b in range(2) for leaf in (*projections, "ffn.net.0.proj", "ffn.net.2")}
    assert {name for name, module in network.named_modules() if isinstance(module, QuantizedLinear)} == expected
    after = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert after == before - expected
    assert "proj_out" in after
    assert network.dtype == torch.float32
    assert network.blocks[0].attn1.to_q.weight.dtype == LAYERS[kind].dtype
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


@each_kind
def test_the_relative_error_of_a_forward(tiny_wan_dit: Callable[..., Any], kind: Quantization) -> None:
    for network, run in ((tiny_wan_dit(**WIDE, num_layers=4), wan_output), (stage_two(), output)):
        expected = run(network)
        use_quantized_products([network], kind, device=CPU)
        assert 1e-4 < relative_error(run(network), expected) < 0.05


@pytest.mark.parametrize("context_attention", ["bidirectional", "frozen"])
@each_kind
def test_text_that_is_kept_and_frames_that_are_wanted(context_attention: ContextAttention, kind: Quantization) -> None:
    network = stage_two(context_attention)
    use_quantized_products([network], kind, device=CPU)
    kinds = torch.tensor([FrameKind.ANCHOR, *[FrameKind.TARGET] * 3])
    expected = output(network, frame_kinds=kinds)
    with network.text_kept():
        for _ in range(2):
            torch.testing.assert_close(output(network, frame_kinds=kinds), expected, rtol=0, atol=1e-5)
        wanted = output(network, frame_kinds=kinds, output_frames=slice(1, 4))
        torch.testing.assert_close(wanted, expected[:, :, 1:], rtol=0, atol=1e-5)


@each_kind
def test_frozen_context_that_is_kept(kind: Quantization) -> None:
    network = stage_two("frozen")
    use_quantized_products([network], kind, device=CPU)
    kinds = torch.tensor([FrameKind.ANCHOR, *[FrameKind.TARGET] * 3])
    memory = ContextMemory(len(network.blocks))
    expected = output(network, frame_kinds=kinds, context_memory=memory)
    targets = slice(1, 4)
    found = output(
        network, targets, frame_kinds=kinds[targets], frame_positions=torch.arange(1, 4), context_memory=memory
    )
    torch.testing.assert_close(found, expected[:, :, targets], rtol=0, atol=1e-5)


@pytest.mark.slow
@each_kind
def test_compiled_blocks_give_the_same_output(kind: Quantization) -> None:
    network = stage_two()
    use_quantized_products([network], kind, device=CPU)
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
@each_kind
def test_placed_networks_give_the_same_output(
    tiny_wan_dit: Callable[..., Any], placement: Placement, kind: Quantization
) -> None:
    network = tiny_wan_dit(**WIDE, num_layers=3)
    use_quantized_products([network], kind, device=CPU)
    expected = wan_output(network)
    networks = PlacedNetworks(CPU)
    networks.place(network, placement, group="one")
    assert torch.equal(wan_output(network), expected)
    networks.release()
    assert torch.equal(wan_output(network), expected)


@each_kind
def test_streaming_takes_the_weights_along_on_a_stream_of_its_own(
    tiny_wan_dit: Callable[..., Any], kind: Quantization
) -> None:
    """What diffusers keeps of a block on the host for a CUDA stream are other tensors than the block works with."""
    from diffusers.hooks.group_offloading import ModuleGroup

    network = tiny_wan_dit(**WIDE)
    use_quantized_products([network], kind, device=CPU)
    layer = network.blocks[0].attn1.to_q
    kept = {name: ModuleGroup._to_cpu(buffer, low_cpu_mem_usage=True) for name, buffer in layer.named_buffers()}
    assert set(kept) == {"weight", "scale"}
    values = {name: value.float().clone() for name, value in kept.items()}
    for name, buffer in layer.named_buffers():
        buffer.data = torch.zeros_like(kept[name])
    assert all(torch.equal(kept[name].float(), values[name]) for name in kept)


@each_kind
@pytest.mark.parametrize("dtype", ["float8", "nf4"])
def test_what_holds_eight_bits_is_not_stored_again(
    tiny_wan_dit: Callable[..., Any], kind: Quantization, dtype: Storage
) -> None:
    network = tiny_wan_dit(**WIDE)
    use_quantized_products([network], kind, device=CPU)
    expected = wan_output(network)
    assert stored_narrow(network) == kind
    store_weights(network, dtype, compute_dtype=torch.float32)
    assert network.proj_out.weight.dtype == torch.float32
    assert torch.equal(wan_output(network), expected)


@each_kind
@pytest.mark.parametrize(("dtype", "named"), [("float8", "float8"), ("nf4", "4 bits")])
def test_what_is_stored_narrow_gets_no_products(
    tiny_wan_dit: Callable[..., Any], kind: Quantization, dtype: Storage, named: str
) -> None:
    network = tiny_wan_dit(**WIDE)
    store_weights(network, dtype, compute_dtype=torch.float32)
    with pytest.raises(InvalidInputError, match=rf"stored in {named} already, .* or use quantization none"):
        use_quantized_products([network], kind, device=CPU)


def lora(name: str) -> AdapterWeights:
    delta = LoraDelta(down=torch.randn(2, 32), up=torch.randn(32, 2), scale=1.0)
    return AdapterWeights(deltas={name: delta}, diffs={}, notes=())


@each_kind
def test_loras_go_into_the_weights_before_they_are_rounded(
    tiny_wan_dit: Callable[..., Any], kind: Quantization
) -> None:
    name = "blocks.0.attn1.to_q"
    network, fused = tiny_wan_dit(**WIDE), tiny_wan_dit(**WIDE)
    attached = attach(network, lora(name), name="one")
    with pytest.raises(AdapterError, match=rf"a LoRA is attached to {name}; fuse it before"):
        use_quantized_products([fused, network], kind, device=CPU)
    assert quantization_of(fused) == "none"  # all or nothing
    attached.remove()
    use_quantized_products([network], kind, device=CPU)
    with pytest.raises(AdapterError, match="fuse it before quantising"):
        fuse(network, lora(name))
    fuse(fused, lora(name))
    use_quantized_products([fused], kind, device=CPU)
    assert not torch.equal(wan_output(fused), wan_output(network))


def test_devices_without_float8_products_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_wan_dit: Callable[..., Any]
) -> None:
    card, capabilities = torch.device("cuda", 0), [(8, 6), (8, 9), (9, 0), (12, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capabilities.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(InvalidInputError, match=r"^RTX 3090 has no float8 products \(capability 8\.6, .*int8 or none$"):
        use_quantized_products([tiny_wan_dit(**WIDE)], "float8", device=card)
    for _ in range(3):
        check_quantized_device("float8", card)
    with pytest.raises(InvalidInputError, match=r"blocks\.0\.attn1\.to_q has torch\.float32; load it as bfloat16"):
        use_quantized_products([tiny_wan_dit(**WIDE)], "float8", device=card)


@each_kind
def test_sides_that_the_kernels_do_not_take_are_refused(tiny_wan_dit: Callable[..., Any], kind: Quantization) -> None:
    network = tiny_wan_dit(attention_head_dim=10)  # two heads of it
    multiple = LAYERS[kind].side_multiple
    with pytest.raises(
        InvalidInputError, match=rf"blocks\.0\.attn1\.to_q is 20 by 20, .* multiples of {multiple}; use"
    ):
        use_quantized_products([network], kind, device=CPU)
    assert quantization_of(network) == "none"


@pytest.mark.gpu
@torch.no_grad()
@each_kind
def test_compiled_on_a_card(kind: Quantization, tiny_wan_dit: Callable[..., Any]) -> None:
    card = torch.device("cuda")
    if torch.cuda.get_device_capability(card) < LAYERS[kind].least_capability:
        pytest.skip(f"no card with {kind} products")
    network = tiny_wan_dit(**WIDE).to(card, torch.bfloat16)
    use_quantized_products([network], kind, device=card)
    latents = torch.randn(1, 48, 4, 8, 8, device=card, dtype=torch.bfloat16)
    text = torch.randn(1, 16, 32, device=card, dtype=torch.bfloat16)
    times = torch.tensor([500.0], device=card)
    expected = network(latents, times, text).sample
    torch._dynamo.reset()
    compile_blocks([network])
    assert relative_error(network(latents, times, text).sample, expected) < 0.05
