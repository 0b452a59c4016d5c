"""Both hybrid references on a textured plane that moves by known amounts."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.reference.flow import CorrespondenceEstimator, dense_flow
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.transport import transport_with_confidence

if TYPE_CHECKING:
    from collections.abc import Iterator

HEIGHT, WIDTH = 128, 192


def texture(height: int, width: int) -> np.ndarray:
    """Blobs that survive the reduction, for the flow to hold on to, and fine grain that does not."""
    generator = np.random.default_rng(1)
    coarse = cv2.GaussianBlur(generator.standard_normal((height, width, 3)).astype(np.float32), (0, 0), 8)
    fine = cv2.GaussianBlur(generator.standard_normal((height, width, 3)).astype(np.float32), (0, 0), 0.8)
    return (0.5 + 0.12 * coarse / coarse.std() + 0.05 * fine / fine.std()).clip(0, 1)


def moving_plane(num_frames: int, step: tuple[int, int] = (3, 2)) -> torch.Tensor:
    """Truth, float [F, 3, H, W] in [-1, 1]: a window that moves over a plane by `step` pixels a frame."""
    plane = texture(HEIGHT + 2 * num_frames * 2, WIDTH + 2 * num_frames * 3)
    windows = [plane[step[1] * t :, step[0] * t :][:HEIGHT, :WIDTH] for t in range(num_frames)]
    return torch.from_numpy(np.stack(windows)).permute(0, 3, 1, 2) * 2 - 1


def reduced(truth: torch.Tensor) -> torch.Tensor:
    small = F.interpolate(truth, size=(HEIGHT // 4, WIDTH // 4), mode="bicubic", antialias=True)
    return ((small + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def decibels(frames: torch.Tensor, truth: torch.Tensor) -> float:
    return float(-10 * torch.log10(((frames - truth) ** 2).mean() / 4))


def frames_of(chunks: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(chunks), dim=2)[0].permute(1, 0, 2, 3)


def bicubic(motion: torch.Tensor) -> torch.Tensor:
    frames = motion.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(frames, size=(HEIGHT, WIDTH), mode="bicubic", align_corners=False).clamp(-1, 1)


@pytest.mark.parametrize("mode", ["replace", "transport"])
def test_frame_zero_is_the_image_exactly_and_chunks_are_those_of_the_latent_frames(mode: str) -> None:
    truth = moving_plane(9)
    chunks = list(hybrid_reference(reduced(truth).split(2), truth[0], options=ReferenceOptions(mode=mode)))
    assert [tuple(chunk.shape) for chunk in chunks] == [(1, 3, f, HEIGHT, WIDTH) for f in (1, 4, 4)]
    assert torch.equal(chunks[0][0, :, 0], truth[0])
    assert all(chunk.dtype == torch.float32 and chunk.abs().max() <= 1 for chunk in chunks)


def test_replace_is_the_bicubic_reference_after_frame_zero() -> None:
    truth = moving_plane(5)
    motion = reduced(truth)
    frames = frames_of(hybrid_reference([motion], truth[0], options=ReferenceOptions(mode="replace")))
    torch.testing.assert_close(frames[1:], bicubic(motion)[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("flow_scale", [0.25, 0.5, 1.0])
def test_transport_brings_back_detail_that_the_motion_reference_cannot_hold(flow_scale: float) -> None:
    truth = moving_plane(5)
    motion = reduced(truth)
    frames = frames_of(hybrid_reference([motion], truth[0], options=ReferenceOptions(flow_scale=flow_scale)))
    inner = np.s_[1:, :, 16:-16, 16:-16]
    gain = decibels(frames[inner], truth[inner]) - decibels(bicubic(motion)[inner], truth[inner])
    assert gain > 3


def test_a_still_reference_gives_the_image_in_every_frame() -> None:
    image = moving_plane(1)[0]
    motion = reduced(image[None]).repeat(5, 1, 1, 1)
    frames = frames_of(hybrid_reference([motion], image))
    assert decibels(frames, image.expand_as(frames)) > 60


def test_softness_common_to_all_frames_is_undone() -> None:
    image = moving_plane(1)[0]
    soft = cv2.GaussianBlur(reduced(image[None])[0].numpy(), (0, 0), 1.5)
    frames = frames_of(hybrid_reference([torch.from_numpy(soft).expand(5, -1, -1, -1)], image))
    assert decibels(frames, image.expand_as(frames)) > 60


def test_a_band_from_the_image_removes_noise_of_the_motion_reference() -> None:
    image = moving_plane(1)[0]
    clean = reduced(image[None]).float().repeat(5, 1, 1, 1)
    noisy = (clean + 8 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))).round().clamp(0, 255)
    score = {
        band: decibels(
            frames_of(hybrid_reference([noisy.byte()], image, options=ReferenceOptions(band_sigma=band))), image
        )
        for band in (0.0, 1.0)
    }
    assert score[1.0] > score[0.0] + 1


def test_confidence_is_high_where_frame_zero_explains_and_zero_where_it_shows_nothing_of_it() -> None:
    truth = moving_plane(5)
    motion = reduced(truth)
    chunks = list(transport_with_confidence([motion], truth[0]))
    assert chunks[0].confidence.eq(1).all()
    confidence = chunks[1].confidence
    assert confidence.shape == (1, 1, 4, HEIGHT, WIDTH)
    assert float(confidence[..., 16:-16, 16:-16].mean()) > 0.8
    # After four frames the window has moved by 12 and 8 pixels: what is at its right and lower edges is new.
    assert float(confidence[0, 0, -1, :, -5:].mean()) < 0.1
    assert float(confidence[0, 0, -1, -3:, :].mean()) < 0.1


def test_what_is_uncovered_is_sharp_where_the_motion_reference_mirrors_the_image() -> None:
    image = moving_plane(1)[0].permute(1, 2, 0).numpy()
    wide = cv2.copyMakeBorder(image, 0, 0, 0, 12, cv2.BORDER_REFLECT)
    truth = torch.from_numpy(np.stack([wide[:, 3 * t :][:, :WIDTH] for t in range(5)])).permute(0, 3, 1, 2)
    motion = reduced(truth)
    frames = frames_of(hybrid_reference([motion], truth[0]))
    uncovered = np.s_[4, :, :, -10:]
    assert decibels(frames[uncovered], truth[uncovered]) > decibels(bicubic(motion)[uncovered], truth[uncovered]) + 2


def test_unrelated_content_gets_no_confidence_and_is_left_as_it_is() -> None:
    image = moving_plane(1)[0]
    other = reduced(-image.flip(-1)[None])
    motion = torch.cat((reduced(image[None]), other.repeat(4, 1, 1, 1)))
    chunk = list(transport_with_confidence([motion], image))[1]
    assert float(chunk.confidence.mean()) < 0.35
    assert float((chunk.frames[0].permute(1, 0, 2, 3) - bicubic(motion)[1:]).abs().mean()) < 0.03


def test_flow_points_to_where_the_content_was() -> None:
    truth = moving_plane(3)
    gray = [(((frame + 1) / 2).mean(dim=0) * 255).byte().numpy() for frame in truth]
    flow = dense_flow(gray[2], gray[0])[24:-24, 24:-24]
    assert np.median(flow[..., 0]) == pytest.approx(6, abs=0.1)
    assert np.median(flow[..., 1]) == pytest.approx(4, abs=0.1)


def test_pictures_smaller_than_a_flow_patch_work() -> None:
    estimate = CorrespondenceEstimator(np.zeros((4, 4, 3), np.uint8), 16, 16, options=ReferenceOptions(flow_scale=0.25))
    assert estimate(np.zeros((4, 4, 3), np.uint8)).confidence.shape == (16, 16)


def test_threads_and_piece_lengths_do_not_change_the_result() -> None:
    truth = moving_plane(9)
    motion = reduced(truth)
    alone = frames_of(hybrid_reference([motion], truth[0], options=ReferenceOptions(num_workers=1)))
    many = frames_of(hybrid_reference(motion.split(1), truth[0], options=ReferenceOptions(num_workers=4)))
    assert torch.equal(alone, many)


def test_reads_only_a_bounded_look_ahead_and_ends_its_threads() -> None:
    frame = reduced(moving_plane(1))
    taken = []

    def motion() -> Iterator[torch.Tensor]:
        for index in range(10_001):
            taken.append(index)
            yield frame

    chunks = hybrid_reference(motion(), moving_plane(1)[0], options=ReferenceOptions(num_workers=2))
    next(chunks)
    next(chunks)
    assert len(taken) <= 1 + 4 + 3
    del chunks
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("transport")]


def test_memory_does_not_grow_with_length() -> None:
    image = moving_plane(1)[0]
    frame = reduced(image[None])

    def peak(num_frames: int) -> tuple[int, int]:
        alive: list[weakref.ref[torch.Tensor]] = []
        most = 0
        tracemalloc.start()
        for chunk in hybrid_reference((frame for _ in range(num_frames)), image):
            alive.append(weakref.ref(chunk))
            most = max(most, sum(reference() is not None for reference in alive))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most, size

    peak(5)
    (short_alive, short_bytes), (long_alive, long_bytes) = peak(9), peak(41)
    assert long_alive == short_alive <= 2
    # numpy's buffers are traced, 300 kB a frame: how far the workers run ahead varies by a frame or two, not by 32.
    assert long_bytes < short_bytes + 4 * 300_000


@pytest.mark.parametrize("mode", ["replace", "transport"])
def test_bad_motion_and_bad_images_are_errors(mode: str) -> None:
    truth = moving_plane(5)
    options = ReferenceOptions(mode=mode)
    with pytest.raises(VideoInputError, match="no frames"):
        list(hybrid_reference([], truth[0], options=options))
    with pytest.raises(VideoInputError, match=r"4k\+1"):
        list(hybrid_reference([reduced(truth)[:4]], truth[0], options=options))
    with pytest.raises(InvalidInputError, match="image"):
        list(hybrid_reference([reduced(truth)], truth, options=options))


def test_an_error_of_the_motion_source_reaches_the_caller() -> None:
    truth = moving_plane(5)

    def motion() -> Iterator[torch.Tensor]:
        yield reduced(truth)[:3]
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        list(hybrid_reference(motion(), truth[0]))
