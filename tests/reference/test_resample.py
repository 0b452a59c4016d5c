from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from swifti2v.reference.resample import enlarge, reduce_frames, upsample, warp

CPU = torch.device("cpu")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_upsampling_on_the_cpu_equals_torchs_which_other_devices_use() -> None:
    frame = noise(24, 32, 3)
    ours = upsample(frame, 96, 128, device=CPU)
    tensor = torch.from_numpy(frame).permute(2, 0, 1)[None]
    expected = F.interpolate(tensor, size=(96, 128), mode="bicubic", align_corners=False)[0]
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_upsampling_and_warping_agree_between_devices() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    frame, flow = noise(24, 32, 3), torch.from_numpy(5 * noise(2, 96, 128))
    here, there = upsample(frame, 96, 128, device=CPU), upsample(frame, 96, 128, device=torch.device("cuda"))
    torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=0)
    torch.testing.assert_close(warp(there, flow.cuda()).cpu(), warp(here, flow), atol=1e-3, rtol=0)


def test_warp_agrees_with_opencv() -> None:
    image, flow = noise(40, 56, 3), 6 * noise(40, 56, 2)
    x = flow[..., 0] + np.arange(56, dtype=np.float32)
    y = flow[..., 1] + np.arange(40, dtype=np.float32)[:, None]
    expected = cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    ours = warp(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(flow).permute(2, 0, 1))
    np.testing.assert_allclose(ours.permute(1, 2, 0).numpy(), expected, atol=1e-2)
    assert np.abs(ours.permute(1, 2, 0).numpy() - expected).mean() < 1e-3


def test_warp_by_whole_pixels_is_a_shift_with_the_x_axis_first() -> None:
    image = torch.from_numpy(noise(3, 20, 24))
    flow = torch.zeros(2, 20, 24)
    flow[0], flow[1] = 3, -2
    warped = warp(image, flow)
    torch.testing.assert_close(warped[:, 2:, :-3], image[:, :-2, 3:], atol=1e-4, rtol=0)


def test_warp_keeps_more_detail_than_bilinear_sampling_at_half_pixels() -> None:
    image = torch.from_numpy(cv2.GaussianBlur(noise(64, 64), (0, 0), 1.0))[None]
    flow = torch.full((2, 64, 64), 0.5)
    columns = torch.arange(64, dtype=torch.float32)
    grid = torch.stack(torch.meshgrid(columns, columns, indexing="xy"), dim=-1) + 0.5
    bilinear = F.grid_sample(image[None], ((2 * grid + 1) / 64 - 1)[None], mode="bilinear", align_corners=False)[0]
    assert warp(image, flow).std() > 1.1 * bilinear.std()


def test_enlarging_keeps_constants_and_its_own_size() -> None:
    field = np.full((5, 7, 2), 0.25, dtype=np.float32)
    assert enlarge(field, 20, 28, device=CPU).eq(0.25).all()
    assert enlarge(field, 5, 7, device=CPU).shape == (2, 5, 7)
    assert enlarge(field[..., 0], 10, 14, device=CPU).shape == (1, 10, 14)


def test_reduced_frames_keep_the_mean_and_lose_what_is_finer() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((2, 32, 64, 3), 93, np.uint8)
    assert (reduce_frames(flat, 4) == 93).all()
    checkers = np.indices((32, 64)).sum(axis=0)[None, ..., None] % 2 * np.uint8(200) + np.zeros((1, 1, 1, 3), np.uint8)
    small = reduce_frames(checkers.astype(np.uint8), 4)
    assert small.shape == (1, 8, 16, 3)
    assert np.abs(small[:, 1:-1, 1:-1].astype(int) - 100).max() <= 1
    noise = rng.integers(0, 255, (1, 32, 64, 3), dtype=np.uint8)
    assert reduce_frames(noise, 4).std() < 0.5 * noise.std()
