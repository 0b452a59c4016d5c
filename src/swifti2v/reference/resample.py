"""Bicubic resampling of single frames: to another size, and along a flow. One kernel (a = -0.75) on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor


def upsample(frame: np.ndarray[Any, Any], height: int, width: int, *, device: torch.device) -> Tensor:
    """Return `frame` at another size, by bicubic interpolation without antialiasing.

    On the CPU OpenCV does it (ten times faster than torch there); elsewhere torch. Both agree within 1e-5.

    Args:
        frame: [h, w, C] float32, any range (C may be 2 for a flow); values may overshoot their range at edges.
        height: of the result, in pixels.
        width: of the result, in pixels.
        device: where the result is wanted.

    Returns:
        [C, height, width] float32 on `device`.
    """
    if device.type == "cpu":
        resized = cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC)
        return torch.from_numpy(resized).reshape(height, width, -1).permute(2, 0, 1)
    tensor = torch.from_numpy(frame).to(device).reshape(*frame.shape[:2], -1).permute(2, 0, 1)[None]
    return F.interpolate(tensor, size=(height, width), mode="bicubic", align_corners=False)[0]


def reduce_frame(frame: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Reduce a frame uint8 [H, W, 3] to [height, width, 3] by antialiased bicubic interpolation."""
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False)
    return np.asarray(resized[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def reduce_frames(frames: np.ndarray[Any, Any], factor: int) -> np.ndarray[Any, Any]:
    """Reduce frames by antialiased bicubic interpolation: the motion reference that a perfect Stage I would make.

    Args:
        frames: [F, H, W, 3] uint8.
        factor: whole number that both sides are divided by (rounded down).

    Returns:
        [F, H // factor, W // factor, 3] uint8.
    """
    return np.stack([reduce_frame(frame, frames.shape[1] // factor, frames.shape[2] // factor) for frame in frames])


def enlarge(field: np.ndarray[Any, Any], height: int, width: int, *, device: torch.device) -> Tensor:
    """Return a smooth field (flow, confidence) [h, w, C] at another size by bilinear interpolation, [C, height, width].

    Values are kept as they are: a flow must be in units that do not depend on the size, or be scaled by the caller.
    """
    tensor = torch.from_numpy(field).to(device).reshape(*field.shape[:2], -1).permute(2, 0, 1)[None]
    if tensor.shape[-2:] == (height, width):
        return tensor[0]
    return F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[0]


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Return ``image`` sampled at ``(x + flow_x, y + flow_y)``, by bicubic interpolation; outside it is mirrored.

    Bicubic, not bilinear: bilinear sampling would blur the very detail that is carried.

    Args:
        image: [C, H, W] float.
        flow: [2, H, W] float32 in pixels, x first, on the same device.

    Returns:
        [C, H, W], of `image`'s type.
    """
    height, width = image.shape[-2:]
    columns = torch.arange(width, device=image.device, dtype=torch.float32)
    rows = torch.arange(height, device=image.device, dtype=torch.float32)[:, None]
    grid = torch.stack((columns + flow[0], rows + flow[1]), dim=-1)
    grid.mul_(2).add_(1).div_(grid.new_tensor((width, height))).sub_(1)
    return F.grid_sample(image[None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=False)[0]
