"""What one training step of a transformer costs, measured: its network is built without memory, run and differentiated.

Tensors are PyTorch's fake ones, which have shapes and no numbers. FLOPs are those of `FlopCounterMode`; bytes are those
of tensors that are alive (`memory/live_bytes.py`). Blocks are alike, so the network is run with few of them, and the
rest is multiplication.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.memory.live_bytes import LiveBytes
from swifti2v.memory.measure import build

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from swifti2v.memory.networks import Network

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""Layers of every block that a LoRA changes by default: attention and feed-forward net."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A transformer, and what of it is trained.

    Args:
        network: class and configuration.
        lora_rank: 0 trains every weight, in float32; above, the rest is frozen in bfloat16.
        lora_targets: endings of the names of the layers that have a LoRA.
        also_trained: beginnings of the names of weights that are trained beside a LoRA.
        gradient_checkpointing: run each block's forward again in the backward pass.
    """

    network: Network
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    also_trained: tuple[str, ...] = ()
    gradient_checkpointing: bool = True


class StepFlops(NamedTuple):
    """TFLOP of a batch: of the forward pass alone, and of forward and backward, recomputed blocks included."""

    forward: float
    step: float


class StepBytes(NamedTuple):
    """What a device holds to train a network, all of it whole.

    Args:
        activations: largest sum of living tensors that a step makes; gradients count while they are made.
        num_trained: weights that are trained; each has a float32 master and a float32 gradient.
        frozen: bytes of the other weights.
        block: bytes of the weights of a block.
        block_trained: of these, bytes of the ones that are trained.
    """

    activations: int
    num_trained: int
    frozen: int
    block: int
    block_trained: int


@lru_cache(maxsize=256)
def measured_flops(trained: TrainedNetwork, latent_shape: tuple[int, int, int, int], *, text_tokens: int) -> StepFlops:
    """Count a step under bfloat16 autocast.

    Args:
        trained: the network.
        latent_shape: [B,T,h,w] of the latents; the channels are those that the network reads.
        text_tokens: length of the prompts.
    """

    def counted(num_blocks: int) -> tuple[float, float]:
        counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION_FLOP)
        network = _built(trained, num_blocks)
        with FakeTensorMode(), torch.enable_grad():
            _faked(network)
            with counter:
                made = _forward(network, latent_shape, text_tokens)
                forward = counter.get_total_flops()
                _backward(made)
        return forward / 1e12, counter.get_total_flops() / 1e12

    one, two = counted(1), counted(2)
    more = trained.network.config["num_layers"] - 1
    return StepFlops(*(first + more * (second - first) for first, second in zip(one, two, strict=True)))


@lru_cache(maxsize=256)
def measured_bytes(trained: TrainedNetwork, latent_shape: tuple[int, int, int, int], *, text_tokens: int) -> StepBytes:
    """Count the bytes of a step; see `measured_flops` for the arguments."""

    def counted(num_blocks: int) -> tuple[int, int, int]:
        network = _built(trained, num_blocks)
        num_trained = sum(each.numel() for each in network.parameters() if each.requires_grad)
        frozen = sum(each.nbytes for each in network.parameters() if not each.requires_grad)
        # Not within the counter of FLOPs, which keeps tensors alive.
        with FakeTensorMode(), torch.enable_grad():
            _faked(network)
            with LiveBytes() as live:
                _backward(_forward(network, latent_shape, text_tokens))
        return live.peak_bytes, num_trained, frozen

    two, three = counted(2), counted(3)
    more = trained.network.config["num_layers"] - 2
    _, block_trained, block_frozen = (third - second for second, third in zip(two, three, strict=True))
    peak, num_trained, frozen = (second + more * (third - second) for second, third in zip(two, three, strict=True))
    return StepBytes(peak, num_trained, frozen, block=block_frozen + 4 * block_trained, block_trained=4 * block_trained)


def _backward(made: torch.Tensor) -> None:
    made.float().square().mean().backward()  # type: ignore[no-untyped-call]


def _built(trained: TrainedNetwork, num_blocks: int) -> Any:
    with torch.random.fork_rng(devices=[]):  # a LoRA draws its first weights, which a run's own numbers must not feel
        return _with_lora(trained, num_blocks)


def _with_lora(trained: TrainedNetwork, num_blocks: int) -> Any:
    network = build(trained.network, "bfloat16" if trained.lora_rank else "float32", num_blocks=num_blocks)
    if trained.lora_rank:
        network.requires_grad_(requires_grad=False)
        targets = list(trained.lora_targets)
        network.add_adapter(LoraConfig(r=trained.lora_rank, lora_alpha=trained.lora_rank, target_modules=targets))
        for name, parameter in network.named_parameters():
            if parameter.requires_grad or name.startswith(trained.also_trained):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(requires_grad=True)
    if trained.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return network.train()


def _faked(network: nn.Module) -> None:
    """Exchange parameters and buffers of the meta device for fake ones of the CPU; gradients are dropped when made."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                fake = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = fake
                if fake.requires_grad:
                    fake.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _forward(network: Any, shape: tuple[int, int, int, int], text_tokens: int) -> torch.Tensor:
    config, (batch, frames, height, width) = network.config, shape
    latents = torch.empty(batch, config.in_channels, frames, height, width)
    text = torch.empty(batch, text_tokens, config.text_dim)
    # Stage I has one timestep for a clip, Stage II one for each frame.
    timestep = torch.empty(batch, frames) if hasattr(network, "frame_kind_table") else torch.empty(batch)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        warnings.filterwarnings("ignore", "Mismatch dtype", UserWarning)
        made: torch.Tensor
        (made,) = network(latents, timestep, text, return_dict=False)
    return made


def _attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward_flop(
    _gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * _attention_flop(query, key, value)  # what a model needs: a kernel that recomputes the scores does more


_ATTENTION_FLOP = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}
"""What PyTorch's counter does not know: fused attention on a CPU."""
