"""Linear layers that multiply eight bits by eight bits: faster on cards that have it, and inexact.

Weights are rounded once, each row of them with a scale of its own; what enters a layer is rounded as it comes, each
token with its scale, symmetrically. Tokens do not depend on each other, so windows, parts of windows and sequences
shared by several cards give the same numbers.

``float8`` (e4m3): products summed in float32 by PyTorch's own kernel. The arithmetic is that of torchao's
``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``, and the tests hold the layer to it. Its tensors are
not used, for what they did at torchao 0.18 with diffusers 0.42: a token of zeros became NaN, blocks could not be
streamed to a CUDA card (diffusers issue 14433), and nothing ran on a CPU.

``int8`` (-127 to 127): products summed exactly in int32, for cards that have no float8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from swifti2v.errors import AdapterError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Quantization = Literal["none", "float8", "int8"]

LEAST_MAXIMUM = 1e-12
"""Of a row: one of zeros has a scale too, and stays zeros."""
ROWS_AT_ONCE = 4096
"""Of an int8 product, whose sums take four bytes each before they are tokens again."""
LEAST_ROWS = 32
"""Of an int8 product: PyTorch refuses 16 and fewer on a CUDA card, and pads to 32 itself where it does not."""


class QuantizedLinear(nn.Module):
    """A linear layer with its weight rounded to eight bits; a class of its own for each arithmetic.

    The weight is a buffer, and so are its scales: what a network calls its dtype is that of its other parameters, and a
    LoRA cannot be fused into it in silence.

    Args:
        linear: whose weight is rounded; its bias is shared, its weight is not kept.
        device: where the rounding is done; the weight stays where it was.
    """

    name: ClassVar[Quantization]
    dtype: ClassVar[torch.dtype]
    side_multiple: ClassVar[int]
    """Rows and columns of a weight that the kernels multiply."""
    least_capability: ClassVar[tuple[int, int]]
    """Of a CUDA card with such products."""
    first_cards: ClassVar[str]
    cuda_dtypes: ClassVar[tuple[torch.dtype, ...]]
    """Of weights and tokens on a CUDA card."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, device: torch.device) -> None:
        super().__init__()
        home = linear.weight.device
        weight, scale = self.rounded(linear.weight.detach().to(device))
        self.register_buffer("weight", weight.to(home))
        self.register_buffer("scale", scale.t().to(home))
        self.bias = linear.bias

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in eight bits and their scales ``[R, 1]`` in float32."""
        raise NotImplementedError


class Float8Linear(QuantizedLinear):
    """A linear layer that multiplies float8."""

    name = "float8"
    dtype = torch.float8_e4m3fn
    side_multiple = 16
    least_capability = (8, 9)
    first_cards = "RTX 40, L40, H100"
    cuda_dtypes = (torch.bfloat16,)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the linear layer would, about: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        rounded, scale = self.rounded(tokens.flatten(0, -2))
        product = torch._scaled_mm(
            rounded, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=tokens.dtype, use_fast_accum=True
        )
        return torch.unflatten(product, 0, tokens.shape[:-1])

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in float8 and their scales ``[R, 1]`` in float32."""
        scale = _largest(rows) / torch.finfo(Float8Linear.dtype).max
        # The largest may come out a rounding above 448, which is 448 again in float8: what rounds beyond begins at 464.
        return (rows / scale).to(Float8Linear.dtype), scale.float()


class Int8Linear(QuantizedLinear):
    """A linear layer that multiplies int8."""

    name = "int8"
    dtype = torch.int8
    side_multiple = 8
    least_capability = (8, 0)
    first_cards = "A100, RTX 30"
    cuda_dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the linear layer would, about: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        rows = tokens.flatten(0, -2)
        product = rows.new_empty(len(rows), len(self.weight))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            product[part] = self._product(rows[part])
        return torch.unflatten(product, 0, tokens.shape[:-1])

    def _product(self, rows: Tensor) -> Tensor:
        rounded, scale = self.rounded(rows)
        missing = max(LEAST_ROWS - len(rows), 0)
        if missing:
            rounded = nn.functional.pad(rounded, (0, 0, 0, missing))
        sums = torch._int_mm(rounded, self.weight.t())[: len(rows)]
        product = (sums * scale).mul_(self.scale)
        return product if self.bias is None else product.add_(self.bias)

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in int8 and their scales ``[R, 1]`` in float32."""
        # Divided in float32: bfloat16 holds no halves above 64, and would round a second time.
        scale = _largest(rows).float() / torch.iinfo(Int8Linear.dtype).max
        return (rows / scale).round_().to(Int8Linear.dtype), scale


LAYERS: dict[str, type[QuantizedLinear]] = {layer.name: layer for layer in (Float8Linear, Int8Linear)}


def use_quantized_products(networks: Sequence[nn.Module], quantization: Quantization, *, device: torch.device) -> None:
    """Put a `QuantizedLinear` in the place of every linear layer of the networks' blocks.

    Those are the projections of both attentions and the feed-forward net. Embeddings, norms, modulation and the last
    projection stay as they are.

    Args:
        networks: transformers with their LoRAs fused, on any device.
        quantization: the arithmetic; `none` changes nothing.
        device: where they will work.

    Raises:
        InvalidInputError: `device` has no such products, or a layer has a shape or dtype that they do not take.
        AdapterError: a LoRA is attached; nothing is changed then, in any network.
    """
    if quantization == "none":
        return
    check_quantized_device(quantization, device)
    kind = LAYERS[quantization]
    found = [(network, list(block_linears(network))) for network in networks]
    for network, names in found:
        for name in names:
            _check_layer(name, network.get_submodule(name), kind, device)
    for network, names in found:
        for name in names:
            linear: Any = network.get_submodule(name)
            network.set_submodule(name, kind(linear, device=device))


def block_linears(network: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers of the blocks of a Wan transformer."""
    for name, module in network.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            yield name


def quantization_of(network: nn.Module) -> Quantization:
    """Return the arithmetic of a network's blocks: what `use_quantized_products` has been called with."""
    found = (module.name for module in network.modules() if isinstance(module, QuantizedLinear))
    return next(found, "none")


def check_quantized_device(quantization: Quantization, device: torch.device) -> None:
    """Raise `InvalidInputError` unless `device` has such products.

    A CPU has them, slow ones that show what they cost in quality; a network on the meta device is only counted.
    """
    if quantization == "none" or device.type in {"cpu", "meta"}:
        return
    if device.type != "cuda":
        msg = f"{quantization} products are for CUDA cards, and not for {device.type}; use quantization none"
        raise InvalidInputError(msg)
    kind, capability = LAYERS[quantization], torch.cuda.get_device_capability(device)
    if capability < kind.least_capability:
        other = "int8 or none" if kind is Float8Linear and capability >= Int8Linear.least_capability else "none"
        msg = (
            f"{torch.cuda.get_device_name(device)} has no {kind.name} products (capability {_dotted(capability)}, they "
            f"begin with {_dotted(kind.least_capability)}: {kind.first_cards}); use quantization {other}"
        )
        raise InvalidInputError(msg)


def stored_already(dtype: str) -> InvalidInputError:
    """Return the error for weights that have been rounded to `dtype` for want of host memory."""
    return InvalidInputError(
        f"the weights are stored in {dtype} already, and would be rounded twice; "
        "allow more host memory, or use quantization none"
    )


def _check_layer(name: str, layer: Any, kind: type[QuantizedLinear], device: torch.device) -> None:
    if ".base_layer" in name or ".lora_" in name:
        msg = f"a LoRA is attached to {name.split('.base_layer')[0]}; fuse it before the weights are rounded"
        raise AdapterError(msg)
    if layer.weight.dtype == torch.float8_e4m3fn:
        raise stored_already("float8")
    if not layer.weight.is_floating_point():
        raise stored_already("4 bits")
    if device.type == "cuda" and layer.weight.dtype not in kind.cuda_dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in kind.cuda_dtypes)
        msg = f"{kind.name} products on a CUDA card give {wanted}, and {name} has {layer.weight.dtype}; load it as "
        raise InvalidInputError(msg + wanted)
    if any(side % kind.side_multiple for side in (layer.in_features, layer.out_features)):
        msg = (
            f"{name} is {layer.in_features} by {layer.out_features}, and {kind.name} products take multiples of "
            f"{kind.side_multiple}; use quantization none"
        )
        raise InvalidInputError(msg)


def _largest(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row, ``[R, 1]``."""
    return torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_min(LEAST_MAXIMUM)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
