"""How a pipeline is run: which attention and decoder, compiled or not, side by side, on how many cards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from swifti2v.errors import InvalidInputError
from swifti2v.settings import Quantization
from swifti2v.stage_one import StageOne
from swifti2v.wan.attention_choice import check_attention_name, set_attention
from swifti2v.wan.quantized_linear import use_quantized_matmul

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings


MAX_GRAPHS = 64
"""Compiled graphs of one block in a process: each size of video needs three or four. PyTorch's own limit is 8, and
beyond it blocks run uncompiled without a warning: in a worker, from its third size on."""


@dataclass(frozen=True)
class Acceleration:
    """Ways to run faster; all but a light decoder and quantization give the same video.

    Args:
        attention: `auto`, or a name of `swifti2v.wan.attention_choice.BACKENDS`.
        compile_blocks: compile the block of each transformer once (`torch.compile`, regional). Shapes are static: every
            length of window has its own graph. With M targets and one neighbor before, those are the first window
            (1 + M), the ones in the middle (1 + 1 + M) and, where M does not divide the clip, a shorter last one.
        quantization: quantized matmul in the transformers' blocks (`wan/quantized_linear.py`), inexact; with
            `compile_blocks` rounding takes less time. `none`: as the weights are.
        overlap: decode and hand out frames while the next segment is denoised.
        num_processes: processes that share the sequence of every forward (Ulysses), one on each card, as torchrun
            starts them.
        decoder: `exact` is Stage II's codec; `light` a small network of lower fidelity (`wan/taehv.py`).
        decoder_weights: of the light decoder: a file, or ``OWNER/NAME/FILE`` on the hub; None: the public one.
        decode_device: where finished segments are decoded, ``cuda:1`` for instance; None: where they are made.

    Raises:
        InvalidInputError: the name of attention, quantization or decoder is unknown, weights are given for the exact
            decoder, or there is less than one process.
    """

    attention: str = "auto"
    compile_blocks: bool = False
    quantization: Quantization = "none"
    overlap: bool = True
    num_processes: int = 1
    decoder: Literal["exact", "light"] = "exact"
    decoder_weights: str | None = None
    decode_device: str | None = None

    def __post_init__(self) -> None:
        check_attention_name(self.attention)
        if self.quantization not in get_args(Quantization):
            msg = f"quantization {self.quantization!r} is not known; use none, float8 or int8"
            raise InvalidInputError(msg, param="quantization", value=self.quantization)
        if self.decoder not in {"exact", "light"}:
            msg = f"decoder {self.decoder!r} is not known; use exact or light"
            raise InvalidInputError(msg, param="decoder", value=self.decoder)
        if self.decoder == "exact" and self.decoder_weights is not None:
            msg = "decoder_weights are for the light decoder; the exact one is the checkpoint's: use decoder light"
            raise InvalidInputError(msg, param="decoder_weights", value=self.decoder_weights)
        if self.num_processes < 1:
            msg = f"num_processes is {self.num_processes}; use 1, or as many as torchrun has started"
            raise InvalidInputError(msg, param="num_processes", value=self.num_processes)


def accelerated(parts: Parts, acceleration: Acceleration) -> Parts:
    """Set the networks of `parts` up, in place, and return the parts to run with.

    Raises:
        InvalidInputError: an attention that is not installed, processes that are not there, or a quantized matmul that
            the device or the weights do not support.
    """
    networks = parts.transformers
    use_quantized_matmul(networks, acceleration.quantization, device=parts.device)
    set_attention(networks, acceleration.attention, device=parts.device)
    if acceleration.num_processes > 1:
        share_sequence(networks, acceleration.num_processes)
    if acceleration.compile_blocks:
        compile_blocks(networks)
    return parts if acceleration.overlap else replace(parts, overlap="none")


def compile_blocks(networks: Sequence[Any], *, backend: str = "inductor") -> None:
    """Compile the repeated blocks of each network, with static shapes; they are traced when they are first called."""
    import torch._dynamo

    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    for network in networks:
        network.compile_repeated_blocks(backend=backend, dynamic=False)


def share_sequence(networks: Sequence[Any], num_processes: int) -> None:
    """Split the tokens of every forward over the processes of the default group, through diffusers' Ulysses attention.

    Every process gives the same input and gets the whole result.

    Raises:
        InvalidInputError: the processes are not there, or have no cards; the heads of a network do not divide, or, when
            it is called, the tokens of a window.
    """
    from diffusers import ContextParallelConfig

    distributed = torch.distributed
    present = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if present != num_processes:
        msg = f"{num_processes} processes are to share the work and {present} are there; start them with torchrun"
        raise InvalidInputError(msg)
    for network in networks:
        heads = network.config.num_attention_heads
        if heads % num_processes:
            msg = f"{heads} heads of attention do not divide among {num_processes} processes; start fewer"
            raise InvalidInputError(msg)
    if not torch.accelerator.device_count():  # diffusers divides by it
        msg = f"{num_processes} processes share the work of as many CUDA cards, and there is none; start one process"
        raise InvalidInputError(msg)
    for network in networks:
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=num_processes))
        network.register_forward_pre_hook(partial(_check_tokens, num_processes), with_kwargs=True)


def check_shared(parts: Parts, settings: GenerationSettings, num_processes: int) -> None:
    """Raise `InvalidInputError` unless every forward pass of a run can be divided among the processes."""
    one, two = parts.stage_one, parts.stage_two
    if num_processes > 1 and (settings.keep_context or two.transformer.config.context_attention == "frozen"):
        msg = "frozen or kept context cannot be split among processes; start one process, or turn keep_context off"
        raise InvalidInputError(msg)
    windows = []
    if isinstance(one, StageOne):  # that of `mini` is not shared: every process runs all of it
        motion = one.geometry.tokens_per_frame(parts.motion_size(settings.size))
        windows += [motion * one.geometry.latent_frames(len(window)) for window in one.plan(settings.num_frames)]
    if settings.denoises_segments:
        windows += [two.geometry.tokens_per_frame(settings.size) * len(each.window) for each in two.plan(settings)]
    for num_tokens in windows:
        _check_divides(num_tokens, num_processes)


def _check_tokens(num_processes: int, network: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    hidden_states = named["hidden_states"] if "hidden_states" in named else arguments[0]
    _check_divides(hidden_states[0, 0].numel() // prod(network.config.patch_size), num_processes)


def _check_divides(num_tokens: int, num_processes: int) -> None:
    if num_tokens % num_processes:
        msg = (
            f"{num_tokens} tokens of a window do not divide among {num_processes} processes; "
            f"choose another size, or fewer processes"
        )
        raise InvalidInputError(msg)
