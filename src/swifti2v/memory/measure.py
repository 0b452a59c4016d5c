"""Run a network on the meta device and count: FLOPs, bytes at work, bytes of weights. Nothing is allocated.

Blocks are alike, so a transformer is run with one and with two of them, and the rest is multiplication; the tests
compare with runs of all blocks. A codec is run for three latent frames, after which its caches are full.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import fields
from functools import singledispatch
from importlib import import_module
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from swifti2v.memory.costs import (
    Clip,
    ClipCost,
    Decoding,
    Encoding,
    Forward,
    ForwardCost,
    StreamCost,
    WeightCost,
    Weights,
)
from swifti2v.memory.live_bytes import accounted
from swifti2v.memory.networks import LIGHT_DECODER, TEXT_ENCODER, Network
from swifti2v.memory.placement import store_weights
from swifti2v.segments import FrameKind
from swifti2v.wan.context_attention import ContextMemory
from swifti2v.wan.light_decoder import LightDecoder, LightDecoderNetwork, LightLayout
from swifti2v.wan.quantized_products import use_quantized_products
from swifti2v.wan.vae import CodecSettings, open_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from swifti2v.memory.networks import Quantization, Storage

_Cost = TypeVar("_Cost", StreamCost, ClipCost)

NUM_CHUNKS = 3
"""Latent frames of a codec's stream that are run: the first, one that fills the caches, and one like all later ones."""


def completed(network: Network) -> Network:
    """Return the network with the defaults of its class, so that all ways to write a configuration are one."""
    if network.class_path in {TEXT_ENCODER, LIGHT_DECODER}:
        return network
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(_class(network).__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    given = {name: value for name, value in network.config.items() if name in defaults}
    return Network.of(network.class_path, defaults | given)


@singledispatch
def measure(question: Any) -> Any:
    """Answer a question of `costs.py` by running the network."""
    raise TypeError(question)


@measure.register
def _weights(question: Weights) -> WeightCost:
    network, storage = question.network, (question.storage, question.quantization)

    def counted(num_blocks: int | None) -> tuple[int, int]:
        built = build(network, question.dtype, num_blocks=num_blocks)
        num_parameters = sum(parameter.numel() for parameter in built.parameters())
        store(built, *storage, dtype=question.dtype)
        return num_parameters, sum(tensor.nbytes for tensor in chain(built.parameters(), built.buffers()))

    num_blocks = network.config.get("num_layers")
    if num_blocks is None:
        return WeightCost(*counted(None))
    parameters, num_bytes = zip(counted(1), counted(2), strict=True)
    block = num_bytes[1] - num_bytes[0]
    return WeightCost(
        num_parameters=_extrapolated(*parameters, num_blocks),
        num_bytes=_extrapolated(*num_bytes, num_blocks),
        block_bytes=block,
        outside_bytes=num_bytes[0] - block,
    )


@measure.register
def _forward(question: Forward) -> ForwardCost:
    one, two = (_forward_of(question, num_blocks) for num_blocks in (1, 2))
    num_blocks = question.network.config["num_layers"]
    blocks = two["matmul"] - one["matmul"]
    return ForwardCost(
        blocks=num_blocks * blocks,
        matmul=one["matmul"] - blocks,
        attention=_extrapolated(one["attention"], two["attention"], num_blocks),
        working_bytes=two["working"],
        kept_text_bytes=_extrapolated(one["text"], two["text"], num_blocks),
        kept_context_bytes=_extrapolated(one["context"], two["context"], num_blocks),
    )


def _forward_of(question: Forward, num_blocks: int) -> dict[str, Any]:
    network = build(question.network, question.dtype, num_blocks=num_blocks)
    store(network, question.storage, question.quantization, dtype=question.dtype)
    run = _text_run(network, question) if question.num_frames == 0 else _window_run(network, question)
    counts = {"text": 0, "context": 0}
    with torch.no_grad():
        if question.num_context_frames:
            memory = ContextMemory(num_blocks)
            with accounted(network) as account:
                run(memory)
            counts["context"] = account.kept_bytes
            with accounted(network) as account:
                run(memory)
        else:
            with getattr(network, "text_kept", nullcontext)(), accounted(network) as account:
                run(None)
            counts["text"] = account.kept_bytes
    working = account.peak_bytes - account.kept_bytes
    attention = account.attention_tflop
    return counts | {"matmul": account.tflop - attention, "attention": attention, "working": working}


def _text_run(network: Any, question: Forward) -> Callable[[ContextMemory | None], None]:
    tokens = torch.zeros(1, question.num_text_tokens, dtype=torch.long, device="meta")
    return lambda _: network(tokens)


def _window_run(network: Any, question: Forward) -> Callable[[ContextMemory | None], None]:
    """Return what runs the network over a window: the whole of it, or its targets once a memory holds its context."""
    dtype, context = getattr(torch, question.dtype), question.num_context_frames
    num_frames = context + question.num_frames
    shape = (1, question.num_channels, num_frames, question.height, question.width)
    latents = torch.empty(shape, device="meta", dtype=dtype)
    text = torch.empty(1, question.num_text_tokens, network.config.text_dim, device="meta", dtype=dtype)
    kinds = torch.tensor([FrameKind.FINISHED] * context + [FrameKind.TARGET] * question.num_frames)

    def run(memory: ContextMemory | None) -> None:
        if not hasattr(network, "frame_kind_table"):  # a network of Stage I has one timestep for all frames
            network(latents, torch.empty(1, device="meta"), text, return_dict=False)
            return
        given = slice(context, None) if memory is not None and memory.is_filled else slice(None)
        timestep = torch.empty(1, num_frames, device="meta")[:, given]
        network(latents[:, :, given], timestep, text, frame_kinds=kinds[given], context_memory=memory)

    return run


@measure.register
def _encoding(question: Encoding) -> StreamCost:
    codec = _codec(question)

    def run(device: str) -> Iterator[Tensor]:
        lengths = (1, *(codec.temporal_factor for _ in range(NUM_CHUNKS - 1)))
        shapes = ((1, 3, length, question.height, question.width) for length in lengths)
        latents: Iterator[Tensor] = codec.encode_stream(torch.zeros(shape, device=device) for shape in shapes)
        return latents

    return _stream_cost(codec, run)


@measure.register
def _decoding(question: Decoding) -> StreamCost:
    codec = _codec(question)

    def run(device: str) -> Iterator[Tensor]:
        factor = codec.spatial_factor
        shape = (1, codec.num_channels, 1, question.height // factor, question.width // factor)
        decode = getattr(codec, "decode_pixel_stream", codec.decode_stream)
        frames: Iterator[Tensor] = decode(torch.zeros(shape, device=device) for _ in range(NUM_CHUNKS))
        return frames

    return _stream_cost(codec, run)


def _codec(question: Encoding) -> Any:
    network = build(question.network, question.dtype)
    if isinstance(network, LightDecoderNetwork):
        return LightDecoder(network)
    return open_codec(network, settings=CodecSettings(frames_per_step=1))


def _stream_cost(codec: Any, run: Callable[[str], Iterator[Tensor]]) -> StreamCost:
    def counted(device: str) -> StreamCost:
        done, cache = [0.0], 0
        with torch.no_grad(), accounted() as account:
            for item in run(device):
                del item
                done.append(account.tflop_so_far())
                cache = max(cache, account.current_bytes)
        return StreamCost(done[1], done[-1] - done[-2], account.peak_bytes, cache)

    return _on_meta_or_cpu(codec, counted)


@measure.register
def _clip(question: Clip) -> ClipCost:
    codec = build(question.network, question.dtype)
    geometry = question.network.geometry()

    def counted(device: str) -> ClipCost:
        latent = (geometry.latent_frames(question.num_frames), question.height // geometry.spatial)
        latents = torch.zeros(1, codec.config.z_dim, *latent, question.width // geometry.spatial, device=device)
        with torch.no_grad(), accounted() as account:
            pixels = torch.zeros(1, 3, question.num_frames, question.height, question.width, device=device)
            codec.encode(pixels)
            del pixels
            codec.decode(latents, return_dict=False)
        return ClipCost(account.tflop, account.peak_bytes)

    return _on_meta_or_cpu(codec, counted)


def _on_meta_or_cpu(codec: Any, counted: Callable[[str], _Cost]) -> _Cost:
    """Count on the meta device; a codec that looks at its numbers, such as one with optical flow, is run on the CPU."""
    try:
        return counted("meta")
    except (RuntimeError, NotImplementedError):
        if not isinstance(codec, nn.Module):  # Wan's codec and the light decoder run there
            raise
        codec.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in chain(codec.parameters(), codec.buffers()):
                tensor.zero_()
        return counted("cpu")


def store(network: nn.Module, storage: Storage, quantization: Quantization, *, dtype: str) -> None:
    """Store or quantize the weights of a transformer or text encoder on the meta device, as placement does."""
    if quantization == "none":
        store_weights(network, storage, compute_dtype=getattr(torch, dtype))
    else:
        use_quantized_products([network], quantization, device=torch.device("meta"))


def build(network: Network, dtype: str, *, num_blocks: int | None = None) -> Any:
    """Return a network on the meta device, in the dtypes that loading gives it, with `num_blocks` of its blocks."""
    config = network.config | ({} if num_blocks is None else {"num_layers": num_blocks})
    network_class = _class(network)
    with torch.device("meta"):
        if network.class_path == TEXT_ENCODER:
            built = network_class(import_module("transformers").UMT5Config(**config))
        elif network.class_path == LIGHT_DECODER:
            built = network_class(LightLayout(**{each.name: config[each.name] for each in fields(LightLayout)}))
        else:
            if "z_dim" in config:
                config |= {"latents_mean": [0.0] * config["z_dim"], "latents_std": [1.0] * config["z_dim"]}
            built = network_class.from_config(config)
    # As diffusers loads them (`wan/piecewise_reader.py` does the same); transformers knows such layers for float16.
    exact = set(getattr(built, "_keep_in_fp32_modules", None) or ()) if network.class_path != TEXT_ENCODER else set()
    for name, parameter in built.named_parameters():
        kept = bool(exact & set(name.split(".")))
        parameter.data = parameter.data.to(torch.float32 if kept else getattr(torch, dtype))
    return built.eval()


def _class(network: Network) -> Any:
    module, name = network.class_path.split(":")
    return getattr(import_module(module), name)


def _extrapolated(one: Any, two: Any, num_blocks: int) -> Any:
    return one + (num_blocks - 1) * (two - one)
