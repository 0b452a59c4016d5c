"""A stream equals the whole clip bit for bit, forgets everything when it ends, and refuses what it cannot code."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.wan.streaming import CodecSettings, StreamingCodec, WanStreamingCodec, open_codec
from swifti2v.wan.tiling import Tiling
from tests.wan.codec_streams import (
    clip_for,
    convolved_by_frame,
    cut,
    decode,
    encode,
    latents_for,
    whole_decode,
    whole_encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKLWan

# --- a stream equals the whole clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_equal_whole_encode_and_decode_bit_for_bit(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    vae.to(dtype)
    codec = WanStreamingCodec(vae, settings=CodecSettings(chunked=False))
    clip = clip_for(vae)
    latents = encode(codec, clip)
    assert latents.dtype == torch.float32
    pixels = decode(codec, latents_for(vae))
    assert pixels.dtype == torch.float32
    assert pixels.shape == clip.shape
    with convolved_by_frame(vae):
        assert torch.equal(latents, whole_encode(vae, clip))
        assert torch.equal(pixels, whole_decode(vae, latents_for(vae)))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(latents, whole_encode(vae, clip), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pixels, whole_decode(vae, latents_for(vae)), rtol=tolerance, atol=2 * tolerance)


def test_the_first_latent_frame_is_the_encoding_of_the_image(vae: AutoencoderKLWan) -> None:
    clip = clip_for(vae)
    stream = WanStreamingCodec(vae).encode_stream(cut(clip))
    assert torch.equal(next(stream), whole_encode(vae, clip[:, :, :1]))


def test_a_prefix_decodes_to_a_prefix(vae: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(vae)
    latents = latents_for(vae, 4)
    full = decode(codec, latents)
    for length in (1, 3):
        assert torch.equal(decode(codec, latents[:, :, :length]), full[:, :, : 4 * length - 3])


def test_latents_may_come_in_groups_of_any_length(vae: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(vae)
    latents = latents_for(vae, 4)
    grouped = list(codec.decode_stream(latents.split([3, 1], dim=2)))
    single = list(codec.decode_stream(latents.split(1, dim=2)))
    assert [len(frames) for frames in grouped] == [1, 4, 4, 4]
    assert all(torch.equal(a, b) for a, b in zip(grouped, single, strict=True))


def test_decoded_frames_are_the_rounded_pixels(vae: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(vae)
    latents = latents_for(vae, 2)
    frames = torch.cat(list(codec.decode_stream([latents])))
    pixels = whole_decode(vae, latents)[0].permute(1, 2, 3, 0).numpy()
    assert frames.dtype == torch.uint8
    assert np.array_equal(frames.numpy(), np.rint((pixels + np.float32(1)) * np.float32(127.5)).astype(np.uint8))


def test_streams_over_one_codec_do_not_disturb_each_other(vae: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(vae)
    latents, clip = latents_for(vae), clip_for(vae)
    reversed_latents = latents.flip(2)
    expected = decode(codec, latents), decode(codec, reversed_latents), encode(codec, clip)
    streams = (
        codec.decode_pixel_stream(latents.split(1, dim=2)),
        codec.decode_pixel_stream(reversed_latents.split(1, dim=2)),
        codec.encode_stream(cut(clip)),
    )
    pieces = []
    for step in zip(*streams, strict=True):
        pieces.append(step)
        whole_decode(vae, latents[:, :, :2])  # diffusers' own decode clears the caches inside the vae
    for result, parts in zip(expected, zip(*pieces, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim=2), result)


# --- lifetime


class CacheWatch:
    """Weak references to every tensor that a network left in the feature cache that it was given."""

    def __init__(self, network: torch.nn.Module, *, fail_at: int | None = None) -> None:
        self.references: list[weakref.ref[Tensor]] = []
        self.calls = 0
        self.fail_at = fail_at
        network.register_forward_pre_hook(self._count)
        network.register_forward_hook(self._watch, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: Any) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise MemoryError("the device is full")

    def _watch(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        self.references += [weakref.ref(entry) for entry in kwargs["feat_cache"] if isinstance(entry, Tensor)]

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


def failing(items: Iterator[Tensor], after: int) -> Iterator[Tensor]:
    for _ in range(after):
        yield next(items)
    raise ConnectionError("the source is gone")


@pytest.mark.parametrize("direction", ["encode", "decode"])
@pytest.mark.parametrize("ending", ["exhausted", "closed", "source fails", "network fails", "forgotten"])
def test_the_cache_is_dropped_however_the_stream_ends(
    tiny_vae22: AutoencoderKLWan, direction: str, ending: str
) -> None:
    codec = WanStreamingCodec(tiny_vae22)
    network = tiny_vae22.encoder if direction == "encode" else tiny_vae22.decoder
    watch = CacheWatch(network, fail_at=3 if ending == "network fails" else None)
    source = cut(clip_for(tiny_vae22)) if direction == "encode" else iter(latents_for(tiny_vae22).split(1, dim=2))
    if ending == "source fails":
        source = failing(source, after=2)
    stream = codec.encode_stream(source) if direction == "encode" else codec.decode_stream(source)
    next(stream)
    next(stream)
    assert watch.alive > 0
    if ending == "exhausted":
        assert len(list(stream)) == 1
    elif ending == "closed":
        stream.close()
    elif ending == "forgotten":
        del stream
    else:
        with pytest.raises((ConnectionError, MemoryError)) as caught:
            next(stream)
        assert caught.value.__traceback__ is not None  # the frames of the failure are still held here
    assert watch.alive == 0


def live_tensor_bytes() -> int:
    gc.collect()  # cycles that other tests left behind would vanish between two looks
    # Plain tensors: what torch.compile leaves behind in other tests has no memory of its own, nor a pointer to it.
    tensors = (item for item in gc.get_objects() if type(item) in {Tensor, torch.nn.Parameter})
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_memory_does_not_grow_with_the_length(tiny_vae22: AutoencoderKLWan, direction: str) -> None:
    codec = WanStreamingCodec(tiny_vae22, tiling=Tiling(Size(32, 32), 16))
    given: list[weakref.ref[Tensor]] = []
    alive_when_pulled = []

    def produce() -> Iterator[Tensor]:
        for index in range(8):
            alive_when_pulled.append(sum(reference() is not None for reference in given))
            shape = (1, 3, 4 if index else 1, 32, 48) if direction == "encode" else (1, 48, 1, 2, 3)
            item = torch.rand(shape)
            given.append(weakref.ref(item))
            yield item
            del item

    sizes = []
    results: list[weakref.ref[Tensor]] = []
    for index, result in enumerate(
        codec.encode_stream(produce()) if direction == "encode" else codec.decode_stream(produce())
    ):
        results.append(weakref.ref(result))
        assert sum(reference() is not None for reference in results) <= 2
        if index in (2, 7):
            sizes.append(live_tensor_bytes())
    assert alive_when_pulled == [0] * 8
    assert sizes[0] == sizes[1]


def test_streams_record_no_gradients_and_leave_the_mode_of_others_alone(tiny_vae21: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(tiny_vae21)
    modes = []

    def produce() -> Iterator[Tensor]:
        for latent in latents_for(tiny_vae21, 2).requires_grad_().split(1, dim=2):
            modes.append(torch.is_grad_enabled())
            yield latent

    for pixels in codec.decode_pixel_stream(produce()):
        modes.append(torch.is_grad_enabled())
        assert not pixels.requires_grad
        assert not pixels.is_inference()  # or nobody could train on it
    assert modes == [True] * 4
    with torch.no_grad():
        stream = codec.encode_stream(cut(clip_for(tiny_vae21)))
        next(stream)
    assert not next(stream).is_inference()
    assert torch.is_grad_enabled()


# --- the seam


def test_open_codec_wraps_a_wan_vae(vae: AutoencoderKLWan) -> None:
    factor = vae.config.scale_factor_spatial
    tiling = Tiling(Size(64, 64), 16)
    codec = open_codec(vae, tiling=tiling)
    assert isinstance(codec, WanStreamingCodec)
    assert isinstance(codec, StreamingCodec)
    assert codec.tiling is tiling
    assert (codec.num_channels, codec.spatial_factor, codec.temporal_factor) == (vae.config.z_dim, factor, 4)


def test_open_codec_returns_what_streams_by_itself(tiny_vae21: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(tiny_vae21)
    assert open_codec(codec) is codec
    with pytest.raises(InvalidInputError, match="takes no tiling"):
        open_codec(codec, tiling=Tiling(Size(64, 64), 16))


def test_open_codec_refuses_anything_else() -> None:
    with pytest.raises(CheckpointError, match="a Linear cannot encode or decode a stream"):
        open_codec(torch.nn.Linear(1, 1))
