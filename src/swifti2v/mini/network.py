"""Stage I's network in `mini`: from a picture and a prompt to the motion of the whole clip.

The latents are what `MotionPath` is made of: a few numbers for the camera and for the frequencies of the waves (one
token), and maps on the grid of 8-pixel cells (a token for 2x2 of them). The network predicts them clean from noisy ones
(flow matching in x0 form), all tokens and those of the prompt attending to each other. A map is a gate of the whole
clip times what each place says: a pan then has no scene motion at all, rather than a little everywhere.

Shape suffixes: B batch, N tokens of places, L of text, C channels.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from swifti2v.mini.path import CAMERA_RATES, MAP_CHANNELS, WAVES, MotionPath, cell_centers

if TYPE_CHECKING:
    from numpy.typing import NDArray

GLOBALS = len(CAMERA_RATES) + len(WAVES)
PATCH = 2
TOKEN_CHANNELS = PATCH * PATCH * MAP_CHANNELS
GRID_CELLS = 880
"""Cells of the grid, about: 40x22 of a picture of 320x176."""
WAVE_VECTORS = ((3, 0), (8, 0), (16, 0), (0, 3), (0, 8), (0, 16), (0, 28), (9, 5), (8, 28), (8, -28), (9, -5))
"""Of the Fourier features of a place, in radians per width."""
FEATURES = PATCH * PATCH * 7 + 5 + 2 * len(WAVE_VECTORS) + 14

# One size of a latent is about 1 for a motion at its usual speed.
CAMERA_SCALES = (0.20, 0.14, 0.30, 0.1745)
MAP_SCALES = (0.10, 0.10, *(0.007,) * 4, *(0.004,) * 4)
LEAST_RATE = 0.15
"""Camera rates below this are nothing, from twice this on they count in full."""
CYCLES_CENTER, CYCLES_SCALE = math.log(2.7), 0.6
_GATES = (0, 0, 1, 1, 1, 1, 2, 2, 2, 2)


class MotionLatents(NamedTuple):
    """What the network predicts: `rates` [B,6] and `places` [B,N,40]."""

    rates: Tensor
    places: Tensor


def grid_of(width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of the grid of cells of a picture, even numbers."""
    columns = 2 * max(2, round(math.sqrt(GRID_CELLS * width / height) / 2))
    rows = 2 * max(2, round(math.sqrt(GRID_CELLS * height / width) / 2))
    return rows, columns


def picture_features(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Describe a picture uint8 [H,W,3] for the network: [N,69] float32, tokens in rows.

    Of every cell mean and deviation of the colors and the change of mean color between the rows above and below it;
    of every token its place, and how far its cells lie below the row of the greatest change, where ground or water
    begins: the only cue of depth.
    """
    height, width = picture.shape[:2]
    rows, columns = grid_of(width, height)
    unit = cv2.resize(picture, (columns * 4, rows * 4), interpolation=cv2.INTER_AREA).astype(np.float32) / 127.5 - 1
    blocks = unit.reshape(rows, 4, columns, 4, 3)
    mean, deviation = blocks.mean(axis=(1, 3)), blocks.std(axis=(1, 3))
    changes = row_change(unit.mean(axis=1))
    horizon = (float(changes.argmax()) / len(changes) - 0.5) * height / width
    change = np.repeat(changes.reshape(rows, 4).max(axis=1)[:, None], columns, axis=1)
    cells = np.concatenate([mean, 2 * deviation, change[..., None]], axis=-1)
    tokens = cells.reshape(rows // 2, 2, columns // 2, 2, -1).transpose(0, 2, 1, 3, 4)
    tokens = tokens.reshape(rows // 2 * (columns // 2), -1)
    x, y = (axis.ravel() for axis in cell_centers(rows // 2, columns // 2, height / width))
    waves = [function(along * x + down * y) for along, down in WAVE_VECTORS for function in (np.sin, np.cos)]
    whole = np.full_like(x, height / width)
    places = np.stack([2 * x, 4 * y, whole, 4 * (y - whole / 2), 4 * (y + whole / 2), *waves], axis=-1)
    return np.concatenate([tokens, places, _below(rows, columns, height / width, horizon)], axis=-1).astype(np.float32)


def _below(rows: int, columns: int, aspect: float, horizon: float) -> NDArray[np.float32]:
    """Return of the cells of each token how far they lie below the horizon, sharply and softly, and waves there."""
    x, y = cell_centers(rows, columns, aspect)
    sharp, soft = (1 / (1 + np.exp(-(y - horizon) / width)) for width in (0.03, 0.12))
    phase, slow = 28 * y + 8 * x, 9 * x + 5 * y
    cells = np.stack(
        [sharp, soft, sharp * np.sin(phase), sharp * np.cos(phase), y * np.sin(slow), y * np.cos(slow)], axis=-1
    )
    tokens = cells.reshape(rows // 2, 2, columns // 2, 2, -1).transpose(0, 2, 1, 3, 4).reshape(-1, 4, cells.shape[-1])
    upper_and_lower = tokens[:, ::2, :2].reshape(len(tokens), -1)
    of_token = 4 * tokens[:, :, 4:].mean(axis=1)
    return np.concatenate([upper_and_lower, tokens[:, :, 2:4].reshape(len(tokens), -1), of_token], axis=-1)


def row_change(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Change of mean color between the sixth of the picture above and below each row [h,3], over its largest: [h]."""
    count = len(rows)
    span = max(2, count // 6)
    sums = np.concatenate([np.zeros((1, 3)), np.cumsum(rows, axis=0)])
    change = np.zeros(count)
    for row in range(count):
        high, low = max(0, row - span), min(count, row + span)
        if row - high >= 2 and low - row >= 2:
            above, below = (sums[row] - sums[high]) / (row - high), (sums[low] - sums[row]) / (low - row)
            change[row] = np.abs(above - below).sum()
    outside = (np.arange(count) < count / 4) | (np.arange(count) > 3 * count / 4)
    change[outside] = 0
    return (change / max(change.max(), 1e-6)).astype(np.float32)


class MotionNetwork(ModelMixin, ConfigMixin):
    """Transformer over the token of rates and those of places, modulated by the prompt and the level of noise.

    Args:
        width: of the tokens.
        num_layers, num_heads: of the transformer.
        text_width: of the prompt's embeddings.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 160, num_layers: int = 4, num_heads: int = 5, text_width: int = 96) -> None:
        super().__init__()
        self.from_places = nn.Linear(FEATURES + TOKEN_CHANNELS, width)
        self.from_rates = nn.Linear(GLOBALS, width)
        self.from_noise = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.kinds = nn.Parameter(0.02 * torch.randn(2, width))
        self.to_whole = nn.Sequential(nn.Linear(text_width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.to_rates = nn.Linear(width, GLOBALS + 3)
        self.to_places = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, TOKEN_CHANNELS))
        # A wave is one and the same combination of the Fourier features everywhere.
        self.to_places_directly = nn.Linear(FEATURES, TOKEN_CHANNELS)
        nn.init.zeros_(self.to_places_directly.weight)
        nn.init.zeros_(self.to_rates.weight)
        # Gates begin open: one that closes before its maps are learned gets no gradient any more.
        nn.init.constant_(self.to_rates.bias[GLOBALS:], 0.5)

    def forward(self, noisy: MotionLatents, sigma: Tensor, features_BNC: Tensor, text_BLC: Tensor) -> MotionLatents:
        """Return the clean latents.

        Args:
            noisy: ``(1 - sigma) * clean + sigma * noise``.
            sigma: [B] in (0, 1].
            features_BNC: of `picture_features`; any part of the tokens will do.
            text_BLC: of the text encoder, zero beyond the prompt.
        """
        shown = (1 - sigma)[:, None, None]  # noise can only hide the rest; it fades out where it is all there is
        read = text_BLC.abs().amax(dim=-1) > 0
        # The prompt speaks as a whole: with its tokens in the attention words were learned several times as slowly.
        words = self.to_whole(text_BLC) * read[..., None]
        condition = self.from_noise(_waves(sigma)) + words.sum(dim=1) / read.sum(dim=1, keepdim=True).clamp(min=1)
        rates = self.from_rates(noisy.rates[:, None] * shown) + self.kinds[0]
        places = self.from_places(torch.cat([features_BNC, noisy.places * shown], dim=-1)) + self.kinds[1]
        tokens = torch.cat([rates, places], dim=1)
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens = self.norm(tokens)
        rates, gates = self.to_rates(tokens[:, 0]).split([GLOBALS, 3], dim=-1)
        gate = torch.sigmoid(4 * gates)[:, None, list(_GATES) * PATCH**2]
        return MotionLatents(rates, (self.to_places(tokens[:, 1:]) + self.to_places_directly(features_BNC)) * gate)


class _Block(nn.Module):
    """Attention and a feed-forward part, each after a norm that the prompt and the noise level modulate."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_feed = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(width, 4 * width)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, tokens: Tensor, condition_BC: Tensor) -> Tensor:
        """Return tokens [B,N,C] after the block."""
        scale_read, shift_read, scale_feed, shift_feed = self.modulation(condition_BC)[:, None].chunk(4, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.to_qkv(self.norm_attention(tokens) * (1 + scale_read) + shift_read).chunk(3, dim=-1)
        )
        read = F.scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.to_out(read.transpose(1, 2).flatten(2))
        return tokens + self.feed(self.norm_feed(tokens) * (1 + scale_feed) + shift_feed)


def _waves(sigma: Tensor) -> Tensor:
    angles = sigma[:, None] * math.pi * torch.arange(1, 17, device=sigma.device, dtype=sigma.dtype)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def to_latents(path: MotionPath) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a path as `rates` [6] and `places` [N,40] of `MotionLatents`; cycles of 0 stand for none."""
    rows, columns = path.maps.shape[1:]
    scaled = path.maps / np.array(MAP_SCALES, np.float32)[:, None, None]
    places = scaled.reshape(-1, rows // 2, 2, columns // 2, 2).transpose(1, 3, 2, 4, 0).reshape(-1, TOKEN_CHANNELS)
    cycles = [(math.log(value) - CYCLES_CENTER) / CYCLES_SCALE if value > 0 else 0.0 for value in path.cycles]
    rates = np.concatenate([path.camera / np.array(CAMERA_SCALES, np.float32), cycles])
    return rates.astype(np.float32), places.astype(np.float32)


def to_path(latents: MotionLatents, rows: int, columns: int) -> MotionPath:
    """Return the path of the first of a batch of latents, on a grid of cells [rows, columns]."""
    rates = latents.rates[0].float().cpu().numpy()
    maps = latents.places[0].float().cpu().numpy().reshape(rows // 2, columns // 2, 2, 2, MAP_CHANNELS)
    maps = maps.transpose(4, 0, 2, 1, 3).reshape(MAP_CHANNELS, rows, columns)
    # No prompt asks for less than 0.4 (`UNASKED_SPEED`); what is smaller is the network's doubt, and would be a drift.
    settled = rates[:4] * np.clip(np.abs(rates[:4]) / LEAST_RATE - 1, 0, 1)
    return MotionPath(
        camera=(settled * np.array(CAMERA_SCALES, np.float32)).astype(np.float32),
        cycles=np.exp(rates[4:] * CYCLES_SCALE + CYCLES_CENTER).astype(np.float32),
        maps=np.ascontiguousarray(maps * np.array(MAP_SCALES, np.float32)[:, None, None]),
    )


@torch.no_grad()
def sample(
    network: MotionNetwork, features_NC: Tensor, text_BLC: Tensor, *, num_steps: int, generator: torch.Generator
) -> MotionLatents:
    """Draw motion for a picture and a prompt in Euler steps of flow matching, sigmas as in training."""
    sigmas = shifted(torch.linspace(1, 0, num_steps + 1))
    num_places = len(features_NC)
    drawn = MotionLatents(
        torch.randn(1, GLOBALS, generator=generator), torch.randn(1, num_places, TOKEN_CHANNELS, generator=generator)
    )
    for sigma, after in pairwise(sigmas):
        clean = network(drawn, sigma[None], features_NC[None], text_BLC)
        share = after / sigma
        drawn = MotionLatents(*(share * old + (1 - share) * new for old, new in zip(drawn, clean, strict=True)))
    return drawn


def shifted(sigma: Tensor, shift: float = 3.0) -> Tensor:
    """More steps where noise is strong."""
    return shift * sigma / (1 + (shift - 1) * sigma)
