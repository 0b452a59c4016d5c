"""Products in eight bits: the arithmetic against others, and the devices that have it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from swifti2v.errors import InvalidInputError
from swifti2v.wan.quantized_products import (
    LAYERS,
    Float8Linear,
    Int8Linear,
    Quantization,
    check_quantized_device,
)
from tests.wan.few_bits import CPU, each_kind, relative_error

if TYPE_CHECKING:
    from torch import Tensor


def linear(*, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96, bias=bias).to(dtype)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different size each, as those of a network are."""
    torch.manual_seed(1)
    return (torch.randn(2, 10, 64) * torch.logspace(-3, 3, 10)[:, None]).to(dtype)


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


def integers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row over its largest times 127 in whole numbers, halves to the even one, and the scales."""
    scale = rows.float().abs().amax(-1, keepdim=True) / 127
    return (rows.float() / scale).double().round().long(), scale.double()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_whole_numbers(bias: bool, dtype: torch.dtype) -> None:
    exact, given = linear(bias=bias, dtype=dtype), tokens(dtype)
    (rows, scale), (weight, weight_scale) = integers(given), integers(exact.weight)
    assert rows.abs().amax() == weight.abs().amax() == 127
    expected = (rows @ weight.t()).double() * scale * weight_scale.t()
    if bias:
        expected += exact.bias.double()
    found = Int8Linear(exact, device=CPU)(given)
    assert (found.shape, found.dtype) == (torch.Size([2, 10, 96]), dtype)
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert 0.003 < relative_error(found, exact(given)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 16, 17, 31, 32, 33, 64, 65, 97])
def test_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    """Few are padded, as the kernel wants it on a card; many are multiplied a part at a time. No token is changed."""
    layer = Int8Linear(linear(), device=CPU)
    given = torch.randn(97, 64)
    expected = torch.cat([layer(row[None]) for row in given])[:num_rows]
    monkeypatch.setattr("swifti2v.wan.quantized_products.ROWS_AT_ONCE", 32)
    asked, multiply = [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda one, other: asked.append(one.shape) or multiply(one, other))
    assert torch.equal(layer(given[:num_rows]), expected)
    assert {shape[0] for shape in asked} == {32}
    assert len(asked) == -(-num_rows // 32)


@torch.no_grad()
def test_a_product_of_int8_errs_less_than_one_of_float8() -> None:
    """On Gaussian numbers: seven bits of a number's own row against three of its mantissa."""
    exact, given = linear(), tokens()
    int8, float8 = (relative_error(LAYERS[kind](exact, device=CPU)(given), exact(given)) for kind in ("int8", "float8"))
    assert int8 < 0.4 * float8


@torch.no_grad()
@each_kind
def test_rows_of_zeros_stay_zeros(kind: Quantization) -> None:
    exact, given = linear(), tokens()
    exact.weight[3] = 0
    given[0, 2] = 0
    found = LAYERS[kind](exact, device=CPU)(given)
    assert torch.equal(found[0, 2], exact.bias)
    assert torch.equal(found[..., 3], exact.bias[3].expand(2, 10))
    assert found.isfinite().all()


@torch.no_grad()
@each_kind
def test_tokens_do_not_depend_on_each_other(kind: Quantization) -> None:
    """So parts of a window, and the shares of several cards (Ulysses), are what they are in the whole."""
    layer, given = LAYERS[kind](linear(), device=CPU), tokens()
    parts = [layer(given[:, :3]), layer(given[:, 3:])]
    assert torch.equal(torch.cat(parts, dim=1), layer(given))


def test_devices_without_int8_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    card, capabilities = torch.device("cuda", 0), [(7, 5), (8, 0), (8, 6), (9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capabilities.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 2080")
    with pytest.raises(
        InvalidInputError, match=r"^RTX 2080 has no int8 products \(capability 7\.5, .*quantization none$"
    ):
        check_quantized_device("int8", card)
    for _ in range(3):
        check_quantized_device("int8", card)


@each_kind
def test_other_devices_are_refused(kind: Quantization) -> None:
    with pytest.raises(InvalidInputError, match=f"{kind} products are for CUDA cards, and not for mps; use quantiz"):
        check_quantized_device(kind, torch.device("mps"))
    check_quantized_device("none", torch.device("mps"))


@pytest.mark.gpu
@torch.no_grad()
@each_kind
@pytest.mark.parametrize("num_tokens", [1, 17, 40, 5000])
def test_a_card_gives_the_numbers_of_the_cpu(kind: Quantization, num_tokens: int) -> None:
    card, layer = torch.device("cuda"), LAYERS[kind]
    if torch.cuda.get_device_capability(card) < layer.least_capability:
        pytest.skip(f"no card with {kind} products")
    exact = linear(dtype=torch.bfloat16)
    given = torch.randn(num_tokens, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = layer(exact, device=CPU)(given)
    found = layer(exact, device=card).to(card)(given.to(card))
    assert relative_error(found.cpu(), expected) < 0.01
