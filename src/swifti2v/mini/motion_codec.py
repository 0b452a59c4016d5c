"""The codec of Stage I in `mini`: motion to frame 0 and what motion cannot explain, as video codecs do it.

A small network cannot repaint every block in its new place, but motion is smooth and learnable in minutes (measured:
`docs/log.md`). Latent frame 0 is the image in the basis of `BlockTransform`; latent frame j >= 1 holds, for each of its
four pixel frames, the mean displacement of every 8x8 block to frame 0 (in widths), and the transformed residual left
after warping frame 0 by it. To diffusers' `WanImageToVideoPipeline` it looks like a Wan VAE.

Shape suffixes: B batch, C channels, F pixel frames, H W pixels, h w blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.mini.transform_codec import BLOCK, TEMPORAL, BlockTransform

if TYPE_CHECKING:
    from collections.abc import Sequence

MOTION_CHANNELS = 2 * TEMPORAL


def warp(frame_BCHW: Tensor, motion_B2HW: Tensor) -> Tensor:
    """Sample `frame` at every pixel plus `motion` (in widths of the frame, x then y); reflect at the borders."""
    batch, _, height, width = frame_BCHW.shape
    rows = (torch.arange(height, device=frame_BCHW.device) + 0.5) * 2 / height - 1
    columns = (torch.arange(width, device=frame_BCHW.device) + 0.5) * 2 / width - 1
    grid = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).to(frame_BCHW)
    # grid_sample counts in half sides: one width is 2 along x and 2 * width / height along y.
    scale = motion_B2HW.new_tensor([2.0, 2.0 * width / height])
    grid = grid + motion_B2HW.permute(0, 2, 3, 1) * scale
    return F.grid_sample(
        frame_BCHW, grid.expand(batch, -1, -1, -1), mode="bicubic", padding_mode="reflection", align_corners=False
    )


def dense_motion(frame_3HW: Tensor, target_3HW: Tensor) -> Tensor:
    """Optical flow (OpenCV DIS) that carries `target` onto `frame`: [2,H,W] in widths; zero for a constant picture."""
    if frame_3HW.amin() == frame_3HW.amax():
        return torch.zeros(2, *frame_3HW.shape[1:])
    greys = [
        ((picture.mean(dim=0).clamp(-1, 1) + 1) * 127.5).to(torch.uint8).cpu().numpy()
        for picture in (frame_3HW, target_3HW)
    ]
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    initial = np.zeros((*greys[0].shape, 2), dtype=np.float32)
    flow = search.calc(greys[0], greys[1], initial)
    return torch.from_numpy(flow).permute(2, 0, 1) / frame_3HW.shape[2]


class MotionCodec(ModelMixin, ConfigMixin):
    """Motion-compensated codec with the face of `AutoencoderKLWan`: `encode`, `decode`, `config.z_dim`, ...

    Channels of a latent: 8 of motion (x, y of frames 1..4 of the latent frame; zero in latent frame 0), then the
    transform's. Made by `mini/fitting.py`.

    Args:
        image_channels: components kept of the blocks of frame 0.
        residual_band_channels: components kept of the residual, by temporal band; they sum to `image_channels`.
        latents_mean, latents_std: of each channel; diffusers' pipeline normalises by them.
        z_dim, scale_factor_spatial, scale_factor_temporal: derived; in the configuration because diffusers' pipeline
            reads them there.
    """

    config_name = "config.json"
    spatial_compression_ratio = BLOCK
    temporal_compression_ratio = TEMPORAL

    @register_to_config
    def __init__(
        self,
        image_channels: int = 56,
        residual_band_channels: tuple[int, int, int, int] = (32, 8, 8, 8),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        z_dim: int | None = None,
        scale_factor_spatial: int = BLOCK,
        scale_factor_temporal: int = TEMPORAL,
    ) -> None:
        super().__init__()
        channels = MOTION_CHANNELS + image_channels
        if (z_dim or channels, scale_factor_spatial, scale_factor_temporal) != (channels, BLOCK, TEMPORAL):
            msg = f"z_dim and scale factors must be {channels}, {BLOCK}, {TEMPORAL}; leave them out"
            raise ConfigurationError(msg)
        if sum(residual_band_channels) != image_channels:
            msg = f"residual_band_channels {residual_band_channels} must sum to image_channels = {image_channels}"
            raise ConfigurationError(msg)
        self.image_transform = BlockTransform((image_channels, 0, 0, 0))
        self.residual_transform = BlockTransform(residual_band_channels)
        self.register_to_config(
            z_dim=channels,
            latents_mean=list(latents_mean or [0.0] * channels),
            latents_std=list(latents_std or [1.0] * channels),
        )

    def encode(self, frames_BCFHW: Tensor, return_dict: bool = True) -> Any:
        """[B,3,F,H,W] in [-1,1], F = 4k+1 -> `.latents` [B,z,1+k,h,w]; motion is found by optical flow."""
        anchors = self.decoded_image(self.image_transform.analyse(frames_BCFHW[:, :, :1]))
        pairs = zip(frames_BCFHW, anchors, strict=True)
        motion = [
            torch.stack([dense_motion(frame, anchor) for frame in clip.transpose(0, 1)[1:]], dim=1)
            if clip.shape[1] > 1
            else frames_BCFHW.new_zeros(2, 0, *clip.shape[2:])
            for clip, anchor in pairs
        ]
        latents = self.encode_with_motion(frames_BCFHW, torch.stack(motion).to(frames_BCFHW))
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @torch.no_grad()
    def encode_with_motion(self, frames_BCFHW: Tensor, motion_B2FHW: Tensor) -> Tensor:
        """Encode with known motion of frames 1.. to frame 0, [B,2,F-1,H,W] in widths -> [B,z,1+k,h,w]."""
        num_frames = frames_BCFHW.shape[2]
        if (num_frames - 1) % TEMPORAL or motion_B2FHW.shape[2] != num_frames - 1:
            msg = (
                f"{num_frames} frames with {motion_B2FHW.shape[2]} motions cannot be encoded; "
                "pass 4k+1 frames and a motion for each but the first"
            )
            raise InvalidInputError(msg)
        image = self.image_transform.analyse(frames_BCFHW[:, :, :1])
        anchor = self.decoded_image(image)
        still = image.new_zeros(image.shape[0], MOTION_CHANNELS, 1, *image.shape[3:])
        latents = [torch.cat([still, image], dim=1)]
        if num_frames > 1:
            blocks_B2Fhw = F.avg_pool3d(motion_B2FHW, (1, BLOCK, BLOCK))
            residual = frames_BCFHW[:, :, 1:] - self.warped(anchor, blocks_B2Fhw)
            chunks = torch.split(residual, TEMPORAL, dim=2)
            coefficients = torch.cat([self.residual_transform.analyse(chunk) for chunk in chunks], dim=2)
            motion = torch.unflatten(blocks_B2Fhw, 2, (-1, TEMPORAL)).permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
            latents.append(torch.cat([motion, coefficients], dim=1))
        return torch.cat(latents, dim=2)

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor, return_dict: bool = True) -> Any:
        """[B,z,1+k,h,w] -> `.sample` [B,3,4k+1,H,W] in [-1,1]: frame 0 warped by the motion, plus the residual."""
        latents = latents_BCFhw.to(self.image_transform.basis)
        anchor = self.decoded_image(latents[:, MOTION_CHANNELS:, :1])
        frames = [anchor.unsqueeze(2)]
        for latent in torch.split(latents, 1, dim=2)[1:]:  # of no frames, a split gives one piece all the same
            blocks = torch.unflatten(latent[:, :MOTION_CHANNELS, 0], 1, (TEMPORAL, 2)).transpose(1, 2)
            residual = self.residual_transform.synthesise(latent[:, MOTION_CHANNELS:], TEMPORAL)
            frames.append(self.warped(anchor, blocks) + residual)
        sample = torch.cat(frames, dim=2).clamp(-1, 1)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def decoded_image(self, image_BC1hw: Tensor) -> Tensor:
        """Return frame 0 ``[B,3,H,W]``, to which all motion leads, of its latents without the channels of motion."""
        return self.image_transform.synthesise(image_BC1hw, 1).squeeze(2)

    @staticmethod
    def warped(anchor_BCHW: Tensor, blocks_B2Fhw: Tensor) -> Tensor:
        """Warp the anchor by the block motion of each frame: [B,2,f,h,w] -> [B,3,f,H,W]."""
        num_frames = blocks_B2Fhw.shape[2]
        anchors = anchor_BCHW.repeat_interleave(num_frames, dim=0)
        blocks = blocks_B2Fhw.transpose(1, 2).flatten(0, 1)
        motion = F.interpolate(blocks, size=anchor_BCHW.shape[2:], mode="bicubic", align_corners=False)
        return torch.unflatten(warp(anchors, motion), 0, (-1, num_frames)).transpose(1, 2)
