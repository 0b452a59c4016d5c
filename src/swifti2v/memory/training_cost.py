"""What training a transformer costs: bytes on each device, TFLOP and GPU-hours of a step. Arithmetic only.

Bytes are those that the training loop holds: float32 master weights, gradients, optimiser and average of what is
trained; what is frozen in bfloat16; activations as diffusers' eager blocks save them under bfloat16 autocast. Left out
are the driver's context (0.5-0.8 GiB), workspaces and fragmentation. `tests/memory/test_training_cost.py` holds the
counts against PyTorch's FLOP counter and the tensors that autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from swifti2v.errors import InvalidInputError
from swifti2v.memory.transformer_cost import TERA

if TYPE_CHECKING:
    from swifti2v.memory.transformer_cost import TransformerDimensions

Optimizer = Literal["adamw", "adamw8bit"]
MOMENT_BYTES: dict[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Bytes per trained weight of both moments; 8 bits with a float32 scale for each 256."""

MASTER_BYTES = 4
FROZEN_BYTES = 2


@dataclass(frozen=True)
class TrainingWork:
    """Arithmetic of one step for one sample, by what is trained.

    Args:
        transformer: the network.
        trains_all: all weights, or (False) a LoRA on attention and feed-forward nets.
        lora_rank: of the LoRA; 0 leaves its own arithmetic out.
    """

    transformer: TransformerDimensions
    trains_all: bool
    lora_rank: int = 0

    def model_tflop(self, num_tokens: int, *, text_tokens: int = 512, num_timesteps: int = 1) -> float:
        """TFLOP of forward and backward: what MFU counts; recomputed activations are not in it."""
        cost = self.transformer.forward_cost(num_tokens, text_tokens=text_tokens, num_timesteps=num_timesteps)
        linear = self.linear_tflop(num_tokens, text_tokens=text_tokens, num_timesteps=num_timesteps)
        return linear + 3 * (cost.self_attention_tflop + cost.cross_attention_tflop)

    def linear_tflop(self, num_tokens: int, *, text_tokens: int = 512, num_timesteps: int = 1) -> float:
        """TFLOP of the matrices (all but attention): forward and backward.

        Backward costs the gradient of the input, unless nothing before needs one, and that of the weight if trained.
        """
        network = self.transformer
        forward = network.forward_cost(num_tokens, text_tokens=text_tokens, num_timesteps=num_timesteps).linear_tflop
        dim, patch = network.dim, prod(network.patch_size)
        if self.trains_all:
            first = num_tokens * patch * network.in_channels * dim
            first += text_tokens * network.text_dim * dim + num_timesteps * network.freq_dim * dim
            return 3 * forward - 2 * first / TERA
        blocks = network.num_layers * (6 * num_tokens * dim**2 + 2 * num_tokens * dim * network.ffn_dim)
        # The first block's q, k and v read what nothing trained has touched.
        backward = blocks - 3 * num_tokens * dim**2 + num_tokens * patch * network.out_channels * dim
        return forward + 2 * backward / TERA + self._lora_tflop(num_tokens, text_tokens)

    def step_tflop(self, num_tokens: int, *, text_tokens: int = 512, gradient_checkpointing: bool = True) -> float:
        """TFLOP that the device does: with checkpointing every block runs forward twice."""
        again = (
            self.transformer.forward_cost(num_tokens, text_tokens=text_tokens).tflop if gradient_checkpointing else 0
        )
        return self.model_tflop(num_tokens, text_tokens=text_tokens) + again

    @property
    def num_lora_parameters(self) -> int:
        """Weights of the LoRA: both matrices on q, k, v, out of both attentions and on the feed-forward net."""
        dim = self.transformer.dim
        return self.transformer.num_layers * self.lora_rank * (8 * 2 * dim + 2 * (dim + self.transformer.ffn_dim))

    def _lora_tflop(self, num_tokens: int, text_tokens: int) -> float:
        network, rank = self.transformer, self.lora_rank
        dim, layers = network.dim, network.num_layers
        forward = layers * (num_tokens * rank * (14 * dim + 2 * network.ffn_dim) + text_tokens * rank * 4 * dim)
        no_input_gradient = layers * text_tokens * rank * 2 * dim + num_tokens * rank * 3 * dim
        return 2 * (3 * forward - no_input_gradient) / TERA


@dataclass(frozen=True)
class TrainingSetup:
    """How a transformer is trained.

    Args:
        work: network and what of it is trained.
        num_tokens: of a sample.
        batch_size: samples on each device at once.
        optimizer: AdamW in float32 or with 8-bit moments.
        averages: whether an average of the trained weights is held.
        gradient_checkpointing: keep the input of each block and compute the rest again.
        num_devices: that train together.
        shards: whether weights, gradients, optimiser and average are divided over them (FSDP2).
        context_parallel: devices that share a sample, each with a part of its tokens.
        has_teacher: whether each device holds a frozen copy of the network as well.
        has_critic: whether a second network of the kind is trained in turn with it: its weights and moments, but no
            average, and never its gradients or activations at the same time.
    """

    work: TrainingWork
    num_tokens: int
    batch_size: int = 1
    optimizer: Optimizer = "adamw"
    averages: bool = True
    gradient_checkpointing: bool = True
    num_devices: int = 1
    shards: bool = True
    context_parallel: int = 1
    has_teacher: bool = False
    has_critic: bool = False

    def __post_init__(self) -> None:
        """Raise `InvalidInputError` for a count below 1, devices that do not divide, or a LoRA without a rank."""
        if min(self.num_tokens, self.batch_size, self.num_devices, self.context_parallel) < 1:
            msg = "num_tokens, batch_size, num_devices and context_parallel must be at least 1"
            raise InvalidInputError(msg)
        if self.num_devices % self.context_parallel:
            msg = f"context_parallel {self.context_parallel} does not divide {self.num_devices} devices; choose another"
            raise InvalidInputError(msg)
        if not self.work.trains_all and self.work.lora_rank < 1:
            msg = f"the rank of the LoRA is {self.work.lora_rank}; it must be at least 1"
            raise InvalidInputError(msg)

    @property
    def num_trained(self) -> int:
        """Weights that are trained."""
        work = self.work
        return work.transformer.num_parameters if work.trains_all else work.num_lora_parameters


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device.

    Args:
        weight_bytes: its part of frozen weights and masters, the critic's too, and the teacher if there is one.
        gradient_bytes: its part of the gradients.
        optimizer_bytes: its part of the moments, the critic's too.
        average_bytes: its part of the averaged weights.
        gathered_bytes: blocks that are put together from all devices to run, and the bfloat16 casts of trained ones.
        activation_bytes: what is saved for the backward pass, at its peak, and the gradients that flow there.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    gathered_bytes: int
    activation_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        held = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes
        return held + self.gathered_bytes + self.activation_bytes


def training_memory(setup: TrainingSetup) -> TrainingMemory:
    """Count the bytes of a setup on each device."""
    trained, devices = setup.num_trained, setup.num_devices if setup.shards else 1
    frozen = 0 if setup.work.trains_all else setup.work.transformer.num_parameters
    teacher = FROZEN_BYTES * setup.work.transformer.num_parameters * setup.has_teacher
    networks = 1 + setup.has_critic
    return TrainingMemory(
        weight_bytes=networks * (FROZEN_BYTES * frozen + MASTER_BYTES * trained) // devices + teacher,
        gradient_bytes=MASTER_BYTES * trained // devices,
        optimizer_bytes=networks * _moment_bytes(setup) // devices,
        average_bytes=MASTER_BYTES * trained * setup.averages // devices,
        gathered_bytes=_gathered_bytes(setup),
        activation_bytes=_activation_bytes(setup),
    )


def saved_bytes_per_token(work: TrainingWork) -> int:
    """Bytes that autograd saves for one token in one of diffusers' Wan blocks, bfloat16 autocast, eager.

    In widths D, feed-forward F, heads H: six bfloat16 attention tensors (12 D), float32 around norms, rotary embedding
    and modulation (24 D; 48 D where norms and modulation are trained), inputs of the linear layers as autocast makes
    them for each (14 D with a LoRA; 8 D where all is trained and equal casts are shared), the feed-forward net before
    and after its activation (4 F), statistics of softmax and norms (8 H + 36).
    """
    network = work.transformer
    per_width = 68 if work.trains_all else 50
    lora = 0 if work.trains_all else 8 * FROZEN_BYTES * work.lora_rank
    return per_width * network.dim + 4 * network.ffn_dim + 8 * network.num_attention_heads + 36 + lora


def gpu_hours(
    work: TrainingWork,
    *,
    num_tokens: int,
    num_samples: int,
    tflop_per_second: float,
    gradient_checkpointing: bool = True,
) -> float:
    """GPU-hours to train on `num_samples` (steps times samples of all devices).

    Args:
        work: network and what of it is trained.
        num_tokens: of a sample.
        num_samples: steps times the samples of all devices in a step.
        tflop_per_second: that one device really does; an assumption until it is measured.
        gradient_checkpointing: whether blocks run forward twice.
    """
    step = work.step_tflop(num_tokens, gradient_checkpointing=gradient_checkpointing)
    return num_samples * step / tflop_per_second / 3600


def window_shares(segment_size: int, *, full_share: float, before_share: float, after_share: float) -> dict[int, float]:
    """Return how often windows of each length, in latent frames, are drawn in training; ends of clips left out.

    Args:
        segment_size: most targets.
        full_share: of windows with that many; the others have fewer, all numbers alike.
        before_share: of windows that see a finished neighbour.
        after_share: of windows that see an unrefined one.
    """
    fewer = range(1, segment_size)
    targets = {count: (1 - full_share) / len(fewer) for count in fewer}
    targets[segment_size] = full_share if fewer else 1.0
    shares: dict[int, float] = {}
    for count, share in targets.items():
        for before, is_before in ((0, 1 - before_share), (1, before_share)):
            for after, is_after in ((0, 1 - after_share), (1, after_share)):
                length = 1 + before + count + after
                shares[length] = shares.get(length, 0.0) + share * is_before * is_after
    return {length: share for length, share in sorted(shares.items()) if share}


def _moment_bytes(setup: TrainingSetup) -> int:
    if setup.work.trains_all:
        return round(MOMENT_BYTES[setup.optimizer] * setup.num_trained)
    # Of a LoRA's two matrices only the one with long rows is kept in 8 bits (`training.engine.optimizers`).
    return round((MOMENT_BYTES[setup.optimizer] + MOMENT_BYTES["adamw"]) / 2 * setup.num_trained)


def _activation_bytes(setup: TrainingSetup) -> int:
    network = setup.work.transformer
    block = saved_bytes_per_token(setup.work)
    kept = FROZEN_BYTES * network.dim if setup.gradient_checkpointing else block
    layers = network.num_layers
    # The block whose backward pass runs: what it saved, and gradients in flight (five float32 of the token width and
    # two bfloat16 of the feed-forward net).
    in_work = (block if setup.gradient_checkpointing else 0) + 20 * network.dim + 4 * network.ffn_dim
    rotary = 2 * 4 * network.attention_head_dim
    tokens = -(-setup.num_tokens // setup.context_parallel)
    return setup.batch_size * tokens * (layers * kept + in_work + rotary)


def _gathered_bytes(setup: TrainingSetup) -> int:
    network = setup.work.transformer
    block = network.num_parameters // network.num_layers
    cast = FROZEN_BYTES * block if setup.work.trains_all else 0
    if setup.num_devices == 1:
        return cast
    # FSDP2 gathers the next block while one runs; gradients of a trained block are whole before they are reduced.
    width = MASTER_BYTES if setup.work.trains_all else FROZEN_BYTES
    gradients = MASTER_BYTES * block if setup.work.trains_all else 0
    return 2 * width * block + gradients + cast
