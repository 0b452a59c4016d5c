"""Stage I's network in `mini`: Wan's transformer, told where each token stands, predicting the clean latents.

A narrow token cannot carry all the numbers of noise that a velocity contains (measured: `docs/log.md`), so the network
predicts x0 and the forward returns the velocity that Wan's pipeline expects, ``v = (x - x0) / sigma``. Wan's RoPE is
relative; a camera that zooms needs to know where the centre is, and a wave which phase it has at a place and a time: so
the position is given as more channels (x, y, time and Fourier features of each), and motion is read out as
``a + b x + c y``: a zoom or a rotation is then one answer for all places, as for a pan.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from swifti2v.mini.motion_codec import MOTION_CHANNELS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelMixin", "MotionTransformer"]  # diffusers looks ModelMixin up in the module that defines a component

MASK_CHANNELS = 4
TRAINED_LATENT_FRAMES = 21
SPACE_CYCLES = (0.5, 1.0, 2.0, 4.0)  # of the Fourier features, per half width
TIME_CYCLES = (1.0, 2.0, 4.0)  # and per trained length
POSITION_CHANNELS = 3 + 2 * (2 * len(SPACE_CYCLES) + len(TIME_CYCLES))
POSITION_GAIN = 4.0  # few channels of more than a hundred: at a gain of 1 they are learned last


class MotionTransformer(WanTransformer3DModel):
    """`WanTransformer3DModel` with Wan I2V's call, `in_channels` = 2z + 4 + 25 and `out_channels` = z + 16.

    Input [B, z + 4 + z, F, h, w]: noisy latents, mask and image latents as `WanImageToVideoPipeline` joins them. The
    image latent of frame 0 is shown to every frame. Output: velocity [B, z, F, h, w], float32.
    """

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,  # noqa: ARG002 - Wan's pipeline passes it; it is None in Wan2.2
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Return the velocity at `timestep` [B] in (0, 1000]; see the class for shapes."""
        num_channels = self.num_latent_channels
        noisy = hidden_states[:, :num_channels]
        image = hidden_states[:, num_channels + MASK_CHANNELS :, :1]
        clean = self.predict_clean(hidden_states, timestep, encoder_hidden_states, attention_kwargs)
        clean = torch.cat([image.to(clean), clean[:, :, 1:]], dim=2)
        sigma = (timestep / 1000).view(-1, 1, 1, 1, 1)
        velocity = (noisy.float() - clean.float()) / sigma
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def predict_clean(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return x0 [B,z,F,h,w]; what training supervises (latent frame 0 is given, and replaced in `forward`)."""
        num_channels = self.num_latent_channels
        frames = hidden_states.shape[2]
        # The noisy latents fade out with the noise, which the narrow tokens could only be hidden by.
        shown = hidden_states[:, :num_channels] * (1 - timestep / 1000).view(-1, 1, 1, 1, 1).to(hidden_states)
        mask = hidden_states[:, num_channels : num_channels + MASK_CHANNELS]
        image = hidden_states[:, num_channels + MASK_CHANNELS :, :1].expand(-1, -1, frames, -1, -1)
        positions = _positions(hidden_states)
        joined = torch.cat([shown, mask, image, POSITION_GAIN * positions], dim=1)
        output = super().forward(
            joined, timestep, encoder_hidden_states, return_dict=False, attention_kwargs=attention_kwargs
        )[0]
        clean, along_x, along_y = torch.split(output, [num_channels, MOTION_CHANNELS, MOTION_CHANNELS], dim=1)
        motion = clean[:, :MOTION_CHANNELS] + along_x * positions[:, :1] + along_y * positions[:, 1:2]
        return torch.cat([motion, clean[:, MOTION_CHANNELS:]], dim=1)

    @property
    def num_latent_channels(self) -> int:
        """Channels z of the codec's latents."""
        return int(self.config.out_channels) - 2 * MOTION_CHANNELS


def _positions(hidden_states: Tensor) -> Tensor:
    """Return x, y in half widths from the centre, time in trained lengths, then sines and cosines: [B,25,F,h,w]."""
    batch, _, frames, height, width = hidden_states.shape
    device = hidden_states.device
    columns = (torch.arange(width, device=device) + 0.5) * 2 / width - 1
    rows = ((torch.arange(height, device=device) + 0.5) * 2 / height - 1) * height / width
    times = torch.arange(frames, device=device) / (TRAINED_LATENT_FRAMES - 1)
    grid = torch.meshgrid(times, rows, columns, indexing="ij")
    waves = [
        function(2 * math.pi * cycles * axis)
        for axis, all_cycles in ((grid[2], SPACE_CYCLES), (grid[1], SPACE_CYCLES), (grid[0], TIME_CYCLES))
        for cycles in all_cycles
        for function in (torch.sin, torch.cos)
    ]
    positions = torch.stack([grid[2], grid[1], grid[0], *waves]).to(hidden_states.dtype)
    return positions.expand(batch, -1, -1, -1, -1)
