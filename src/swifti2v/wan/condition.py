"""Assemble the network's input of one window, and read the targets from its output (paper, figure CSG).

Used alike by generation and by training, so that the network meets the same input in both.
Shape suffixes: B batch, C slot channels, W window frames, M target frames, h w latent height and width, T text tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.segments import PositionMode, Segment
    from swifti2v.wan.context_attention import KVCache

TIMESTEPS = 1000.0


class StageTwoNetwork(Protocol):
    """What a network must offer: `StageTwoTransformer` does."""

    @property
    def config(self) -> Any:
        """Its `in_channels` and `prediction_type`."""

    @property
    def dtype(self) -> torch.dtype:
        """What its input is cast to."""

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        frame_positions: Tensor,
        frame_kinds: Tensor,
        output_frames: slice,
        kv_cache: KVCache | None,
    ) -> Any:
        """Return an object whose `sample` is ``[B, C, M, h, w]``, the frames `output_frames` of the window."""


def predict_targets(  # noqa: PLR0913 - the segment, what it sees, and how
    transformer: StageTwoNetwork,
    *,
    segment: Segment,
    reference: Tensor,
    targets: Tensor,
    sigma: float | Tensor,
    prompt_embeds: Tensor,
    slots: Tensor | None = None,
    position_mode: PositionMode = "absolute",
    kv_cache: KVCache | None = None,
) -> Tensor:
    """Predict the clean targets of one segment.

    Args:
        transformer: the network. With ``in_channels == C`` it gets no reference channels (training-free mode).
        segment: which latent frames the W frames of the window are.
        reference: ``[B, C, W, h, w]``, `z_ref` of the window.
        targets: ``[B, C, M, h, w]``, the noisy targets ``x = (1 - sigma) * x0 + sigma * noise``.
        sigma: noise level in 0..1, one for all or ``[B]``.
        prompt_embeds: ``[B, T, text_dim]``.
        slots: ``[B, C, W, h, w]``; anchor and finished neighbors hold finished latents, unrefined neighbors reference
            latents; the places of the targets are ignored. None: `reference`, which holds the same at inference, as
            finished latents are written back into it.
        position_mode: RoPE positions in time, see `Segment.positions`.
        kv_cache: of this window and this prompt. The first call fills it; later ones ignore the context in `slots` and
            `reference`.

    Returns:
        x0 of the targets ``[B, C, M, h, w]``, float32: ``x - sigma * velocity`` or ``z_ref + residual``.

    Raises:
        InvalidInputError: a shape or `sigma` does not fit.
    """
    slots = reference if slots is None else slots
    _check_shapes(segment, slots, reference, targets, prompt_embeds)
    sigma_B = _sigma_per_sample(sigma, targets)
    places = segment.target_slice
    is_cached = kv_cache is not None and kv_cache.is_filled
    given = places if is_cached else slice(None)
    of_given = slice(0, targets.shape[2]) if is_cached else places

    shown = _shown(transformer, targets, sigma_B)
    output = transformer(
        _network_input(transformer, of_given, slots[:, :, given], reference[:, :, given], shown),
        _frame_timesteps(segment, sigma_B)[:, given],
        prompt_embeds.to(transformer.dtype),
        frame_positions=torch.tensor(segment.positions(position_mode)[given]),
        frame_kinds=torch.tensor(segment.kinds[given]),
        output_frames=of_given,
        kv_cache=kv_cache,
    )
    prediction = output.sample.float()
    if transformer.config.prediction_type == "residual":
        return reference[:, :, places].float() + prediction
    return targets.float() - sigma_B.view(-1, 1, 1, 1, 1) * prediction


def _shown(transformer: StageTwoNetwork, targets: Tensor, sigma_B: Tensor) -> Tensor:
    """Return the noisy targets as the network sees them.

    A network that predicts the residual to the reference is narrow: its tokens have no room for noise that they do not
    need, so the slot fades out and is empty at sigma 1 (measured: `docs/log.md`). To predict a velocity, the network
    needs all of the noise.
    """
    if transformer.config.prediction_type != "residual":
        return targets
    return targets * (1 - sigma_B.view(-1, 1, 1, 1, 1))


def _network_input(
    transformer: StageTwoNetwork, places: slice, slots: Tensor, reference: Tensor, targets: Tensor
) -> Tensor:
    """Slots with the noisy targets in their `places`, then the reference if the network has channels for it."""
    batch, channels, *shape = slots.shape
    expected = transformer.config.in_channels
    if expected not in {channels, 2 * channels}:
        msg = (
            f"the network takes {expected} channels, but latents of {channels} make {channels}, or {2 * channels} with "
            "their reference; use a network and a codec that belong together"
        )
        raise InvalidInputError(msg)
    # Filled in place: at 2560x1408 a latent frame of `mini` is 43 MB, and a window's worth of copies adds up.
    joined = torch.empty((batch, expected, *shape), dtype=transformer.dtype, device=slots.device)
    joined[:, :channels] = slots
    joined[:, :channels, places] = targets.to(joined)
    if expected > channels:
        joined[:, channels:] = reference
    return joined


def _frame_timesteps(segment: Segment, sigma_B: Tensor) -> Tensor:
    """Timesteps ``[B, W]``: 1000 sigma on the targets, 0 on the context, which carries no noise."""
    timestep_BW = sigma_B.new_zeros(len(sigma_B), len(segment.window))
    timestep_BW[:, segment.target_slice] = TIMESTEPS * sigma_B.unsqueeze(1)
    return timestep_BW


def _sigma_per_sample(sigma: float | Tensor, targets: Tensor) -> Tensor:
    batch = targets.shape[0]
    # Levels stay float32 whatever the network's dtype: bfloat16 would turn 0.9375 * 1000 into 936.
    if isinstance(sigma, torch.Tensor):
        sigma_B = sigma.to(targets.device, torch.float32)
    else:
        # Written there: to copy a number to a GPU is to wait for all that it has still to do.
        sigma_B = torch.full((), sigma, dtype=torch.float32, device=targets.device)
    if sigma_B.ndim > 1 or sigma_B.numel() not in {1, batch}:
        msg = f"sigma is {tuple(sigma_B.shape)}; give one number, or one a sample, [{batch}]"
        raise InvalidInputError(msg)
    # A tensor comes from a training loop, where looking at its values would wait for the GPU.
    if isinstance(sigma, float | int) and not 0 <= sigma <= 1:
        msg = f"sigma is {sigma}; it must be within 0..1"
        raise InvalidInputError(msg)
    return sigma_B.expand(batch)


def _check_shapes(segment: Segment, slots: Tensor, reference: Tensor, targets: Tensor, prompt_embeds: Tensor) -> None:
    if targets.ndim != 5:
        msg = f"targets is {tuple(targets.shape)}; give [B, C, M, h, w]"
        raise InvalidInputError(msg)
    batch, channels, _, height, width = targets.shape
    window, num_targets = len(segment.window), len(segment.targets)
    for name, tensor, frames in (
        ("targets", targets, num_targets),
        ("slots", slots, window),
        ("reference", reference, window),
    ):
        expected = (batch, channels, frames, height, width)
        if tuple(tensor.shape) != expected:
            msg = (
                f"{name} is {tuple(tensor.shape)}, but segment {segment.index} with {num_targets} targets in a window "
                f"of {window} latent frames needs {expected}; cut it to the segment"
            )
            raise InvalidInputError(msg)
    if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != batch:
        msg = f"prompt_embeds is {tuple(prompt_embeds.shape)}; give [{batch}, T, text_dim], one a sample"
        raise InvalidInputError(msg)
