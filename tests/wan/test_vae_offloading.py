"""Streams over a codec whose weights are offloaded: the hooks are asked, and the result does not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module

from swifti2v.wan.streaming import CodecSettings, WanStreamingCodec
from tests.wan.codec_streams import (
    clip_for,
    cut,
    decode,
    encode,
    latents_for,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import AutoencoderKLWan


class LendingHook(ModelHook):
    """Stands for model offloading: the weights are right only after it was asked for them."""

    execution_device = "cpu"

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.weights = {name: value.clone() for name, value in vae.state_dict().items()}
        self.calls = 0

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        module.load_state_dict(self.weights)
        return args, kwargs

    def take_away(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            for value in module.parameters():
                value.fill_(torch.nan)


def test_an_offloading_hook_is_asked_before_every_latent_frame(tiny_vae22: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(tiny_vae22)
    latents, clip = latents_for(tiny_vae22), clip_for(tiny_vae22)
    expected = decode(codec, latents), encode(codec, clip)
    hook = LendingHook(tiny_vae22)
    add_hook_to_module(tiny_vae22, hook)
    for result, stream in zip(
        expected,
        (codec.decode_pixel_stream(latents.split(1, dim=2)), codec.encode_stream(cut(clip))),
        strict=True,
    ):
        hook.take_away(tiny_vae22)
        parts = []
        for part in stream:
            parts.append(part)
            hook.take_away(tiny_vae22)
        assert torch.equal(torch.cat(parts, dim=2), result)
    assert hook.calls == 6


def sequential_offload(vae: AutoencoderKLWan) -> None:
    cpu_offload(vae, execution_device=torch.device("cpu"))
    assert next(vae.parameters()).is_meta


def group_offload(vae: AutoencoderKLWan) -> None:
    vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


@pytest.mark.parametrize("offload", [sequential_offload, group_offload])
def test_offloading_hooks_of_submodules_do_not_change_the_result(
    tiny_vae22: AutoencoderKLWan, offload: Callable[[AutoencoderKLWan], None]
) -> None:
    plain = WanStreamingCodec(tiny_vae22, settings=CodecSettings(chunked=False))
    codec = WanStreamingCodec(tiny_vae22)
    latents, clip = latents_for(tiny_vae22), clip_for(tiny_vae22)
    expected = decode(plain, latents), encode(plain, clip)
    offload(tiny_vae22)
    assert torch.equal(decode(codec, latents), expected[0])
    assert torch.equal(encode(codec, clip), expected[1])
