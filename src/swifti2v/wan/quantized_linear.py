"""Linear layers with weights in few bits: NF4, float8 and int8.

There are two ways to use few bits:

- **Stored narrow** (`store_weights`): weights take less memory, and each layer brings its own back to the working dtype
  before it multiplies. ``nf4`` replaces the layers of the blocks by `Nf4Linear`; ``float8`` is diffusers' layerwise
  casting.
- **Quantized matmul** (`use_quantized_matmul`): weights are rounded once, each row with its own scale, and the tokens
  that enter a layer are rounded likewise, each token with its own scale; both are multiplied in eight bits. Faster on
  cards that support it, and inexact. Tokens do not depend on each other, so windows, parts of windows and sequences
  that several cards share give the same numbers.

NF4 of QLoRA (arXiv 2305.14314): each block of 64 weights is divided by its largest absolute value, and every weight
becomes the nearest of 16 values, the quantiles of a normal distribution. At 4.25 bits a weight the relative error of a
matmul is 9.2% with Gaussian weights, where integers from -7 to 7 give 10.8%; with heavier tails (Student's t with five
degrees of freedom) 10.5% and 14.6% (`tests/wan/test_quantized_linear.py`).

``float8`` matmul (e4m3) sums in float32, in PyTorch's own kernel. The arithmetic is that of torchao's
``Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())``, and the tests compare with it. torchao's tensors
are not used: with torchao 0.18 and diffusers 0.42 a token of zeros became NaN, blocks could not be streamed to a CUDA
card (diffusers issue 14433), and nothing ran on a CPU. ``int8`` matmul (-127 to 127) sums exactly in int32, for cards
without float8.
"""

from __future__ import annotations

import re
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn

from swifti2v.errors import AdapterError, InvalidInputError, MemoryBudgetError
from swifti2v.settings import STORAGES, Quantization, Storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

IN_A_BLOCK = re.compile(r"(^|\.)blocks?\.\d+\.")
"""Names of layers in the blocks of Wan's transformers, and of UMT5's encoder."""
SMALLEST_MAXIMUM = 1e-12
"""Floor for the largest absolute value of a row or block, so that an all-zero one stays zero."""

NF4_BLOCK = 64
"""Consecutive weights that share a scale."""
NF4_VALUES = (
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
"""QLoRA, appendix E."""
BLOCKS_AT_ONCE = 2**12
"""NF4 blocks that are rounded together, so that the intermediate values stay in the processor's cache."""

ROWS_AT_ONCE = 4096
"""Tokens of one int8 matmul, whose sums take four bytes each before they are scaled."""
FEWEST_ROWS = 32
"""Tokens of one int8 matmul at least: PyTorch refuses 16 and fewer on a CUDA card, and pads to 32 where it does not."""

FLOAT8 = torch.float8_e4m3fn
TEXT_ENCODER_EXACT = (r"\.wo$", "norm", r"(^|\.)(shared|embed_tokens)$")
"""Layers of UMT5 that float8 storage leaves alone: transformers casts what enters ``wo`` to the dtype of its stored
weight, and pipelines cast the prompt's embedding to the dtype of the encoder's first parameter, the token table."""


class QuantizedLinear(nn.Linear):
    """A linear layer that holds its weight in few bits.

    Weight and scale are buffers: the dtype of a network remains that of its other parameters, and no LoRA can be fused
    into the weight by accident.

    Args:
        linear: the layer to replace; its bias is shared, its weight is not kept.
        device: where the weight is quantized; the result stays where the weight was. None: where the weight is.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, device: torch.device | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight of full size
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("weight", None)
        self.register_buffer("scale", None)
        self.take_weight(linear.weight.detach(), device=device or linear.weight.device)

    def take_weight(self, weight: Tensor, *, device: torch.device) -> None:
        """Quantize `weight` ``[out, in]`` on `device` and hold the result on the weight's own device."""
        quantized, scale = self.quantize(weight.to(device))
        self.weight, self.scale = quantized.to(weight.device), scale.to(weight.device)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers `weight` and `scale` for a weight ``[out, in]``."""
        raise NotImplementedError


class Nf4Linear(QuantizedLinear):
    """A linear layer with its weight in NF4, dequantized at every call.

    `weight` holds two weights in a byte, the first in the upper half; `scale` is bfloat16, one for each block. The
    dtype of `weight` is int8: transformers leaves the input of UMT5's output layers alone where the weight is int8.
    """

    pairs: Tensor

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__(linear, device=device)
        if self.bias is not None:  # a float8 one where the network was stored in float8 before
            self.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=self.bias.requires_grad)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return about what the linear layer would: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        return nn.functional.linear(tokens, self.dequantized(tokens.dtype), self.bias)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weight ``[out, in]`` as `dtype`."""
        pairs = nn.functional.embedding(self.weight.view(torch.uint8).int(), self.pairs.to(dtype))
        flat = pairs.view(-1, NF4_BLOCK).mul_(self.scale.to(dtype).unsqueeze(1)).flatten()
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def take_weight(self, weight: Tensor, *, device: torch.device) -> None:
        """See `QuantizedLinear.take_weight`."""
        super().take_weight(weight, device=device)
        values = torch.tensor(NF4_VALUES, device=weight.device)
        # The two values of every byte.
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
        self.register_buffer("pairs", pairs, persistent=False)

    @staticmethod
    def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight of any shape in NF4: pairs of codes ``[ceil(n / 64) * 32]`` as int8, scales as bfloat16."""
        flat = weight.flatten()
        flat = nn.functional.pad(flat, (0, -len(flat) % NF4_BLOCK))
        blocks = flat.view(-1, NF4_BLOCK)
        # Small parts keep temporaries in the cache; on the meta device there are none.
        parts = [blocks] if weight.is_meta else torch.split(blocks, BLOCKS_AT_ONCE)
        codes, scales = zip(*map(_nf4_codes, parts), strict=True)
        return torch.cat(codes), torch.cat(scales)


def _nf4_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    exact = blocks.float()
    scale = exact.abs().amax(1).clamp_min(SMALLEST_MAXIMUM).to(torch.bfloat16)
    relative = exact / scale.unsqueeze(1)
    codes = torch.zeros(blocks.shape, dtype=torch.uint8, device=blocks.device)
    for lower, upper in pairwise(NF4_VALUES):  # twice as fast as PyTorch's search among the 15 bounds
        codes += relative > (lower + upper) / 2
    first, second = codes.view(-1, 2).unbind(1)
    return (first * 16 + second).view(torch.int8), scale


class MatmulLinear(QuantizedLinear):
    """A linear layer that multiplies in eight bits; one subclass for each number format."""

    name: ClassVar[Quantization]
    side_multiple: ClassVar[int]
    """The kernels take weights whose rows and columns are multiples of this."""
    least_capability: ClassVar[tuple[int, int]]
    """Compute capability of the first CUDA cards with such a matmul."""
    first_cards: ClassVar[str]
    cuda_dtypes: ClassVar[tuple[torch.dtype, ...]]
    """Dtypes of weights and tokens that the CUDA kernels take."""

    @classmethod
    def quantize(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight in eight bits, and its scales ``[1, out]`` in float32."""
        rounded, scale = cls.rounded(weight)
        return rounded, scale.t()

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in eight bits, and their scales ``[R, 1]`` in float32."""
        raise NotImplementedError


class Float8Linear(MatmulLinear):
    """A linear layer that multiplies float8."""

    name = "float8"
    side_multiple = 16
    least_capability = (8, 9)
    first_cards = "RTX 40, L40, H100"
    cuda_dtypes = (torch.bfloat16,)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return about what the linear layer would: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        rounded, scale = self.rounded(tokens.flatten(0, -2))
        output = torch._scaled_mm(
            rounded, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=tokens.dtype, use_fast_accum=True
        )
        return torch.unflatten(output, 0, tokens.shape[:-1])

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in float8, and their scales ``[R, 1]`` in float32."""
        scale = _largest(rows) / torch.finfo(FLOAT8).max
        # The largest may come out slightly above 448, which still rounds to 448: overflow begins at 464.
        return (rows / scale).to(FLOAT8), scale.float()


class Int8Linear(MatmulLinear):
    """A linear layer that multiplies int8."""

    name = "int8"
    side_multiple = 8
    least_capability = (8, 0)
    first_cards = "A100, RTX 30"
    cuda_dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return about what the linear layer would: ``[..., in]`` to ``[..., out]``, in the dtype of `tokens`."""
        rows = tokens.flatten(0, -2)
        output = rows.new_empty(len(rows), len(self.weight))
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            output[part] = self._multiplied(rows[part])
        return torch.unflatten(output, 0, tokens.shape[:-1])

    def _multiplied(self, rows: Tensor) -> Tensor:
        rounded, scale = self.rounded(rows)
        missing = max(FEWEST_ROWS - len(rows), 0)
        if missing:
            rounded = nn.functional.pad(rounded, (0, 0, 0, missing))
        sums = torch._int_mm(rounded, self.weight.t())[: len(rows)]
        output = (sums * scale).mul_(self.scale)
        return output if self.bias is None else output.add_(self.bias)

    @staticmethod
    def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows ``[R, C]`` in int8, and their scales ``[R, 1]`` in float32."""
        # Divided in float32: bfloat16 has no halves above 64, and would round a second time.
        scale = _largest(rows).float() / torch.iinfo(torch.int8).max
        return (rows / scale).round_().to(torch.int8), scale


LAYERS: dict[str, type[MatmulLinear]] = {layer.name: layer for layer in (Float8Linear, Int8Linear)}


def _largest(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row, ``[R, 1]``."""
    return torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_min(SMALLEST_MAXIMUM)


def block_linears(network: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers in a network's blocks that are not quantized yet.

    In Wan's transformers these are the projections of both attentions and the feed-forward net; embeddings, norms,
    modulation and the last projection stay as they are.
    """
    for name, module in network.named_modules():
        if IN_A_BLOCK.search(name) and isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear):
            yield name


def _linears_to_replace(networks: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Return each network with each name of `block_linears`; raise `AdapterError` if a LoRA is attached to one."""
    found = [(network, name) for network in networks for name in block_linears(network)]
    for _, name in found:
        if ".base_layer" in name or ".lora_" in name:
            msg = f"a LoRA is attached to {name.split('.base_layer')[0]}; fuse it before the weights are quantized"
            raise AdapterError(msg)
    return found


# ------------------------------------------------------------------------------------------------- stored narrow


def store_weights(network: nn.Module, dtype: Storage | Quantization, *, compute_dtype: torch.dtype) -> None:
    """Store the large weights of a transformer or text encoder as `dtype`, and compute in `compute_dtype` as before.

    Weights are never widened again, as that would not bring back what was rounded away. Call this before offloading.
    Layers with quantized matmul hold one byte a weight already, and are left as they are.

    Args:
        network: on any device; on the meta device it is prepared for weights that are read later.
        dtype: `float8`, or `nf4` (also where it was `float8` before); wider ones change nothing.
        compute_dtype: of the work.

    Raises:
        MemoryBudgetError: weights cannot be stored in `dtype`.
        AdapterError: a LoRA is attached to a network that is to be stored in `nf4`.
    """
    if dtype in {"bfloat16", "float32"}:
        return
    if dtype not in {"float8", "nf4"}:
        msg = f"weights cannot be stored in {dtype}; allow more host memory, or store them in float8 or nf4"
        raise MemoryBudgetError(msg)
    if dtype == "nf4":
        for _, name in _linears_to_replace([network]):
            linear: Any = network.get_submodule(name)
            network.set_submodule(name, Nf4Linear(linear, dtype=compute_dtype))
    elif stored_narrow(network) is None:
        if isinstance(network, ModelMixin):
            network.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=compute_dtype)
        else:
            apply_layerwise_casting(network, FLOAT8, compute_dtype, skip_modules_pattern=TEXT_ENCODER_EXACT)


def storages_of(dtype: torch.dtype) -> tuple[Storage, ...]:
    """Return how the weights of networks that work in `dtype` can be stored, the most exact (unchanged) first."""
    return ("float32" if dtype == torch.float32 else "bfloat16", *STORAGES[1:])


def stored_narrow(network: nn.Module) -> Storage | Quantization | None:
    """Return the dtype of a network's large weights if it is narrower than that of the work, else None.

    This may be the doing of `store_weights` or of `use_quantized_matmul`.
    """
    if any(isinstance(module, Nf4Linear) for module in network.modules()):
        return "nf4"
    held = {tensor.dtype for tensor in chain(network.parameters(), network.buffers())}
    if FLOAT8 in held:
        return "float8"
    return "int8" if torch.int8 in held else None


def stored_already(dtype: str) -> InvalidInputError:
    """Return the error for quantized matmul with weights that were stored as `dtype` to save host memory."""
    return InvalidInputError(
        f"the weights are stored in {dtype} already, and would be rounded twice; "
        "allow more host memory, or use quantization none",
        param="quantization",
    )


# ----------------------------------------------------------------------------------------------- quantized matmul


def use_quantized_matmul(networks: Sequence[nn.Module], quantization: Quantization, *, device: torch.device) -> None:
    """Replace every linear layer in the networks' blocks by one that multiplies in eight bits.

    Args:
        networks: transformers with their LoRAs fused, on any device.
        quantization: the number format; `none` changes nothing.
        device: where they will work.

    Raises:
        InvalidInputError: `device` has no such matmul, or a layer has a shape or dtype that the kernels do not take.
        AdapterError: a LoRA is attached; then no network is changed.
    """
    if quantization == "none":
        return
    check_quantized_device(quantization, device)
    kind = LAYERS[quantization]
    if any(isinstance(module, Nf4Linear) for network in networks for module in network.modules()):
        raise stored_already("nf4")
    found = _linears_to_replace(networks)
    for network, name in found:
        _check_layer(name, network.get_submodule(name), kind, device)
    for network, name in found:
        linear: Any = network.get_submodule(name)
        network.set_submodule(name, kind(linear, device=device))


def quantization_of(network: nn.Module) -> Quantization:
    """Return the quantized matmul of a network's blocks: what `use_quantized_matmul` was called with."""
    return next((module.name for module in network.modules() if isinstance(module, MatmulLinear)), "none")


def check_quantized_device(quantization: Quantization, device: torch.device) -> None:
    """Raise `InvalidInputError` unless `device` has such a matmul.

    A CPU has them, slow ones that show the loss of quality; on the meta device the work is only counted.
    """
    if quantization == "none" or device.type in {"cpu", "meta"}:
        return
    if device.type != "cuda":
        msg = f"{quantization} matmul is for CUDA cards, and not for {device.type}; use quantization none"
        raise InvalidInputError(msg, param="quantization", value=quantization)
    kind, capability = LAYERS[quantization], torch.cuda.get_device_capability(device)
    if capability < kind.least_capability:
        other = "int8 or none" if kind is Float8Linear and capability >= Int8Linear.least_capability else "none"
        msg = (
            f"{torch.cuda.get_device_name(device)} has no {kind.name} matmul (capability {_dotted(capability)}, "
            f"{_dotted(kind.least_capability)} is the first with it: {kind.first_cards}); use quantization {other}"
        )
        raise InvalidInputError(msg, param="quantization", value=quantization)


def _check_layer(name: str, layer: Any, kind: type[MatmulLinear], device: torch.device) -> None:
    if layer.weight.dtype == FLOAT8:
        raise stored_already("float8")
    if device.type == "cuda" and layer.weight.dtype not in kind.cuda_dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in kind.cuda_dtypes)
        msg = f"{kind.name} matmul on a CUDA card takes {wanted}, and {name} has {layer.weight.dtype}; load it as "
        raise InvalidInputError(msg + wanted, param="quantization", value=kind.name)
    if any(side % kind.side_multiple for side in (layer.in_features, layer.out_features)):
        msg = (
            f"{name} is {layer.in_features} by {layer.out_features}, and {kind.name} matmul takes multiples of "
            f"{kind.side_multiple}; use quantization none"
        )
        raise InvalidInputError(msg, param="quantization", value=kind.name)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
