"""The network of `light`: a small convolutional U with memory that turns an aligned window into a finished frame.

It works on the work grid, a quarter of the output each way, and on half of that. Pictures of output size enter
space-to-depth (48 channels for 3), so nothing is lost on the way in. It predicts, per frame,

    frame = (1 - own) * (base + gate * detail) + own * previous + residual,

where `gate` starts at transport's confidence and `own` near 0: untrained it is the transported reference. `previous` is
its own last finished frame, aligned; a hidden state on the work grid, aligned too, remembers what no frame shows.

Shapes: B batch; H, W output; h, w = H / 4, W / 4 the work grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from swifti2v.light.inputs import EVIDENCE_CHANNELS, GRID

if TYPE_CHECKING:
    from torch import Tensor

PICTURE_CHANNELS = 3 * GRID * GRID
GATES_PER_SIDE = 2
# Scales that bring the inputs to about unit size.
DETAIL_SCALE, EVIDENCE_SCALE = 6.0, 6.0
LEAK = 0.2
"""Share of the transported frame in what the network is given as its last frame. Without it a still, noisy scene ran
away: 4 to 9 dB below transport by frame 48 of a clip that training had shown for 16 frames; with 0.25 it stays 0.6 dB
above, with 0.1 it ends 0.7 dB below (measured without training it in)."""


@dataclass(frozen=True)
class LightConfig:
    """Sizes of the network; saved with the weights.

    Args:
        width: channels on the work grid.
        deep_width: channels on half of it.
        deep_blocks: residual blocks there.
        hidden: channels of the hidden state.
        join_width: channels that the inputs are joined to, place by place.
    """

    width: int = 48
    deep_width: int = 96
    deep_blocks: int = 3
    hidden: int = 16
    join_width: int = 64


class LightState(NamedTuple):
    """What a frame leaves to the next: itself, [B, 3, H, W] in [-1, 1], and the hidden state [B, hidden, h, w]."""

    frame: Tensor
    hidden: Tensor


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = values + self.second(F.relu(self.first(values)))
        return result


class LightNetwork(nn.Module):
    """See the module. `forward` makes a frame from tensors that are aligned already; `step` aligns the state first."""

    def __init__(self, config: LightConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or LightConfig()
        width, deep = config.width, config.deep_width
        self.join = nn.Conv2d(3 * PICTURE_CHANNELS + EVIDENCE_CHANNELS + config.hidden, config.join_width, 1)
        self.enter = nn.Conv2d(config.join_width, width, 3, padding=1)
        self.encode = _Block(width)
        self.down = nn.Conv2d(width, deep, 2, stride=2)
        self.deep = nn.Sequential(*(_Block(deep) for _ in range(config.deep_blocks)))
        self.up = nn.Conv2d(deep, width * 4, 1)
        self.decode = _Block(width)
        gates = 2 * GATES_PER_SIDE**2
        self.leave = nn.Conv2d(width, PICTURE_CHANNELS + gates + config.hidden, 3, padding=1)
        for parameter in self.leave.parameters():
            nn.init.zeros_(parameter)

    def initial_state(self, image: Tensor) -> LightState:
        """Return the state after frame 0, which is the image [B, 3, H, W] itself."""
        batch, _, height, width = image.shape
        return LightState(image, image.new_zeros(batch, self.config.hidden, height // GRID, width // GRID))

    def step(self, base: Tensor, detail: Tensor, evidence: Tensor, flow: Tensor, state: LightState) -> LightState:
        """Make a frame and return it as the new state; the arguments are a batch of `inputs.Prepared`."""
        frame_flow = F.interpolate(flow, scale_factor=float(GRID), mode="bilinear", align_corners=False) * GRID
        previous = aligned(state.frame, frame_flow, mode="bicubic")
        made: LightState = self(base, detail, evidence, previous, aligned(state.hidden, flow, mode="bilinear"))
        return made

    def forward(self, base: Tensor, detail: Tensor, evidence: Tensor, previous: Tensor, hidden: Tensor) -> LightState:
        """Make a frame.

        Args:
            base: [B, 3, H, W], the enlarged motion frame, in [-1, 1]; h and w are even.
            detail: [B, 3, H, W], what transport adds at full confidence.
            evidence: [B, EVIDENCE_CHANNELS, h, w].
            previous: [B, 3, H, W], the last finished frame, aligned.
            hidden: [B, hidden, h, w], the hidden state, aligned.
        """
        trusted = F.interpolate(evidence[:, :1] * 2, scale_factor=float(GRID), mode="bilinear", align_corners=False)
        previous = torch.lerp(previous, base + trusted * detail, LEAK)
        joined = _joined(base, detail, previous, evidence, hidden)
        shallow = self.encode(F.relu(self.enter(F.relu(self.join(joined)))))
        deep = self.deep(self.down(shallow))
        values = self.decode(shallow + F.pixel_shuffle(self.up(deep), 2))
        made = self.leave(F.relu(values)).float()
        residual, gates, remembered = made.split((PICTURE_CHANNELS, 2 * GATES_PER_SIDE**2, self.config.hidden), dim=1)
        gates = F.pixel_shuffle(gates, GATES_PER_SIDE)
        confidence = (evidence[:, :1] * 2).clamp(0.02, 0.98)
        start = F.interpolate(torch.logit(confidence), size=gates.shape[-2:], mode="bilinear", align_corners=False)
        gates = torch.sigmoid(torch.cat((gates[:, :1] + start, gates[:, 1:] - 3), dim=1))
        gates = F.interpolate(gates, size=base.shape[-2:], mode="bilinear", align_corners=False)
        frame = base + gates[:, :1] * detail
        frame = frame + gates[:, 1:] * (previous - frame) + F.pixel_shuffle(residual, GRID) * 0.5
        return LightState(frame, torch.tanh(remembered))


def channels_last(network: LightNetwork) -> LightNetwork:
    """Return the network itself, its weights in the order in which CPUs convolve fastest."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # missing in torch's stubs
    return network


def aligned(picture: Tensor, flow: Tensor, *, mode: str) -> Tensor:
    """Return ``picture(x + flow(x))``, [B, C, H, W], of a flow [B, 2, H, W] in pixels; beyond the borders mirrored."""
    height, width = picture.shape[-2:]
    columns = torch.arange(width, device=picture.device, dtype=torch.float32)
    rows = torch.arange(height, device=picture.device, dtype=torch.float32)[:, None]
    grid = torch.stack((columns + flow[:, 0], rows + flow[:, 1]), dim=-1)
    grid = (grid * 2 + 1) / grid.new_tensor((width, height)) - 1
    return F.grid_sample(picture, grid, mode=mode, padding_mode="reflection", align_corners=False)


def _joined(base: Tensor, detail: Tensor, previous: Tensor, evidence: Tensor, hidden: Tensor) -> Tensor:
    """Return the inputs joined on the work grid, [B, C, h, w], pictures space-to-depth.

    Without gradients they are written once, in the type and order of the convolutions: half the time of the network at
    2560x1408 went into copies.
    """
    if torch.is_grad_enabled():
        pictures = (base, detail * DETAIL_SCALE, (previous - base) * DETAIL_SCALE)
        parts = [F.pixel_unshuffle(picture, GRID) for picture in pictures]
        return torch.cat((*parts, evidence * EVIDENCE_SCALE, hidden), dim=1)
    batch, _, height, width = evidence.shape
    autocast = torch.is_autocast_enabled(base.device.type)
    kind = torch.get_autocast_dtype(base.device.type) if autocast else base.dtype
    count = 3 * PICTURE_CHANNELS + EVIDENCE_CHANNELS + hidden.shape[1]
    joined = torch.empty((batch, height, width, count), dtype=kind, device=base.device)
    first = 0
    for picture, scale in ((base, 1.0), (detail, DETAIL_SCALE), (previous - base, DETAIL_SCALE)):
        scaled = picture if scale == 1 else picture * scale
        cells = scaled.to(kind).reshape(batch, 3, height, GRID, width, GRID).permute(0, 2, 4, 1, 3, 5)
        joined[..., first : first + PICTURE_CHANNELS].view(batch, height, width, 3, GRID, GRID).copy_(cells)
        first += PICTURE_CHANNELS
    joined[..., first : first + EVIDENCE_CHANNELS] = (evidence * EVIDENCE_SCALE).permute(0, 2, 3, 1)
    joined[..., first + EVIDENCE_CHANNELS :] = hidden.permute(0, 2, 3, 1)
    return joined.permute(0, 3, 1, 2)


def multiply_adds(config: LightConfig) -> int:
    """Return the multiply-adds of a frame per pixel of the work grid."""
    network, total = LightNetwork(config), 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            shrink = 4 if name.startswith(("deep", "down", "up")) else 1
            total += module.weight.numel() // shrink
    return total
