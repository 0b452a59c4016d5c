"""The fitted block transform: an orthonormal map, causal, streaming, exact where nothing is left out."""

from __future__ import annotations

import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.mini.train_stage_two import fit_block_codec
from swifti2v.mini.transform_codec import BlockTransformCodec, from_bands, temporal_dct, to_bands
from swifti2v.wan.streaming import StreamingCodec, open_codec


def smooth_video(frames: int = 9, height: int = 32, width: int = 48, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, frames // 4), height // 8, width // 8, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(frames, height, width), mode="trilinear")


def chunks_of(video: torch.Tensor) -> list[torch.Tensor]:
    return [video[:, :, :1], *torch.split(video[:, :, 1:], 4, dim=2)]


@pytest.fixture(scope="module")
def complete_codec() -> BlockTransformCodec:
    """All 768 numbers of a block are kept."""
    codec = fit_block_codec(chunks_of(smooth_video()) * 2, num_channels=768)
    assert codec.transform.band_channels == (192, 192, 192, 192)
    return codec


def test_the_temporal_transform_is_orthonormal() -> None:
    matrix = temporal_dct()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frames", [1, 4])
def test_bands_are_inverted_and_keep_energy(frames: int) -> None:
    chunk = torch.randn(2, 3, frames, 16, 24)
    bands = to_bands(chunk)
    torch.testing.assert_close(from_bands(bands, frames), chunk)
    copies = 4 // frames  # a still stands for four equal frames
    torch.testing.assert_close(bands.square().sum(), copies * chunk.square().sum())


def test_a_still_fills_the_channels_that_four_equal_frames_fill(complete_codec: BlockTransformCodec) -> None:
    still = smooth_video(frames=2)[:, :, :1]
    repeated = complete_codec.encode_chunk(still.expand(-1, -1, 4, -1, -1))
    torch.testing.assert_close(complete_codec.encode_chunk(still), repeated, atol=1e-3, rtol=1e-3)


def test_nothing_is_lost_when_every_component_is_kept(complete_codec: BlockTransformCodec) -> None:
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latents = list(complete_codec.encode_stream(chunks_of(video)))
    decoded = torch.cat(list(complete_codec.decode_stream(latents)))
    expected = ((video[0] + 1) * 127.5).round().permute(1, 2, 3, 0)
    assert (decoded.float() - expected).abs().max() <= 1


def test_keeping_more_components_is_never_worse() -> None:
    train, test = smooth_video(frames=17, seed=1), smooth_video(seed=2) + 0.05 * torch.randn(1, 3, 9, 32, 48)
    errors = []
    for channels in (16, 64, 256):
        codec = fit_block_codec(chunks_of(train), num_channels=channels)
        latents = torch.cat(list(codec.encode_stream(chunks_of(test))), dim=2)
        parts = [codec.decode_frame(z, first=i == 0) for i, z in enumerate(torch.split(latents, 1, dim=2))]
        errors.append(float((torch.cat(parts, dim=2) - test).square().mean()))
    assert errors[0] > errors[1] > errors[2]


def test_it_is_a_streaming_codec_whatever_the_number_of_frames_per_item(complete_codec: BlockTransformCodec) -> None:
    assert isinstance(complete_codec, StreamingCodec)
    assert open_codec(complete_codec) is complete_codec
    latents = torch.cat(list(complete_codec.encode_stream(chunks_of(smooth_video()))), dim=2)
    one_by_one = torch.cat(list(complete_codec.decode_stream(torch.split(latents, 1, dim=2))))
    at_once = torch.cat(list(complete_codec.decode_stream([latents])))
    assert torch.equal(one_by_one, at_once)
    assert one_by_one.shape == (9, 32, 48, 3)


def test_save_and_load(complete_codec: BlockTransformCodec, tmp_path) -> None:
    complete_codec.save_pretrained(tmp_path)
    loaded = BlockTransformCodec.from_pretrained(tmp_path)
    chunk = smooth_video()[:, :, 1:5]
    assert torch.equal(loaded.encode_chunk(chunk), complete_codec.encode_chunk(chunk))


def test_chunks_that_do_not_fit_are_refused(complete_codec: BlockTransformCodec) -> None:
    with pytest.raises(InvalidInputError, match="must hold 1"):
        list(complete_codec.encode_stream([torch.zeros(1, 3, 4, 16, 16)]))
    with pytest.raises(InvalidInputError, match="multiples of 8"):
        to_bands(torch.zeros(1, 3, 4, 20, 16))
