"""Weights in four bits: linear layers that hold them packed, and unpack them into the dtype of the work.

NF4 of QLoRA (arXiv 2305.14314): each block of 64 weights is divided by its largest absolute value, and every weight
becomes the nearest of 16 values, the quantiles of a normal distribution. At 4.25 bits a weight a matrix product errs by
9.2% with Gaussian weights, where integers from -7 to 7 err by 10.8%; with heavier tails (Student's t with five degrees
of freedom) by 10.5% and 14.6% (`tests/memory/test_normal_float.py`).
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swifti2v.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_SIZE = 64
"""Weights that share a scale, one after the other through the rows of a matrix."""
VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""Of NF4 (QLoRA, appendix E)."""
LEAST_MAXIMUM = 1e-12
"""Of a block: one of zeros has a scale too, and stays zeros."""
BLOCKS_AT_ONCE = 2**12
"""That are rounded together: what rounding needs beside the weights stays in the cache of a processor."""
IN_A_BLOCK = re.compile(r"(^|\.)blocks?\.\d+\.")
"""Names of layers in the blocks of Wan's transformers, and of UMT5's encoder."""


class NormalFloatLinear(nn.Linear):
    """A linear layer with its weight in NF4.

    The weight is a buffer of two weights a byte, the first in the upper half, and so are the scales of its blocks, in
    bfloat16. Its dtype is int8: transformers leaves what enters UMT5's output layers as it is beside such a weight.

    Args:
        linear: whose weight is packed, where it is; its bias is shared, its weight is not kept.
        dtype: of the bias, and of the work.
    """

    scale: Tensor
    pairs: Tensor

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # a Linear's own would make a weight as large as the one that is to be saved
        self.in_features, self.out_features = linear.in_features, linear.out_features
        exact = linear.weight.detach()
        weight, scale = pack(exact)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("pairs", _pairs(exact.device), persistent=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the linear layer would, about: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        return nn.functional.linear(tokens, self.unpacked(tokens.dtype), self.bias)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``[out, in]`` as `dtype`."""
        pairs = nn.functional.embedding(self.weight.view(torch.uint8).int(), self.pairs.to(dtype))
        flat = pairs.view(-1, BLOCK_SIZE).mul_(self.scale.to(dtype).unsqueeze(1)).flatten()
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def take_weight(self, weight: Tensor, *, device: torch.device) -> None:
        """Pack `weight` ``[out, in]``, on `device`, and hold it where it was instead of the one that is held."""
        home = weight.device
        packed, scale = pack(weight.to(device))
        self.weight, self.scale, self.pairs = packed.to(home), scale.to(home), _pairs(home)


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight of any shape in NF4: pairs of codes ``[ceil(n / 64) * 32]`` in int8, scales in bfloat16."""
    flat = weight.flatten()
    flat = nn.functional.pad(flat, (0, -len(flat) % BLOCK_SIZE))
    blocks = flat.view(-1, BLOCK_SIZE)
    parts = [blocks] if weight.is_meta else torch.split(blocks, BLOCKS_AT_ONCE)
    codes, scales = zip(*map(_rounded, parts), strict=True)
    return torch.cat(codes), torch.cat(scales)


def _pairs(device: torch.device) -> Tensor:
    """Return the two values of every byte, ``[256, 2]``."""
    values = torch.tensor(VALUES, device=device)
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)


def _rounded(blocks: Tensor) -> tuple[Tensor, Tensor]:
    exact = blocks.float()
    scale = exact.abs().amax(1).clamp_min(LEAST_MAXIMUM).to(torch.bfloat16)
    relative = exact / scale.unsqueeze(1)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for lower, upper in pairwise(VALUES):  # twice as fast as PyTorch's search of the 15 bounds
        codes += relative > (lower + upper) / 2
    first, second = codes.view(-1, 2).unbind(1)
    return (first * 16 + second).view(torch.int8), scale


def pack_blocks(network: nn.Module, *, dtype: torch.dtype) -> None:
    """Put a `NormalFloatLinear` in the place of every linear layer of the blocks of a transformer or text encoder.

    Args:
        network: with its LoRAs fused, on any device.
        dtype: of the work.

    Raises:
        AdapterError: a LoRA is attached; nothing is changed then.
    """
    names = list(_block_linears(network))
    for name in names:
        if ".base_layer" in name or ".lora_" in name:
            msg = f"a LoRA is attached to {name.split('.base_layer')[0]}; fuse it before the weights are packed"
            raise AdapterError(msg)
    for name in names:
        linear = network.get_submodule(name)
        if isinstance(linear, nn.Linear):
            network.set_submodule(name, NormalFloatLinear(linear, dtype=dtype))


def _block_linears(network: nn.Module) -> Iterator[str]:
    for name, module in network.named_modules():
        if IN_A_BLOCK.search(name) and isinstance(module, nn.Linear) and not isinstance(module, NormalFloatLinear):
            yield name
