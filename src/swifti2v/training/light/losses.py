"""The loss of `light` over a sequence of its own frames, in decibels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from swifti2v.light.inputs import GRID
from swifti2v.light.network import LightState, aligned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from swifti2v.light.network import LightNetwork


class SequenceLoss(NamedTuple):
    """Of a sequence.

    Args:
        loss: scalar.
        given: mean decibels of the error of the transported frames.
        made: the same of the network's frames.
        state: that the sequence left.
    """

    loss: Tensor
    given: float
    made: float
    state: LightState


def sequence_loss(
    network: LightNetwork,
    batch: Mapping[str, Tensor],
    *,
    temporal: float,
    spectral: float,
    autocast: bool,
    detached: bool = False,
) -> SequenceLoss:
    """Run a sequence and judge each frame.

    ``10 log10(mean squared error)`` per frame and sample, plus `temporal` times the same of the change of the error
    along the motion (which is what flickers), plus `spectral` times the mean absolute logarithm of the local
    high-frequency energy over the truth's, in decibels.

    Args:
        network: in training.
        batch: see `sequences.read`, with a batch dimension in front; ``hidden`` where the stream goes on.
        temporal: weight of the second term; 0: without it.
        spectral: weight of the third.
        autocast: convolve in bfloat16.
        detached: no gradient from a frame to the one before it, but through the hidden state.
    """
    length = batch["flow"].shape[1]
    first = batch["first"][:, 0]
    state = LightState(first, batch["hidden"] if "hidden" in batch else network.initial_state(first).hidden)
    earlier_error: Tensor | None = None
    total, made, given = first.new_zeros(()), 0.0, 0.0
    for index in range(length):
        base, detail, evidence, flow = (batch[name][:, index] for name in ("base", "detail", "evidence", "flow"))
        with torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
            if detached:
                state = LightState(state.frame.detach(), state.hidden)
            state = network.step(base, detail, evidence, flow, state)
        truth = batch["truth"][:, index + 1]
        error = state.frame - truth
        loss = decibels(_squared(error)).mean()
        made += float(loss.detach())
        with torch.no_grad():
            confidence = F.interpolate(
                evidence[:, :1] * 2, scale_factor=float(GRID), mode="bilinear", align_corners=False
            )
            given += float(decibels(_squared(base + confidence * detail - truth)).mean())
        if temporal > 0:
            if earlier_error is not None:
                loss = loss + temporal * _flicker(error, earlier_error, evidence, flow)
            earlier_error = error
        if spectral > 0:
            loss = loss + spectral * 10 / math.log(10) * _energy_error(state.frame, truth)
        total = total + loss
    return SequenceLoss(total / length, given / length, made / length, state)


def decibels(error: Tensor) -> Tensor:
    """Return squared errors in decibels, bounded below at that of about half a level of eight bits."""
    return 10 * torch.log10(error + 2e-5)


def psnr_of(mean_decibels: float) -> float:
    """Return the PSNR that goes with an error in decibels of pictures in [-1, 1]."""
    return 20 * math.log10(2) - mean_decibels


def high_pass(picture: Tensor) -> Tensor:
    """Return luma less its Gaussian blur of 2 pixels: [B, 1, H, W] of [B, 3, H, W]."""
    luma = (picture * picture.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True)
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float32, device=picture.device) / 2) ** 2)
    taps = taps / taps.sum()
    blurred = F.conv2d(F.pad(luma, (5, 5, 5, 5), mode="reflect"), taps.view(1, 1, 1, -1))
    return luma - F.conv2d(blurred, taps.view(1, 1, -1, 1))


def _squared(error: Tensor) -> Tensor:
    return error.square().mean(dim=(1, 2, 3))


def _flicker(error: Tensor, earlier_error: Tensor, evidence: Tensor, flow: Tensor) -> Tensor:
    """Return the decibels of the change of the error along the motion, where the flow to the last frame is believed."""
    seen = (evidence[:, 1:2] < 0.25).float()
    long_flow = F.interpolate(flow, scale_factor=float(GRID), mode="nearest") * GRID
    moved = aligned(earlier_error, long_flow, mode="bilinear")
    weight = F.interpolate(seen, scale_factor=float(GRID), mode="nearest")
    return decibels(((error - moved).square() * weight).mean(dim=(1, 2, 3))).mean()


def _energy_error(frame: Tensor, truth: Tensor) -> Tensor:
    """Return the mean absolute logarithm of the high-frequency energy over the truth's, in windows of 32 pixels."""
    mine, true = (F.avg_pool2d(high_pass(each).square(), 32, 16) + 4e-5 for each in (frame, truth))
    return (mine / true).log().abs().mean()
