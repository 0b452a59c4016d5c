"""Linear layers that multiply float8 by float8: up to twice bfloat16's rate on cards that have it, and inexact.

Weights are rounded once (e4m3), each row of them with a scale of its own; what enters a layer is rounded as it comes,
each token with its scale. Products are summed in float32 by PyTorch's own kernel. Tokens do not depend on each other,
so windows, parts of windows and sequences shared by several cards give the same numbers.

The arithmetic is that of torchao's ``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``, and the tests
hold the layer to it. Its tensors are not used, for what they did at torchao 0.18 with diffusers 0.42: a token of zeros
became NaN, blocks could not be streamed to a CUDA card (diffusers issue 14433), and nothing ran on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swifti2v.errors import AdapterError, InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
LEAST_MAXIMUM = 1e-12
"""Of a row: one of zeros has a scale too, and stays zeros."""
SIDE_MULTIPLE = 16
"""Rows and columns of a weight that the kernels multiply."""
LEAST_CAPABILITY = (8, 9)
"""Of a CUDA card with float8 products."""


class Float8Linear(nn.Module):
    """A linear layer with its weight in float8.

    The weight is a buffer, and so are its scales: what a network calls its dtype is that of its other parameters, and a
    LoRA cannot be fused into it in silence.

    Args:
        linear: whose weight is rounded; its bias is shared, its weight is not kept.
        device: where the rounding is done; the weight stays where it was.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, device: torch.device) -> None:
        super().__init__()
        home = linear.weight.device
        weight, scale = _rounded(linear.weight.detach().to(device))
        self.register_buffer("weight", weight.to(home))
        self.register_buffer("scale", scale.t().to(home))
        self.bias = linear.bias

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the linear layer would, about: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        rounded, scale = _rounded(tokens.flatten(0, -2))
        product = torch._scaled_mm(
            rounded, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=tokens.dtype, use_fast_accum=True
        )
        return torch.unflatten(product, 0, tokens.shape[:-1])


def use_float8_products(networks: Sequence[nn.Module], *, device: torch.device) -> None:
    """Put a `Float8Linear` in the place of every linear layer of the networks' blocks.

    Those are the projections of both attentions and the feed-forward net. Embeddings, norms, modulation and the last
    projection stay as they are.

    Args:
        networks: transformers with their LoRAs fused, on any device.
        device: where they will work.

    Raises:
        InvalidInputError: `device` has no float8 products, or a layer has a shape or dtype that they do not take.
        AdapterError: a LoRA is attached; nothing is changed then, in any network.
    """
    check_float8_device(device)
    found = [(network, list(block_linears(network))) for network in networks]
    for network, names in found:
        for name in names:
            _check_layer(name, network.get_submodule(name), device)
    for network, names in found:
        for name in names:
            linear: Any = network.get_submodule(name)
            network.set_submodule(name, Float8Linear(linear, device=device))


def block_linears(network: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers of the blocks of a Wan transformer."""
    for name, module in network.named_modules():
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            yield name


def has_float8_products(network: nn.Module) -> bool:
    """Return whether `use_float8_products` has been called on a network."""
    return any(isinstance(module, Float8Linear) for module in network.modules())


def check_float8_device(device: torch.device) -> None:
    """Raise `InvalidInputError` unless `device` has float8 products.

    A CPU has them, slow ones that show what they cost in quality; a network on the meta device is only counted.
    """
    if device.type in {"cpu", "meta"}:
        return
    if device.type != "cuda":
        msg = f"float8 products are for CUDA cards, and not for {device.type}; use quantization none"
        raise InvalidInputError(msg)
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        msg = (
            f"{torch.cuda.get_device_name(device)} has no float8 products (capability {_dotted(capability)}, they begin"
            f" with {_dotted(LEAST_CAPABILITY)}: RTX 40, L40, H100); use quantization none"
        )
        raise InvalidInputError(msg)


def _check_layer(name: str, layer: Any, device: torch.device) -> None:
    if ".base_layer" in name or ".lora_" in name:
        msg = f"a LoRA is attached to {name.split('.base_layer')[0]}; fuse it before the weights are rounded"
        raise AdapterError(msg)
    if layer.weight.dtype == FLOAT8:
        msg = (
            "the weights are stored in float8 already, and would be rounded twice; "
            "allow more host memory, or use quantization none"
        )
        raise InvalidInputError(msg)
    if device.type == "cuda" and layer.weight.dtype != torch.bfloat16:
        msg = f"float8 products on a CUDA card give bfloat16, and {name} has {layer.weight.dtype}; load it as bfloat16"
        raise InvalidInputError(msg)
    if any(side % SIDE_MULTIPLE for side in layer.weight.shape):
        msg = (
            f"{name} is {layer.in_features} by {layer.out_features}, and float8 products take multiples of "
            f"{SIDE_MULTIPLE}; use quantization none"
        )
        raise InvalidInputError(msg)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows ``[R, C]`` in float8 and their scales ``[R, 1]`` in float32."""
    scale = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_min(LEAST_MAXIMUM) / LARGEST
    # The largest may come out a rounding above 448, which is 448 again in float8: what rounds beyond begins at 464.
    return (rows / scale).to(FLOAT8), scale.float()


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
