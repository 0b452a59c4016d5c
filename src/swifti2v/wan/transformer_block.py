"""The parts of Stage II's network that differ from diffusers' own: its block, and rotary positions in time.

Shape suffixes as in `transformer.py`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from swifti2v.wan.context_attention import WindowAttention
    from swifti2v.wan.text_attention import TextKeysValues

PART_TOKENS = 4096
"""Tokens that all layers but attention take at once: enough for a GPU's matmuls, a frame at 2560x1408."""
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_SLOPE


def gelu_tanh(gate: Tensor) -> Tensor:
    """Return the tanh form of GELU; on a CPU, in float32 and without gradients, through the logistic function.

    ``(1 + tanh(u)) / 2 = sigmoid(2 u)``, so the results differ by rounding; PyTorch's tanh takes twice as long there.
    """
    if gate.device.type != "cpu" or gate.dtype != torch.float32 or torch.is_grad_enabled():
        return F.gelu(gate, approximate="tanh")
    slope = torch.full((), _GELU_SLOPE, dtype=gate.dtype)
    return torch.addcmul(slope, gate, gate, value=_GELU_CUBIC).mul_(gate).sigmoid_().mul_(gate)


def modulate(
    tokens_BLD: Tensor,
    scale_BMD: Tensor,
    shift_BMD: Tensor,
    token_frames_L: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``tokens * (1 + scale) + shift``, each token with the row of its frame; written to `out`, if given."""
    if token_frames_L is not None:
        scale_BMD, shift_BMD = scale_BMD[:, token_frames_L], shift_BMD[:, token_frames_L]
    by_frame = _by_rows(tokens_BLD, scale_BMD)
    into = None if out is None else _by_rows(out, scale_BMD)
    made = torch.addcmul(shift_BMD.unsqueeze(2), by_frame, 1 + scale_BMD.unsqueeze(2), out=into)
    return made.flatten(1, 2) if out is None else out


def _add_gated(
    tokens_BLD: Tensor,
    update_BLD: Tensor,
    gate_BMD: Tensor,
    token_frames_L: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``tokens + update * gate``, summed in the gate's float32, in the dtype of `tokens`; in `out`, if given."""
    if token_frames_L is not None:
        gate_BMD = gate_BMD[:, token_frames_L]
    tokens, update = _by_rows(tokens_BLD, gate_BMD), _by_rows(update_BLD, gate_BMD)
    into = None if out is None else _by_rows(out, gate_BMD)
    total = torch.addcmul(tokens, update, gate_BMD.unsqueeze(2), out=into)
    return total.flatten(1, 2).type_as(tokens_BLD) if out is None else out


def _by_rows(tokens_BLD: Tensor, rows_BMD: Tensor) -> Tensor:
    """View ``[B, L, D]`` as ``[B, M, L/M, D]``, the tokens of each row of modulation together."""
    return torch.unflatten(tokens_BLD, 1, (rows_BMD.shape[1], -1))


def _tokens_of(wanted: slice | None, tokens_BLD: Tensor) -> Tensor:
    return tokens_BLD if wanted is None else tokens_BLD[:, wanted]


def _rows_of(wanted: slice | None, num_tokens: int, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return of each ``[B, M, D]`` the rows of the tokens `wanted`, which are whole frames."""
    num_rows = rows[0].shape[1]
    if wanted is None or num_rows == 1:
        return rows
    per_row = num_tokens // num_rows
    return tuple(each[:, wanted.start // per_row : wanted.stop // per_row] for each in rows)


def _is_run_in_parts(tokens_BLD: Tensor) -> bool:
    """Not where one part is enough, nor while compiling: fused kernels keep no intermediate tensors anyway."""
    return tokens_BLD.shape[1] > PART_TOKENS and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _token_parts(num_tokens: int, num_rows: int) -> list[tuple[slice, slice]]:
    """Cut the tokens into parts of about `PART_TOKENS`, whole frames each, with the rows of modulation of each part."""
    if num_rows == 1:
        starts = range(0, num_tokens, PART_TOKENS)
        return [(slice(start, start + PART_TOKENS), slice(0, 1)) for start in starts]
    per_row = num_tokens // num_rows
    rows = max(1, PART_TOKENS // per_row)
    return [
        (slice(first * per_row, (first + rows) * per_row), slice(first, first + rows))
        for first in range(0, num_rows, rows)
    ]


class FramePositionRope(WanRotaryPosEmbed):
    """Wan's rotary tables, looked up at the positions in time that the caller names."""

    def forward(self, hidden_states: Tensor, frame_positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return cosines and sines ``[1, L, 1, head]`` and the frame of each token ``[1, L]``.

        The third one lies beside the tables so that context parallelism splits it along with them.
        """
        _, patch_height, patch_width = self.patch_size
        _, _, frames, height, width = hidden_states.shape
        grid = (frames, height // patch_height, width // patch_width)
        device = self.freqs_cos.device
        frames_L, rows_L, columns_L = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).unbind(1)
        # Without waiting for the device: the copy is queued behind its work.
        times_L = frames_L if frame_positions is None else frame_positions.to(device, non_blocking=True)[frames_L]

        def look_up(table: Tensor) -> Tensor:
            time, row, column = table.split_with_sizes((self.t_dim, self.h_dim, self.w_dim), dim=1)
            return torch.cat([time[times_L], row[rows_L], column[columns_L]], dim=1)[None, :, None]

        return look_up(self.freqs_cos), look_up(self.freqs_sin), frames_L.unsqueeze(0)


class StageTwoBlock(WanTransformerBlock):
    """Wan's block with modulation per latent frame; parameters and numbers are the parent's.

    The parent's ``[B, L, 6, D]`` in float32 takes 1.6 GB in every block at 21,000 tokens of TI2V-5B. The tokens of a
    frame share its timestep, so ``[B, F, 6, D]`` broadcast over them gives the same result.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ffn.net[0].gelu = gelu_tanh

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        token_frames: Tensor | None = None,
        kept_text: TextKeysValues | None = None,
        window: WindowAttention | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            hidden_states: tokens ``[B, L, D]``, float32 or the dtype of the text.
            encoder_hidden_states: text ``[B, T, D]``; its dtype is that of the matmuls.
            temb: ``[B, M, 6, D]``; tokens fall into M equal runs unless `token_frames` says otherwise.
            rotary_emb: cosines and sines ``[1, L, 1, head]``.
            token_frames: ``[L]``, the row of `temb` of each token, where the tokens are a part of the sequence.
            kept_text: cached keys and values of this text, filled at the first use.
            window: which tokens attend to which; None: all to all.

        Returns:
            ``[B, L, D]`` of the dtype of `hidden_states`, L the tokens that `window` wants.
        """
        modulation = (self.scale_shift_table + temb.float()).unbind(2)
        wanted = window.wanted if window is not None else None
        attend = partial(self._attend, rotary=rotary_emb, window=window)
        read_text = partial(self._read_text, text_BTD=encoder_hidden_states, kept=kept_text)
        working_dtype = encoder_hidden_states.dtype
        if token_frames is None and _is_run_in_parts(hidden_states):
            return self._forward_by_frames(hidden_states, modulation, wanted, attend, read_text, working_dtype)
        shift, scale = modulation[:2]
        gate, ffn_shift, ffn_scale, ffn_gate = _rows_of(wanted, hidden_states.shape[1], modulation[2:])

        normed = modulate(self.norm1(hidden_states.float()), scale, shift, token_frames)
        attended = attend(normed.to(working_dtype))
        hidden_states = _add_gated(_tokens_of(wanted, hidden_states), attended, gate, token_frames)

        hidden_states = hidden_states + read_text(hidden_states)

        normed = modulate(self.norm3(hidden_states.float()), ffn_scale, ffn_shift, token_frames)
        return _add_gated(hidden_states, self.ffn(normed.to(working_dtype)), ffn_gate, token_frames)

    def _forward_by_frames(
        self,
        hidden_states: Tensor,
        modulation: tuple[Tensor, ...],
        wanted: slice | None,
        attend: Callable[[Tensor], Tensor],
        read_text: Callable[[Tensor], Tensor],
        working_dtype: torch.dtype,
    ) -> Tensor:
        """Do the same without gradients, all but attention a few frames at a time.

        The float32 copies and the feed-forward activations of a whole window would be 1.1 GiB at five frames of
        2560x1408.
        """
        shift, scale = modulation[:2]
        gate, ffn_shift, ffn_scale, ffn_gate = _rows_of(wanted, hidden_states.shape[1], modulation[2:])
        normed = torch.empty_like(hidden_states, dtype=working_dtype)
        for tokens, rows in _token_parts(hidden_states.shape[1], shift.shape[1]):
            part = self.norm1(hidden_states[:, tokens].float())
            modulate(part, scale[:, rows], shift[:, rows], None, out=normed[:, tokens])
        attended = attend(normed)
        # Not in place: a cache of diffusers may still compare the input with the output.
        entering = _tokens_of(wanted, hidden_states)
        result = _tokens_of(wanted, normed) if entering.dtype == working_dtype else torch.empty_like(entering)
        del normed
        parts = _token_parts(result.shape[1], gate.shape[1])
        for tokens, rows in parts:
            _add_gated(entering[:, tokens], attended[:, tokens], gate[:, rows], None, out=result[:, tokens])
        del attended
        result += read_text(result)
        for tokens, rows in parts:
            part = result[:, tokens]
            inner = modulate(self.norm3(part.float()), ffn_scale[:, rows], ffn_shift[:, rows], None)
            _add_gated(part, self.ffn(inner.to(working_dtype)), ffn_gate[:, rows], None, out=part)
            del inner
        return result

    def _attend(self, normed_BLD: Tensor, rotary: tuple[Tensor, Tensor], window: WindowAttention | None) -> Tensor:
        attended: Tensor = (
            self.attn1(normed_BLD, None, None, rotary)
            if window is None
            else window.attend(self.attn1, normed_BLD, rotary)
        )
        return attended

    def _read_text(self, tokens_BLD: Tensor, *, text_BTD: Tensor, kept: TextKeysValues | None) -> Tensor:
        normed = self.norm2(tokens_BLD).to(text_BTD.dtype)
        return self.attn2(normed, text_BTD, None, None) if kept is None else kept.attend(self.attn2, normed, text_BTD)
