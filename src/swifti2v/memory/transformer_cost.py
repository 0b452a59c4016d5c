"""Cost of the transformers: Wan's DiT and UMT5's encoder, from the numbers of their `config.json`. Arithmetic only.

One multiply-add counts as two FLOPs. Norms, activations, modulation and rotary embeddings are left out of FLOPs: they
cost memory traffic, not arithmetic. The tests hold the counts against PyTorch's FLOP counter and diffusers' modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Self

from swifti2v.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

TERA = 1e12


@dataclass(frozen=True)
class ForwardCost:
    """TFLOP of one forward pass, by what scales how: with the tokens, with their square, with tokens times text."""

    linear_tflop: float
    self_attention_tflop: float
    cross_attention_tflop: float = 0.0

    @property
    def tflop(self) -> float:
        """The whole pass."""
        return self.linear_tflop + self.self_attention_tflop + self.cross_attention_tflop

    def __add__(self, other: ForwardCost) -> ForwardCost:
        """Return the cost of both passes."""
        return ForwardCost(
            self.linear_tflop + other.linear_tflop,
            self.self_attention_tflop + other.self_attention_tflop,
            self.cross_attention_tflop + other.cross_attention_tflop,
        )

    def times(self, count: int) -> ForwardCost:
        """Return the cost of `count` such passes."""
        return ForwardCost(
            self.linear_tflop * count, self.self_attention_tflop * count, self.cross_attention_tflop * count
        )


NO_COST = ForwardCost(0.0, 0.0)


@dataclass(frozen=True)
class TransformerDimensions:
    """A Wan DiT, by the names of diffusers' `WanTransformer3DModel` config.

    Args:
        patch_size: latent frames, rows and columns of one token.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json`, leaving other keys alone; raise `ConfigurationError` if a value is missing."""
        patch = tuple(config_value(config, "patch_size", (1, 2, 2)))
        return cls(
            num_layers=config_value(config, "num_layers"),
            num_attention_heads=config_value(config, "num_attention_heads"),
            attention_head_dim=config_value(config, "attention_head_dim"),
            ffn_dim=config_value(config, "ffn_dim"),
            in_channels=config_value(config, "in_channels"),
            out_channels=config_value(config, "out_channels"),
            text_dim=config_value(config, "text_dim", 4096),
            freq_dim=config_value(config, "freq_dim", 256),
            patch_size=(patch[0], patch[1], patch[2]),
        )

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    def num_tokens(self, num_latent_frames: int, latent_height: int, latent_width: int) -> int:
        """Tokens of a latent video."""
        frames, rows, columns = self.patch_size
        return (num_latent_frames // frames) * (latent_height // rows) * (latent_width // columns)

    def forward_cost(
        self, num_tokens: int, *, text_tokens: int = 512, num_timesteps: int = 1, kept_tokens: int = 0
    ) -> ForwardCost:
        """Cost of one pass for one sample.

        Args:
            num_tokens: video tokens.
            text_tokens: length of the padded prompt.
            num_timesteps: distinct timesteps that are embedded: 1, or the latent frames of the window.
            kept_tokens: further tokens that are attended to, whose keys and values are known.
        """
        dim, patch = self.dim, prod(self.patch_size)
        per_layer = 6 * num_tokens * dim**2 + 2 * text_tokens * dim**2 + 2 * num_tokens * dim * self.ffn_dim
        embed = num_tokens * patch * (self.in_channels + self.out_channels) * dim
        text = text_tokens * (self.text_dim * dim + dim**2)
        time = num_timesteps * (self.freq_dim * dim + 7 * dim**2)
        return ForwardCost(
            linear_tflop=2 * (self.num_layers * per_layer + embed + text + time) / TERA,
            self_attention_tflop=4 * self.num_layers * num_tokens * (num_tokens + kept_tokens) * dim / TERA,
            cross_attention_tflop=4 * self.num_layers * num_tokens * text_tokens * dim / TERA,
        )

    @property
    def num_parameters(self) -> int:
        """Weights, biases, norms and modulation tables."""
        dim, patch = self.dim, prod(self.patch_size)
        attention = 4 * (dim**2 + dim) + 2 * dim  # q, k, v, out and the two norms over q and k
        feed_forward = 2 * dim * self.ffn_dim + self.ffn_dim + dim
        block = 2 * attention + feed_forward + 2 * dim + 6 * dim  # norm2 and the modulation table
        time = (self.freq_dim + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
        text = (self.text_dim + 1) * dim + (dim + 1) * dim
        ends = (self.in_channels * patch + 1) * dim + (dim + 1) * self.out_channels * patch + 2 * dim
        return self.num_layers * block + time + text + ends

    @property
    def matrix_parameters(self) -> int:
        """Weights of the linear layers of one block, without their biases."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest linear layer of a block."""
        return self.dim * max(self.dim, self.ffn_dim)

    @property
    def exact_parameters(self) -> int:
        """Those that are never stored in float8: embeddings of patches, time and text (diffusers' list for Wan)."""
        dim, patch = self.dim, prod(self.patch_size)
        time = (self.freq_dim + 1) * dim + (dim + 1) * dim + (dim + 1) * 6 * dim
        return (self.in_channels * patch + 1) * dim + time + (self.text_dim + 1) * dim + (dim + 1) * dim

    def kept_bytes(self, num_tokens: int) -> int:
        """Bytes of the keys and values of `num_tokens` in every block, bf16."""
        return 2 * 2 * num_tokens * self.dim * self.num_layers

    def activation_bytes(self, num_tokens: int, *, fused: bool = False) -> int:
        """Peak bytes of one bf16 forward beyond the weights, by counting what is alive at the worst place of a block.

        Eager, that is the larger of two: the activation function of the feed-forward net (its input and output, beside
        four tensors of the token width: the block's input, the residual stream, the last attention output, the normed
        input), and the fp32 gated sum that ends the block (three fp32 and five bf16 tensors of the token width). Fused
        kernels leave one feed-forward tensor and three of the token width. Modulation is per frame or per sample.
        """
        dim = self.dim
        if fused:
            per_token = 3 * 2 * dim + 2 * self.ffn_dim
        else:
            per_token = max(4 * 2 * dim + 2 * 2 * self.ffn_dim, (3 * 4 + 5 * 2) * dim)
        rotary = 2 * 4 * self.attention_head_dim
        latents = 2 * prod(self.patch_size) * self.in_channels
        return num_tokens * (per_token + rotary + latents)


@dataclass(frozen=True)
class TextEncoderDimensions:
    """A UMT5 encoder, by the names of transformers' `UMT5Config`."""

    num_layers: int
    d_model: int
    d_kv: int
    num_heads: int
    d_ff: int
    vocab_size: int
    relative_attention_num_buckets: int = 32

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json`, leaving other keys alone; raise `ConfigurationError` if a value is missing."""
        names = ("num_layers", "d_model", "d_kv", "num_heads", "d_ff", "vocab_size")
        buckets = config_value(config, "relative_attention_num_buckets", 32)
        return cls(**{name: config_value(config, name) for name in names}, relative_attention_num_buckets=buckets)

    @property
    def matrix_parameters(self) -> int:
        """Weights of the linear layers of one block."""
        return 4 * self.d_model * self.d_kv * self.num_heads + 3 * self.d_model * self.d_ff

    def forward_cost(self, num_tokens: int) -> ForwardCost:
        """Cost of encoding one prompt padded to `num_tokens`."""
        linear = 2 * num_tokens * self.num_layers * self.matrix_parameters
        attention = 4 * self.num_layers * num_tokens**2 * self.d_kv * self.num_heads
        return ForwardCost(linear / TERA, attention / TERA)

    @property
    def num_parameters(self) -> int:
        """Weights of the encoder with its embedding table."""
        layer = self.matrix_parameters + self.relative_attention_num_buckets * self.num_heads + 2 * self.d_model
        return self.vocab_size * self.d_model + self.num_layers * layer + self.d_model

    @property
    def largest_matrix(self) -> int:
        """Weights of the largest linear layer of a block."""
        return self.d_model * max(self.d_ff, self.d_kv * self.num_heads)

    @property
    def exact_parameters(self) -> int:
        """Those never stored in float8: the table of words, and the layers whose dtype transformers looks at."""
        return self.vocab_size * self.d_model + self.num_layers * self.d_ff * self.d_model

    def activation_bytes(self, num_tokens: int) -> int:
        """Peak bytes of one bf16 forward: one layer's fp32 scores and softmax, or its gated feed-forward net."""
        scores = 2 * 4 * self.num_heads * num_tokens**2
        feed_forward = 3 * 2 * num_tokens * self.d_ff
        return max(scores, feed_forward) + 4 * 2 * num_tokens * self.d_model


def config_value(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return ``config[name]``, or `default` if that is not None; raise `ConfigurationError` if there is neither."""
    value = config.get(name, default)
    if value is None:
        msg = f"config.json has no {name!r}; give the config that was saved with the network"
        raise ConfigurationError(msg)
    return value


WAN22_I2V_A14B_EXPERT = TransformerDimensions(
    num_layers=40, num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, in_channels=36, out_channels=16
)
WAN22_TI2V_5B = TransformerDimensions(
    num_layers=30, num_attention_heads=24, attention_head_dim=128, ffn_dim=14336, in_channels=48, out_channels=48
)
STAGE_TWO_5B = TransformerDimensions(
    num_layers=30, num_attention_heads=24, attention_head_dim=128, ffn_dim=14336, in_channels=96, out_channels=48
)
UMT5_XXL = TextEncoderDimensions(num_layers=24, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, vocab_size=256384)
