"""A stream equals the whole clip bit for bit, forgets everything when it ends, and refuses what it cannot code."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.models.tiling import TileGrid, Tiling
from swifti2v.models.vae import CodecSettings, StreamingCodec, WanStreamingCodec, open_codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from diffusers import AutoencoderKLWan


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Convolutions of three channels are ten times slower when two threads wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["tiny_vae21", "tiny_vae22"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """Both generations of the codec; the second with statistics that are not those of a standard normal."""
    model = request.getfixturevalue(request.param)
    if request.param == "tiny_vae22":
        model.register_to_config(
            latents_mean=torch.linspace(-0.5, 0.5, 48).tolist(), latents_std=torch.linspace(0.5, 2.0, 48).tolist()
        )
    return model


def smooth_clip(num_frames: int, height: int, width: int) -> Tensor:
    """Slow waves, ``[1, 3, F, H, W]`` in [-0.9, 0.9]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    waves = [
        torch.stack([torch.sin(3 * x + 2 * y + t), torch.cos(2 * y - x + t), torch.sin(2 * x * y - t)])
        for t in torch.arange(num_frames) / 10
    ]
    return torch.stack(waves, 1)[None] * 0.9


def clip_for(vae: AutoencoderKLWan, num_frames: int = 9, rows: int = 2, columns: int = 3) -> Tensor:
    factor = vae.config.scale_factor_spatial
    return smooth_clip(num_frames, rows * factor, columns * factor)


def cut(clip: Tensor) -> Iterator[Tensor]:
    """Chunks of 1, 4, 4, ... frames."""
    geometry = CodecGeometry()
    for index in range(geometry.latent_frames(clip.shape[2])):
        frames = geometry.frames_of(index)
        yield clip[:, :, frames.start : frames.stop].clone()


def latents_for(vae: AutoencoderKLWan, num_latent_frames: int = 3, rows: int = 2, columns: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, vae.config.z_dim, num_latent_frames, rows, columns, generator=generator)


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1, 1)
    return torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)


@contextmanager
def convolved_by_frame(vae: AutoencoderKLWan) -> Iterator[None]:
    """Let the 1x1x1 convolutions of a whole clip work a frame at a time, as in a stream.

    They are all that diffusers runs over the whole clip at once, and on some CPUs (seen: AVX2) the rounding of a
    convolution depends on the length of its input.
    """

    def by_frame(convolve: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat([convolve(frame) for frame in x.split(1, dim=2)], dim=2)

    convolutions = (vae.quant_conv, vae.post_quant_conv)
    for convolution in convolutions:
        convolution.forward = by_frame(convolution.forward)
    yield
    for convolution in convolutions:
        del convolution.forward


@torch.no_grad()
def whole_encode(vae: AutoencoderKLWan, clip: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return (vae.encode(clip.to(vae.dtype)).latent_dist.mode().float() - mean) / std


@torch.no_grad()
def whole_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    mean, std = statistics(vae)
    return vae.decode((latents * std + mean).to(vae.dtype)).sample.float()


def encode(codec: StreamingCodec, clip: Tensor) -> Tensor:
    return torch.cat(list(codec.encode_stream(cut(clip))), dim=2)


def decode(codec: WanStreamingCodec, latents: Tensor) -> Tensor:
    return torch.cat(list(codec.decode_pixel_stream(latents.split(1, dim=2))), dim=2)


def psnr(actual: Tensor, expected: Tensor) -> float:
    """Decibels below the range that `expected` spans."""
    peak = expected.max() - expected.min()
    return float(10 * torch.log10(peak**2 / (actual - expected).square().mean()))


# --- a stream equals the whole clip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streams_equal_whole_encode_and_decode_bit_for_bit(vae: AutoencoderKLWan, dtype: torch.dtype) -> None:
    vae.to(dtype)
    codec = WanStreamingCodec(vae, settings=CodecSettings(lean=False))
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


# --- offloading


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
    plain = WanStreamingCodec(tiny_vae22, settings=CodecSettings(lean=False))
    codec = WanStreamingCodec(tiny_vae22)
    latents, clip = latents_for(tiny_vae22), clip_for(tiny_vae22)
    expected = decode(plain, latents), encode(plain, clip)
    offload(tiny_vae22)
    assert torch.equal(decode(codec, latents), expected[0])
    assert torch.equal(encode(codec, clip), expected[1])


# --- tiling


def test_one_tile_over_the_frame_equals_no_tiling(vae: AutoencoderKLWan) -> None:
    factor = vae.config.scale_factor_spatial
    tiling = Tiling(Size(3 * factor, 2 * factor), factor)
    codec = WanStreamingCodec(vae, settings=CodecSettings(tiling, lean=False))
    clip, latents = clip_for(vae), latents_for(vae)
    with convolved_by_frame(vae):
        assert torch.equal(encode(codec, clip), whole_encode(vae, clip))
        assert torch.equal(decode(codec, latents), whole_decode(vae, latents))


def test_tiled_streams_equal_whole_clips_per_tile_blended(vae: AutoencoderKLWan) -> None:
    factor = vae.config.scale_factor_spatial
    tiling = Tiling(Size(4 * factor, 3 * factor), factor)
    codec = WanStreamingCodec(vae, tiling=tiling)
    grid = TileGrid.plan(3, 7, tiling=tiling, spatial_factor=factor)
    assert len(grid) == 2
    latents, clip = latents_for(vae, 2, 3, 7), clip_for(vae, 5, 3, 7)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.5)
    # Two columns of four cells that share one: the fade is written out here, not taken from the code under test.
    left, right = whole_decode(vae, latents[..., :4]), whole_decode(vae, latents[..., 3:])
    assert max(left.abs().max(), right.abs().max()) < 1  # tiles are blended before they are clamped
    rise = (torch.arange(factor) + 0.5) / factor
    middle = left[..., -factor:] * (1 - rise) + right[..., :factor] * rise
    expected = torch.cat([left[..., :-factor], middle, right[..., factor:]], dim=-1)
    torch.testing.assert_close(decode(codec, latents), expected, atol=1e-6, rtol=0)
    left, right = whole_encode(vae, clip[..., : 4 * factor]), whole_encode(vae, clip[..., 3 * factor :])
    expected = torch.cat([left[..., :-1], (left[..., -1:] + right[..., :1]) / 2, right[..., 1:]], dim=-1)
    torch.testing.assert_close(encode(codec, clip), expected, atol=1e-5, rtol=1e-5)


def test_tiled_streams_are_causal_too(tiny_vae22: AutoencoderKLWan) -> None:
    codec = WanStreamingCodec(tiny_vae22, tiling=Tiling(Size(32, 32), 16))
    latents = latents_for(tiny_vae22, 3, 3, 4)
    assert torch.equal(decode(codec, latents[:, :, :2]), decode(codec, latents)[:, :, :5])
    clip = clip_for(tiny_vae22, 5, 3, 4)
    assert torch.equal(encode(codec, clip)[:, :, :1], encode(codec, clip[:, :, :1]))


def tiling_error(vae: AutoencoderKLWan, overlap_cells: int) -> tuple[float, float]:
    """Decibels of tiled against untiled encode and decode: four tiles over 8x12 cells of slow waves."""
    factor = vae.config.scale_factor_spatial
    clip = clip_for(vae, 5, 8, 12)
    codec = WanStreamingCodec(vae)
    tiled = WanStreamingCodec(vae, tiling=Tiling(Size(8 * factor, 6 * factor), overlap_cells * factor))
    latents = encode(codec, clip)
    return psnr(encode(tiled, clip), latents), psnr(decode(tiled, latents), decode(codec, latents))


def test_tiles_come_near_the_untiled_result_and_nearer_with_more_overlap(vae: AutoencoderKLWan) -> None:
    hard_seams = tiling_error(vae, 0)
    blended = tiling_error(vae, 4)
    # Measured at these random weights: encode 49.7 (2.1) and 37.1 dB (2.2), decode 40.9 and 38.6 dB; with hard seams
    # 39.6 and 27.6, 27.5 and 27.5 dB. The bounds leave two decibels to other kernels.
    assert blended[0] > (47.5 if vae.config.z_dim == 16 else 35.0)
    assert blended[1] > (38.5 if vae.config.z_dim == 16 else 36.5)
    assert blended[0] - hard_seams[0] > 7
    assert blended[1] - hard_seams[1] > 9


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
