"""Stage I's codec in mini: known motion in, the same motion and picture out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swifti2v.data.procedural import Motion, displacement, render
from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.mini.motion_codec import MOTION_CHANNELS, MotionCodec, warp
from swifti2v.mini.train_stage_one import fit_motion_codec

SIZE = Size(96, 64)


def textured(height: int = 240, width: int = 320) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.random((height // 10, width // 10, 3)).astype(np.float32)
    import cv2

    return (cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1) * 255).astype(np.uint8)


def moving(name: str = "pan right", num_frames: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [1,3,F,H,W] and motion [1,2,F-1,H,W] of a procedural clip, three times as fast as usual."""
    field = displacement([Motion(name, 3.0)], size=SIZE, num_frames=num_frames)
    frames = render(textured(), field, centre=(160, 120), crop_width=120)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return pixels, torch.from_numpy(field).permute(3, 0, 1, 2)[None, :, 1:]


@pytest.fixture(scope="module")
def codec() -> MotionCodec:
    return fit_motion_codec([textured()], size=SIZE)


def decibels(made: torch.Tensor, truth: torch.Tensor) -> float:
    return float(-10 * torch.log10((made - truth).square().mean() / 4))


def test_warping_by_a_whole_number_of_pixels_shifts_the_picture() -> None:
    frame = torch.rand(1, 3, 16, 24)
    motion = torch.zeros(1, 2, 16, 24)
    motion[:, 0] = 3 / 24
    torch.testing.assert_close(warp(frame, motion)[..., :20], frame[..., 3:23], atol=1e-4, rtol=0)


def test_motion_is_measured_in_widths_along_both_sides() -> None:
    frame = torch.rand(1, 3, 16, 24)
    motion = torch.zeros(1, 2, 16, 24)
    motion[:, 1] = 2 / 24
    torch.testing.assert_close(warp(frame, motion)[:, :, :12], frame[:, :, 2:14], atol=1e-4, rtol=0)


def test_a_clip_of_one_frame_is_its_image(codec: MotionCodec) -> None:
    frames, motion = moving(num_frames=5)
    one = codec.decode(codec.encode(frames[:, :, :1]).latents).sample
    assert one.shape == frames[:, :, :1].shape
    longer = codec.decode(codec.encode_with_motion(frames, motion)).sample
    assert torch.equal(one, longer[:, :, :1])


@pytest.mark.parametrize("name", ["pan right", "tilt up", "zoom in", "rotate clockwise"])
def test_known_motion_comes_back(codec: MotionCodec, name: str) -> None:
    frames, motion = moving(name)
    latents = codec.encode_with_motion(frames, motion)
    assert latents.shape == (1, codec.config.z_dim, 3, SIZE.height // 8, SIZE.width // 8)
    assert latents[:, :MOTION_CHANNELS, 0].abs().max() == 0
    decoded = codec.decode(latents).sample
    still = decoded[:, :, :1].expand_as(frames)
    assert decibels(decoded[:, :, 1:], frames[:, :, 1:]) > decibels(still[:, :, 1:], frames[:, :, 1:]) + 6


def test_found_motion_is_nearly_as_good_as_known_motion(codec: MotionCodec) -> None:
    frames, motion = moving()
    known = codec.decode(codec.encode_with_motion(frames, motion)).sample
    found = codec.decode(codec.encode(frames).latents).sample
    assert decibels(found, frames) > decibels(known, frames) - 3


def test_a_prefix_decodes_to_a_prefix(codec: MotionCodec) -> None:
    frames, motion = moving()
    latents = codec.encode_with_motion(frames, motion)
    assert torch.equal(codec.decode(latents[:, :, :2]).sample, codec.decode(latents).sample[:, :, :5])


def test_grey_padding_of_wans_pipeline_has_no_motion(codec: MotionCodec) -> None:
    frames, _ = moving(num_frames=5)
    frames[:, :, 1:] = 0
    assert codec.encode(frames).latents[:, :MOTION_CHANNELS].abs().max() == 0


def test_save_and_load_keeps_what_wans_pipeline_reads(codec: MotionCodec, tmp_path) -> None:
    codec.save_pretrained(tmp_path)
    loaded = MotionCodec.from_pretrained(tmp_path)
    assert loaded.config.z_dim == codec.config.z_dim == 64
    assert list(loaded.config.latents_std) == list(codec.config.latents_std)
    assert (loaded.config.scale_factor_spatial, loaded.config.scale_factor_temporal) == (8, 4)


def test_shapes_that_do_not_fit_are_refused(codec: MotionCodec) -> None:
    frames, motion = moving()
    with pytest.raises(InvalidInputError, match="4k\\+1"):
        codec.encode_with_motion(frames[:, :, :8], motion[:, :, :7])
    with pytest.raises(ConfigurationError, match="must sum"):
        MotionCodec(8, (1, 1, 1, 1))
