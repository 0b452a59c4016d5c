"""Self-attention of a window in which not every token is a query, or not every token is visible to all.

One mechanism with three uses. A network trained with `frozen` context lets anchor and neighbors attend to each other
only, as in a causal model; the paper's is `bidirectional` (CSG). Either kind may keep the context's keys and values
from a segment's first step in a KV cache for its later steps, which then run the targets alone: exact with frozen
context, an approximation with bidirectional context, which would have seen the targets become cleaner. And in the last
block only the frames whose output is wanted need queries; the others only give keys and values: exact.

Shape suffixes as in `transformer.py`; N tokens of the context.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, _get_qkv_projections

from swifti2v.errors import InvalidInputError
from swifti2v.segments import FrameKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class BlockKeysValues:
    """Keys (with rotary positions applied) and values ``[B, N, heads, head]`` of the context in one block."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None


class KVCache:
    """Keys and values of one window's context under one text: 2.6 GB for TI2V-5B at 2560x1408 and two frames.

    Args:
        num_blocks: of the network.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [BlockKeysValues() for _ in range(num_blocks)]

    @property
    def is_filled(self) -> bool:
        """Whether a forward pass has been made: the next ones take the targets alone."""
        return self.blocks[-1].key is not None


@dataclass(frozen=True)
class WindowAttention:
    """How the tokens of a window attend to each other in one block.

    Not a tuple or a list: the hooks of accelerate and diffusers would copy it on its way into a block.

    Args:
        targets: the tokens of the targets among those given.
        is_frozen: whether the context attends to itself only.
        cache: where the context's keys and values are put, or come from.
        wanted: the tokens that are queries, whole frames; they see all others. None: all tokens are.
    """

    targets: slice
    is_frozen: bool = False
    cache: BlockKeysValues | None = None
    wanted: slice | None = None

    def attend(self, attention: Any, tokens_BLD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Return what diffusers' `WanAttnProcessor` returns for self-attention, except for what is visible to whom.

        Args:
            attention: a `WanAttention`.
            tokens_BLD: normed and modulated.
            rotary: cosines and sines ``[1, L, 1, head]``.

        Returns:
            ``[B, L, D]``, L those that are wanted.
        """
        query, key, value = self._projections(attention, tokens_BLD)
        # One after the other: assigned as a pair, both inputs would stay alive beside both results.
        query = attention.norm_q(query)
        key = attention.norm_k(key)
        query, key, value = (each.unflatten(2, (attention.heads, -1)) for each in (query, key, value))
        query_rotary = rotary if self.wanted is None else (rotary[0][:, self.wanted], rotary[1][:, self.wanted])
        query = _rotated(query, *query_rotary)
        key = _rotated(key, *rotary)
        attended = self._attended(query, key, value, attention.processor._attention_backend)
        result: Tensor = attention.to_out[1](attention.to_out[0](attended.flatten(2, 3).type_as(query)))
        return result

    def _projections(self, attention: Any, tokens_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.wanted is not None and not attention.fused_projections:
            return attention.to_q(tokens_BLD[:, self.wanted]), attention.to_k(tokens_BLD), attention.to_v(tokens_BLD)
        query, key, value = _get_qkv_projections(attention, tokens_BLD, None)
        return query if self.wanted is None else query[:, self.wanted], key, value

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Tensor:
        def dispatch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            attended: Tensor = dispatch_attention_fn(query, key, value, backend=backend)
            return attended

        if self.cache is not None and self.cache.key is not None and self.cache.value is not None:
            return dispatch(query, torch.cat([self.cache.key, key], 1), torch.cat([self.cache.value, value], 1))
        if self.cache is not None:
            self.cache.key, self.cache.value = self._context(key), self._context(value)
        if not self.is_frozen or self.wanted is not None:
            return dispatch(query, key, value)
        context = dispatch(self._context(query), self._context(key), self._context(value))
        targets = dispatch(query[:, self.targets], key, value)
        start = self.targets.start
        return torch.cat([context[:, :start], targets, context[:, start:]], dim=1)

    def _context(self, each: Tensor) -> Tensor:
        return torch.cat([each[:, : self.targets.start], each[:, self.targets.stop :]], dim=1)


def is_replaceable(network: Any) -> bool:
    """Return whether `WindowAttention` may replace self-attention: it must go through diffusers' plain processor.

    A compiled block keeps its own attention where all tokens see all: one graph for each length of window.
    """
    block = network.blocks[-1]
    return type(block.attn1.processor) is WanAttnProcessor and block._compiled_call_impl is None


def only_wanted(window: WindowAttention | None, wanted: slice) -> WindowAttention | None:
    """Return how the last block attends, if only the tokens `wanted` of a window need an output.

    `window` itself where the result would differ: frozen context does not see all, and cached context is not among
    the tokens.
    """
    if window is None:
        return None
    is_within = window.targets.start <= wanted.start and wanted.stop <= window.targets.stop
    has_context = window.cache is None or window.cache.key is None
    return replace(window, wanted=wanted) if has_context and (is_within or not window.is_frozen) else window


def window_attention(
    kinds: Tensor | None, num_tokens: int, *, is_frozen: bool, cache: Sequence[BlockKeysValues | None]
) -> list[WindowAttention]:
    """Return how each block attends to a window whose context is frozen or cached.

    Args:
        kinds: ``[F]`` integers of `FrameKind` on the CPU; None: all are targets.
        num_tokens: L of the F frames.
        is_frozen: see `WindowAttention`.
        cache: of each block, for the context of this window.

    Raises:
        InvalidInputError: the targets are not consecutive, or context is given although the cache is filled.
    """
    values = [] if kinds is None else kinds.tolist()
    places = [place for place, kind in enumerate(values) if kind == FrameKind.TARGET]
    has_context = len(places) < len(values)
    is_known = any(each is not None and each.key is not None for each in cache)
    if is_known and has_context:
        msg = "the context of this window is cached already; give its targets alone, or a new KVCache"
        raise InvalidInputError(msg)
    if is_known or not has_context:
        return [
            WindowAttention(slice(0, num_tokens), is_frozen and is_known, each if is_known else None) for each in cache
        ]
    if not places or places[-1] - places[0] + 1 != len(places):
        msg = f"frame_kinds is {values}; the targets of a window must be consecutive, and there must be some"
        raise InvalidInputError(msg)
    per_frame = num_tokens // len(values)
    targets = slice(places[0] * per_frame, (places[-1] + 1) * per_frame)
    return [WindowAttention(targets, is_frozen, each) for each in cache]


def _rotated(each: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply rotary positions to pairs of adjacent numbers, as Wan lays them out, in float32."""
    pairs, cosine, sine = torch.unflatten(each, -1, (-1, 2)), cosines[..., 0::2], sines[..., 1::2]
    if torch.compiler.is_compiling():  # Inductor has no complex numbers, and fuses these
        even, odd = pairs.unbind(-1)
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2).type_as(each)
    rotated = torch.view_as_complex(pairs.float().contiguous()) * torch.complex(cosine.float(), sine.float())
    return torch.view_as_real(rotated).flatten(-2).type_as(each)
