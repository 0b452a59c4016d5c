"""Stage II's network: diffusers' Wan transformer, subclassed at its seams (`docs/design.md` 3, 4).

What differs from `diffusers.WanTransformer3DModel` (0.42): a wider input for the reference, RoPE positions in time that
the caller names, modulation per latent frame, an embedding that tells the kinds of frames apart, and tokens that stay
in float32 between the layers where no gradients are asked for. The parameters keep their names, so weights interchange
with the parent class.

Shape suffixes: B batch, C channels, F latent frames, H W latent height and width, L tokens (frame-major), D width,
T text tokens, M modulations: F, or 1 when all frames share a timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.segments import FrameKind
from swifti2v.wan.context_attention import (
    KVCache,
    WindowAttention,
    is_replaceable,
    only_wanted,
    window_attention,
)
from swifti2v.wan.local_detail import LocalDetail
from swifti2v.wan.text_attention import KeptText, TextCache, keeps_text
from swifti2v.wan.transformer_block import PART_TOKENS, FramePositionRope, StageTwoBlock, modulate
from swifti2v.wan.transformer_configuration import (
    ContextAttention,
    PredictionType,
    check_configuration,
    checked_grid,
)

__all__ = ["PredictionType", "StageTwoBlock", "StageTwoTransformer"]


_KIND_TABLE = "frame_kind_table"


class StageTwoTransformer(WanTransformer3DModel):
    """Stage II's DiT: Wan2.2-TI2V-5B with the reference joined channel-wise (paper, section Stage II).

    Args (besides the parent's):
        in_channels: `out_channels` + `reference_channels`.
        patch_size: 1 in time; a latent frame is what segments count.
        reference_channels: channels of `z_ref` behind the slots; 0 runs public weights as they are (training-free).
        prediction_type: `velocity` (Wan's own: noise - x0) or `residual` (x0 - reference).
        local_detail_width: hidden channels of `LocalDetail` beside the tokens; 0 for none, as in Wan.
        context_attention: `bidirectional` (paper: context and targets see each other) or `frozen` (the context sees
            itself alone).

    Raises:
        ConfigurationError: the channels do not add up, or another argument is not of the above.
    """

    # With a deeper name diffusers would look for the class among its own pipelines, where there is a `wan` too.
    __module__ = "swifti2v.wan"

    _no_split_modules = ["StageTwoBlock"]  # noqa: RUF012 - diffusers declares these as plain class attributes
    _repeated_blocks = ["StageTwoBlock"]  # noqa: RUF012 - as above
    _keep_in_fp32_modules = [*WanTransformer3DModel._keep_in_fp32_modules, _KIND_TABLE]  # noqa: RUF012 - as above
    # Everything per token is split where it is made; timesteps are per frame and stay whole on each rank.
    _cp_plan = {  # noqa: RUF012 - as above
        "rope": {
            0: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            1: ContextParallelInput(split_dim=1, expected_dims=4, split_output=True),
            2: ContextParallelInput(split_dim=1, expected_dims=2, split_output=True),
        },
        "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @register_to_config
    def __init__(  # noqa: PLR0913 - the configuration of a network is its signature
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 48,
        out_channels: int = 48,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        reference_channels: int = 0,
        prediction_type: PredictionType = "velocity",
        local_detail_width: int = 0,
        context_attention: ContextAttention = "bidirectional",
    ) -> None:
        check_configuration(
            patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            reference_channels=reference_channels,
            prediction_type=prediction_type,
            context_attention=context_attention,
        )
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=0,  # the blocks are made below, once, of our class
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        # The parent's __init__ registers its own arguments too, and that count is not ours.
        self.register_to_config(num_layers=num_layers)
        width = num_attention_heads * attention_head_dim
        self.rope = FramePositionRope(attention_head_dim, patch_size, rope_max_seq_len)
        self.blocks = nn.ModuleList(
            StageTwoBlock(width, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps, added_kv_proj_dim)
            for _ in range(num_layers)
        )
        self._text_cache: TextCache | None = None
        self.local_detail = (
            LocalDetail(reference_channels, out_channels, local_detail_width) if local_detail_width else None
        )
        # Public checkpoints lack this table. Loaders build the network on the meta device by intercepting
        # `register_parameter` and leave there what the file does not hold; written past it, the zeros are real.
        self._parameters[_KIND_TABLE] = nn.Parameter(torch.zeros(len(FrameKind), width, dtype=torch.float32))

    @classmethod
    def from_wan(
        cls, base: WanTransformer3DModel, *, reference_channels: int = 0, prediction_type: PredictionType = "velocity"
    ) -> Self:
        """Make Stage II's network of a loaded Wan transformer; without training its output is the base's.

        The weights are taken over, not copied (10 GB for TI2V-5B): do not go on training `base`. The input is widened
        by `reference_channels` whose weights are zero.

        Raises:
            ConfigurationError: `base` has extra input channels already.
            CheckpointError: `base` carries adapters or is quantized (quantize with `from_pretrained` of this class).
        """
        settings = {name: value for name, value in base.config.items() if not name.startswith("_")}
        settings |= {"reference_channels": reference_channels, "prediction_type": prediction_type}
        settings["in_channels"] += reference_channels
        with init_empty_weights(include_buffers=False):
            transformer = cls(**settings)
        state = base.state_dict()
        state.setdefault(_KIND_TABLE, transformer.frame_kind_table.detach().to(base.device))
        odd = state.keys() ^ transformer.state_dict().keys()
        if odd or getattr(base, "hf_quantizer", None):
            where = f" at {min(odd)}" if odd else ""
            msg = f"the base transformer is not of the plain layout{where}; unload adapters and load it unquantized"
            raise CheckpointError(msg)
        weight = state["patch_embedding.weight"]
        extra = weight.new_zeros(weight.shape[0], reference_channels, *weight.shape[2:])
        state["patch_embedding.weight"] = torch.cat([weight, extra], dim=1)
        transformer.load_state_dict(state, assign=True)
        transformer.rope.to(base.device)
        return transformer.train(base.training)

    @classmethod
    def from_single_file(cls, *arguments: Any, **options: Any) -> Self:
        """Load a stock Wan file, as the parent does and with its arguments; no quantized one."""
        # The parent would take the absent table for a sign of the original key names, and convert wrongly.
        return cls.from_wan(WanTransformer3DModel.from_single_file(*arguments, **options))

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Any,
        state_dict: Any,
        resolved_model_file: Any,
        pretrained_model_name_or_path: Any,
        loaded_keys: list[str],
        **options: Any,
    ) -> Any:
        """Load as the parent does, but refuse what it would leave on the meta device with a warning."""
        report = super()._load_pretrained_model(
            model,
            state_dict,
            resolved_model_file,
            pretrained_model_name_or_path,
            # Counted as loaded (it has its value), the table is not reported as new weights to be trained.
            [*loaded_keys, *({_KIND_TABLE} - set(loaded_keys))],
            **options,
        )
        _, missing, unexpected, mismatched, *_ = report
        if options.get("hf_quantizer") is None and (missing or unexpected or mismatched):
            msg = (
                f"{pretrained_model_name_or_path} does not hold this network's weights: {len(missing)} missing, "
                f"{len(unexpected)} unexpected, {len(mismatched)} of another shape, for instance "
                f"{min(map(str, [*missing, *unexpected, *mismatched]))}; widen a network with from_wan, after loading"
            )
            raise CheckpointError(msg)
        return report

    def enable_cache(self, config: Any) -> None:
        """Turn on a cache of diffusers (`FirstBlockCacheConfig`, ...); the block is made known to it first."""
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        TransformerBlockRegistry.register(StageTwoBlock, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)

    @contextmanager
    def text_kept(self) -> Iterator[None]:
        """Within this context, make embedding, keys and values of a text once, and use them again for that tensor.

        The result is the same. Weights may not change meanwhile; passes with gradients or scaled LoRAs keep nothing.
        """
        before, self._text_cache = self._text_cache, TextCache(len(self.blocks))
        try:
            yield
        finally:
            self._text_cache = before

    @apply_lora_scale("attention_kwargs")
    def forward(  # noqa: PLR0913 - the parent's arguments, and what it is to know of the frames
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        frame_positions: Tensor | None = None,
        frame_kinds: Tensor | None = None,
        output_frames: slice | None = None,
        kv_cache: KVCache | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the network on one window.

        Args:
            hidden_states: ``[B, Cin, F, H, W]``, slots then reference; the network's dtype.
            timestep: ``[B]`` or ``[B, F]`` in 0..1000, 0 for finished frames; fractions count.
            encoder_hidden_states: text ``[B, T, text_dim]``.
            encoder_hidden_states_image: CLIP embeddings, for Wan2.1 layouts only.
            frame_positions: ``[F]`` integers in ``[0, rope_max_seq_len)``, RoPE positions in time; 0..F-1 if None.
                Best on the CPU, as `frame_kinds`: the check of their range would wait for a GPU.
            frame_kinds: ``[F]`` integers of `FrameKind`; all targets if None.
            output_frames: of the F frames, those whose output is wanted; all if None.
            kv_cache: holds keys and values of the context (all frames but the targets); once it is filled, give the
                targets alone, with their positions.
            return_dict: return an object with `sample`, else a tuple of one.
            attention_kwargs: ``{"scale": s}`` scales LoRA layers.

        Returns:
            ``[B, Cout, F, H, W]`` of the network's dtype, F those of `output_frames`.

        Raises:
            InvalidInputError: a shape or a position does not fit; or, under context parallelism, the context is frozen
                or cached.
        """
        frames, rows, columns = checked_grid(self.config, hidden_states, timestep, frame_positions, frame_kinds)

        rotary_cos, rotary_sin, token_frames_1L = self.rope(hidden_states, frame_positions)
        tokens_BLD = self._embed(hidden_states, frame_kinds)
        if not torch.is_grad_enabled():
            # As under Wan's autocast: sixty sums in bfloat16 would add four times the error of the matmuls. With
            # gradients they stay narrow, because each block keeps its input.
            tokens_BLD = tokens_BLD.float()
        kept = None if attention_kwargs else self._kept_text(encoder_hidden_states)
        temb_BMD, table_BM6D, text_BTD = self._condition(
            timestep, encoder_hidden_states, encoder_hidden_states_image, kept
        )
        # Under context parallelism this rank holds a part of the tokens, perhaps a part of a frame.
        is_part = token_frames_1L.shape[1] != frames * rows * columns
        token_frames_L = token_frames_1L[0] if is_part and temb_BMD.shape[1] > 1 else None
        windows = self._windows(frame_kinds, frames * rows * columns, kv_cache, is_part=is_part)
        wanted = slice(*(output_frames or slice(None)).indices(frames)[:2])
        if windows and wanted.stop - wanted.start < frames and not self.is_cache_enabled:
            # Caches of diffusers compare whole outputs of blocks.
            of_tokens = slice(wanted.start * rows * columns, wanted.stop * rows * columns)
            windows = [*windows[:-1], only_wanted(windows[-1], of_tokens)]

        for index, block in enumerate(self.blocks):
            kept_block = kept.blocks[index] if kept is not None else None
            rotary = (rotary_cos, rotary_sin)
            arguments = (tokens_BLD, text_BTD, table_BM6D, rotary, token_frames_L, kept_block, windows[index])
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens_BLD = self._gradient_checkpointing_func(block, *arguments)
            else:
                tokens_BLD = block(*arguments)

        if not is_part:  # a rank that holds a part of the tokens cannot leave any out before they are gathered
            if tokens_BLD.shape[1] == frames * rows * columns:
                tokens_BLD = torch.unflatten(tokens_BLD, 1, (frames, -1))[:, wanted].flatten(1, 2)
            temb_BMD = temb_BMD[:, wanted] if temb_BMD.shape[1] > 1 else temb_BMD
        patches = torch.unflatten(self._head(tokens_BLD, temb_BMD, token_frames_L), 1, (-1, rows, columns))
        sample = self._unpatchify(patches[:, wanted] if is_part else patches)
        del patches
        if self.local_detail is not None:
            self.local_detail.add_to(sample, hidden_states[:, -self.config.reference_channels :, wanted])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, hidden_states: Tensor, frame_kinds: Tensor | None) -> Tensor:
        """Patches to tokens ``[B, L, D]``, plus the embedding of the kind of their frame."""
        # A few frames at a time: what a convolution copies of its input is then theirs, not a window's.
        _, patch_height, patch_width = self.config.patch_size
        per_frame = hidden_states[0, 0, 0].numel() // (patch_height * patch_width)
        parts = torch.split(hidden_states, max(1, PART_TOKENS // per_frame), dim=2)
        patches_BDFHW = torch.cat([self.patch_embedding(part) for part in parts], dim=2)
        table = self.frame_kind_table.to(patches_BDFHW)
        if frame_kinds is None:
            kinds_FD = table[FrameKind.TARGET].unsqueeze(0)
        else:
            kinds_FD = table[frame_kinds.to(table.device, non_blocking=True)]
        embedded = patches_BDFHW + kinds_FD.T[:, :, None, None]
        # The transposed view would make every layer of the first block copy it.
        return embedded.flatten(2).transpose(1, 2).contiguous()

    def _windows(
        self, frame_kinds: Tensor | None, num_tokens: int, kv_cache: KVCache | None, *, is_part: bool
    ) -> Sequence[WindowAttention | None]:
        is_frozen = self.config.context_attention == "frozen"
        if kv_cache is None and not is_frozen:
            is_plain = is_part or not self.blocks or not is_replaceable(self)
            return [None if is_plain else WindowAttention(slice(0, num_tokens)) for _ in self.blocks]
        if is_part:
            msg = "frozen or cached context cannot be split over devices; run on one, or without a KV cache"
            raise InvalidInputError(msg)
        cache = kv_cache.blocks if kv_cache else [None] * len(self.blocks)
        return window_attention(frame_kinds, num_tokens, is_frozen=is_frozen, cache=cache)

    def _kept_text(self, text: Tensor) -> KeptText | None:
        if self._text_cache is None or torch.is_grad_enabled() or not keeps_text(self.blocks[0].attn2):
            return None
        return self._text_cache.of(text)

    def _condition(
        self, timestep: Tensor, text: Tensor, image: Tensor | None, kept: KeptText | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed timesteps once a frame: ``[B, M, D]`` for the head, ``[B, M, 6, D]`` for blocks; and the text."""
        timestep_BM = timestep if timestep.ndim == 2 else timestep.unsqueeze(1)
        is_known = kept is not None and kept.embedded is not None
        temb_BMD, projected, text_BTD, image_BTD = self.condition_embedder(
            # diffusers embeds both in one call; a text that is known is given as one token, and its result is dropped.
            timestep_BM.flatten(),
            text[:, :1] if is_known else text,
            image,
            timestep_seq_len=timestep_BM.shape[1],
        )
        if kept is not None:
            if kept.embedded is None:
                kept.embedded = text_BTD
            text_BTD = kept.embedded
        if image_BTD is not None:
            text_BTD = torch.cat([image_BTD, text_BTD], dim=1)
        return temb_BMD, projected.unflatten(2, (6, -1)), text_BTD

    def _head(self, tokens_BLD: Tensor, temb_BMD: Tensor, token_frames_L: Tensor | None) -> Tensor:
        # The parameter and the tokens may lie on different devices of a device map.
        table = self.scale_shift_table.to(tokens_BLD.device)
        shift, scale = (table + temb_BMD.to(tokens_BLD.device).unsqueeze(2)).unbind(2)
        normed = modulate(self.norm_out(tokens_BLD.float()), scale, shift, token_frames_L)
        return self.proj_out(normed.to(temb_BMD.dtype))

    def _unpatchify(self, patches: Tensor) -> Tensor:
        _, patch_height, patch_width = self.config.patch_size
        cells = torch.unflatten(patches, -1, (patch_height, patch_width, -1))
        # B F rows columns ph pw C -> B C F (rows ph) (columns pw)
        return cells.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
