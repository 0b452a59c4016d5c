"""What can be asked about the cost of a network, and the answers: FLOPs, bytes at work, bytes of its weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    from swifti2v.memory.networks import Network, Quantization, Storage


@dataclass(frozen=True)
class Work:
    """TFLOP, by what decides their rate.

    Args:
        blocks: matrix products of a transformer's blocks, which may be quantized.
        matmul: other matrix products.
        attention: of queries, keys and values.
        codec: everything that a codec does.
    """

    blocks: float = 0.0
    matmul: float = 0.0
    attention: float = 0.0
    codec: float = 0.0

    @property
    def tflop(self) -> float:
        """All of it."""
        return self.blocks + self.matmul + self.attention + self.codec

    def __add__(self, other: Work) -> Work:
        """Return both together."""
        return Work(
            self.blocks + other.blocks,
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.codec + other.codec,
        )

    def times(self, count: float) -> Work:
        """Return the work done `count` times."""
        return Work(*(count * tflop for tflop in (self.blocks, self.matmul, self.attention, self.codec)))


@dataclass(frozen=True)
class WeightCost:
    """A network's weights: parameters, bytes of all, of one block, and of what is in no block."""

    num_parameters: int
    num_bytes: int
    block_bytes: int = 0
    outside_bytes: int = 0


@dataclass(frozen=True)
class ForwardCost:
    """One forward pass.

    Args:
        blocks, matmul, attention: TFLOP, see `Work`.
        working_bytes: at the peak, beyond weights and what is kept.
        kept_text_bytes: keys and values of the text, kept for the clip.
        kept_context_bytes: keys and values of the context, kept for a segment.
    """

    blocks: float
    matmul: float
    attention: float
    working_bytes: int
    kept_text_bytes: int = 0
    kept_context_bytes: int = 0

    @property
    def work(self) -> Work:
        """Its TFLOP."""
        return Work(self.blocks, self.matmul, self.attention)


@dataclass(frozen=True)
class StreamCost:
    """A codec's stream: TFLOP of the first and of every later latent frame, bytes at the peak, bytes of its caches."""

    first: float
    later: float
    peak_bytes: int
    cache_bytes: int

    def work(self, num_latent_frames: int) -> Work:
        """Return the TFLOP of a clip."""
        return Work(codec=self.first + (num_latent_frames - 1) * self.later)


@dataclass(frozen=True)
class ClipCost:
    """A codec that encodes and decodes whole clips, as diffusers does: TFLOP of both, bytes at the peak of either."""

    tflop: float
    peak_bytes: int


Answer = TypeVar("Answer", WeightCost, ForwardCost, StreamCost, ClipCost)


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """What is asked about a network that works in `dtype`."""

    network: Network
    dtype: str

    answer: ClassVar[type[Any]]

    def key(self, digest: str) -> str:
        """Return its name in a table, where its network has this digest."""
        shape: list[str] = [str(getattr(self, each.name)) for each in fields(self) if each.name != "network"]
        return " ".join((self.network.class_name, digest, type(self).__name__, *shape))


@dataclass(frozen=True)
class Weights(Question[WeightCost]):
    """How much do the weights take, stored so?"""

    storage: Storage = "bfloat16"
    quantization: Quantization = "none"

    answer = WeightCost


@dataclass(frozen=True)
class Forward(Question[ForwardCost]):
    """What does a forward pass of a transformer take, or of a text encoder, which has text only?

    With `num_context_frames`: a later pass over `num_frames` targets, the keys and values of the context being kept.
    """

    storage: Storage
    quantization: Quantization
    num_text_tokens: int
    num_channels: int = 0
    num_frames: int = 0
    height: int = 0
    width: int = 0
    num_context_frames: int = 0

    answer = ForwardCost


@dataclass(frozen=True)
class Encoding(Question[StreamCost]):
    """What does it take to encode a stream of frames of this size in pixels?"""

    width: int
    height: int

    answer = StreamCost


@dataclass(frozen=True)
class Decoding(Encoding):
    """What does it take to decode a stream of frames of this size in pixels?"""


@dataclass(frozen=True)
class Clip(Question[ClipCost]):
    """What does it take to encode a whole clip and to decode it, as diffusers' pipeline does?"""

    width: int
    height: int
    num_frames: int

    answer = ClipCost
