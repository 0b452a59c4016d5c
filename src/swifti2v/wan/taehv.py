"""TAEHV: a small decoder in place of a Wan codec's own, with 1/200 of its work and lower fidelity.

The network is TAEHV's (github.com/madebyollin/taehv, MIT), and its public weight files load by their own names:
``taew2_2`` and ``taew2_2_super`` (48 channels, Wan2.2-TI2V-5B), ``taew2_1`` (16 channels), and LightX2V's ``lighttae*``
of the same layout. Its 2D convolutions see one frame at a time; each block also sees its own input of the previous
frame. So frames are made one after the other, and memory depends neither on the length of the clip nor on how many
frames a latent frame becomes.

Every latent frame becomes four frames, the first one too; of those of the first only the last is kept, as TAEHV does,
so that 4k+1 frames come out. RGB is in [0, 1] at the last layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from swifti2v.errors import CheckpointError
from swifti2v.pixels import stream_to_uint8
from swifti2v.wan.checkpoint_files import Hub
from swifti2v.wan.checkpoint_index import is_hub_id
from swifti2v.wan.streaming import check_finite, check_latents, check_result

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Mapping

NUM_STAGES = 3
BLOCKS_PER_STAGE = 3
LAST_LAYER = 22

Memory = dict[nn.Module, Tensor]
"""Input of each block for the previous frame, ``[1, C, h, w]``."""


@dataclass(frozen=True)
class LightLayout:
    """The sizes of a network, as found in its weights.

    Args:
        num_channels: of the latents.
        widths: channels of the three stages, and of the output of the last.
        frame_factors: frames that each stage makes of one.
        patch_size: width and height in pixels of the patch that the last layer gives for each of its cells.
        is_wide: with the blocks of the ``_super`` files.
    """

    num_channels: int
    widths: tuple[int, ...] = (256, 128, 64, 64)
    frame_factors: tuple[int, ...] = (1, 2, 2)
    patch_size: int = 1
    is_wide: bool = False

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell along each side."""
        return self.patch_size << NUM_STAGES

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first."""
        return prod(self.frame_factors)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Self:
        """Derive the sizes from the weights of a file.

        Raises:
            CheckpointError: a weight that is needed for this is missing.
        """
        is_wide = "decoder.0.weight" in weights
        stride, shift = (7, 0) if is_wide else (6, 1)  # layers of a stage, and layers before the first
        try:
            grown = [weights[f"decoder.{stride * stage + shift}.conv.weight"] for stage in (1, 2, 3)]
            inner = [matrix.shape[1] for matrix in grown]
            entry = weights[f"decoder.{shift}.weight"]
            widths = [len(entry), *inner] if is_wide else [*inner, len(weights["decoder.20.weight"])]
            patch_size = round((len(weights[f"decoder.{LAST_LAYER}.bias"]) / 3) ** 0.5)
        except KeyError as error:
            msg = f"there is no weight {error.args[0]}; give a decoder of TAEHV, for instance taew2_2.safetensors"
            raise CheckpointError(msg) from error
        factors = tuple(len(matrix) // matrix.shape[1] for matrix in grown)
        return cls(entry.shape[1], tuple(widths), factors, patch_size, is_wide)


class LightDecoderNetwork(nn.Module):
    """The layers, numbered as in the public files (``decoder.0`` and so on), run frame by frame."""

    def __init__(self, layout: LightLayout) -> None:
        super().__init__()
        self.layout = layout
        layers = _wide_layers(layout) if layout.is_wide else _plain_layers(layout)
        self.decoder = nn.ModuleList(layers)

    def forward(self, latent: Tensor, memory: Memory) -> Iterator[Tensor]:
        """Yield the frames of one latent frame ``[1, C, h, w]``: ``[1, 3, H, W]`` in [0, 1].

        Args:
            latent: the next of the clip.
            memory: empty at first; kept up to date while the frames are read, all of them.
        """
        for frame in self._passed(latent, memory, 0):
            yield F.pixel_shuffle(frame, self.layout.patch_size).clamp_(0, 1)

    def _passed(self, frame: Tensor, memory: Memory, start: int) -> Iterator[Tensor]:
        for index in range(start, len(self.decoder)):
            layer = self.decoder[index]
            if isinstance(layer, _Grow):
                grown = list(layer(frame))
                del frame
                while grown:
                    yield from self._passed(grown.pop(0), memory, index + 1)
                return
            if isinstance(layer, _Block):
                before = memory.get(layer)
                memory[layer] = frame
                frame = layer(torch.cat([frame, torch.zeros_like(frame) if before is None else before], dim=1))
                del before
            else:
                frame = layer(frame)
        yield frame


class LightDecoder:
    """Decodes a stream of latents as `StreamingCodec.decode_stream` does.

    Args:
        network: its weights; not copied, not moved.
        mean, std: of the codec's latents, where the network was trained on latents as the codec gives them (LightX2V's
            ``lighttae*``) and not on normalized ones.
    """

    def __init__(
        self, network: LightDecoderNetwork, *, mean: Iterable[float] = (0.0,), std: Iterable[float] = (1.0,)
    ) -> None:
        self.network = network
        self.num_channels = network.layout.num_channels
        self.spatial_factor = network.layout.spatial_factor
        self.temporal_factor = network.layout.temporal_factor
        self._mean = torch.tensor(list(mean)).view(1, -1, 1, 1, 1)
        self._std = torch.tensor(list(std)).view(1, -1, 1, 1, 1)

    def decode_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Decode latents as they come; see `StreamingCodec.decode_stream`.

        Raises:
            InvalidInputError: an item has the wrong shape, channels or dtype, another size, or holds NaN or infinity.
            CheckpointError: the network turned finite latents into values that are not finite.
        """
        return stream_to_uint8(self.decode_pixel_stream(latents))

    def decode_pixel_stream(self, latents: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Decode like `decode_stream`, before rounding: yields float32 ``[1, 3, f, H, W]`` in [-1, 1] on the device."""
        memory: Memory = {}
        size: tuple[int, int] | None = None
        num_done = 0
        for item in latents:
            check_latents(item, self.num_channels, size, num_done)
            size = (item.shape[-2], item.shape[-1])
            for latent in torch.split(item, 1, dim=2):
                yield self._decode(latent, memory, num_done)
                num_done += 1
            del item

    @torch.no_grad()
    def _decode(self, latent: Tensor, memory: Memory, index: int) -> Tensor:
        check_finite(latent, f"latent frame {index}")
        weight = next(self.network.parameters())
        mean, std = self._mean.to(weight.device), self._std.to(weight.device)
        scaled = latent.to(device=weight.device, dtype=torch.float32) * std + mean
        frames = self.network(scaled.to(weight.dtype).squeeze(2), memory)
        first = self.temporal_factor - 1 if index == 0 else 0
        kept = [frame for number, frame in enumerate(frames) if number >= first]
        check_result(kept[-1], weight.dtype, "latents", index)
        return torch.stack(kept, dim=2).float().mul_(2).sub_(1)


def read_light_weights(reference: str | Path, *, local_files_only: bool = False) -> dict[str, Tensor]:
    """Read a file of weights.

    Args:
        reference: a ``.safetensors`` or ``.pth`` file, or ``OWNER/NAME/FILE`` in a hub repository.
        local_files_only: never ask the network.

    Raises:
        CheckpointError: no such file, no network, a damaged file.
    """
    path = Path(reference)
    if not path.is_file():
        path = _hub_file(str(reference), Hub(local_files_only=local_files_only))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Tensors only: nothing that is loaded can run code of its own.
        weights = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): weight for name, weight in weights.items() if isinstance(weight, Tensor)}
    except (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        msg = f"cannot read the light decoder {path} ({reason}); the file is damaged or of another kind: get it again"
        raise CheckpointError(msg) from error


def _hub_file(reference: str, hub: Hub) -> Path:
    repository, _, name = reference.rpartition("/")
    if not is_hub_id(repository) or Path(reference).is_absolute():
        msg = f"there is no file {reference}; give a .safetensors file, or OWNER/NAME/FILE of a hub repository"
        raise CheckpointError(msg)
    file = hub.fetch(repository, None, [name]) / name
    if not file.is_file():
        msg = f"the hub repository {repository} has no file {name}; correct its name"
        raise CheckpointError(msg)
    return file


def decoder_from_weights(weights: Mapping[str, Tensor], *, dtype: torch.dtype) -> LightDecoderNetwork:
    """Build the network that fits a file's weights. The encoder that TAEHV's files hold as well is left out.

    Raises:
        CheckpointError: a weight is missing, has another shape, or has no place in the network.
    """
    given = {name: weight for name, weight in weights.items() if not name.startswith("encoder.")}
    layout = LightLayout.of(given)
    with torch.device("meta"):
        network = LightDecoderNetwork(layout)
    expected = network.state_dict()
    missing = expected.keys() - given.keys()
    unexpected = given.keys() - expected.keys()
    misshapen = {name for name in expected.keys() & given.keys() if given[name].shape != expected[name].shape}
    if missing or unexpected or misshapen:
        example = min(missing | unexpected | misshapen)
        msg = (
            f"{len(missing)} weights of the light decoder are missing, {len(unexpected)} have no place and "
            f"{len(misshapen)} have another shape, for instance {example}; get the file again"
        )
        raise CheckpointError(msg)
    network.load_state_dict({name: weight.to(dtype) for name, weight in given.items()}, assign=True)
    return network.eval().requires_grad_(False)


class _Block(nn.Module):
    """A residual block over a frame and, behind it in the channels, the frame before."""

    def __init__(self, width: int, *, wide: bool) -> None:
        super().__init__()
        self.width = width
        if wide:
            mixed = nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False)
            layers = [mixed, nn.Conv2d(2 * width, 4 * width, 1), nn.ReLU(), nn.Conv2d(4 * width, width, 1, bias=False)]
            self.end: nn.Module = nn.Identity()
        else:
            inner = (_convolution(2 * width, width), _convolution(width, width), _convolution(width, width))
            layers = [inner[0], nn.ReLU(), inner[1], nn.ReLU(), inner[2]]
            self.end = nn.ReLU()
        self.conv = nn.Sequential(*layers)

    def forward(self, both: Tensor) -> Tensor:
        result: Tensor = self.end(self.conv(both) + both[:, : self.width])
        return result


class _Grow(nn.Module):
    """One frame becomes several, enlarged to the nearest pixel.

    TAEHV enlarges first. A 1x1 convolution gives the same either way, and costs a quarter before.
    """

    def __init__(self, width: int, count: int, *, scale: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * count, 1, bias=False)
        self.count = count
        self.scale = scale

    def forward(self, frame: Tensor) -> Iterator[Tensor]:
        grown = self.conv(frame).chunk(self.count, dim=1)
        return (F.interpolate(each, scale_factor=self.scale) if self.scale > 1 else each for each in grown)


class _SoftLimit(nn.Module):
    """Bends latents into (-3, 3)."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / 3) * 3


def _convolution(inputs: int, outputs: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _plain_layers(layout: LightLayout) -> Iterator[nn.Module]:
    yield from (_SoftLimit(), _convolution(layout.num_channels, layout.widths[0]), nn.ReLU())
    for width, following, count in zip(layout.widths, layout.widths[1:], layout.frame_factors, strict=False):
        yield from (_Block(width, wide=False) for _ in range(BLOCKS_PER_STAGE))
        # The files count the enlargement, which has no weights, as a layer.
        yield from (nn.Identity(), _Grow(width, count, scale=2), _convolution(width, following, bias=False))
    yield from (nn.ReLU(), _convolution(layout.widths[-1], 3 * layout.patch_size**2))


def _wide_layers(layout: LightLayout) -> Iterator[nn.Module]:
    yield nn.Conv2d(layout.num_channels, layout.widths[0], 1, bias=False)
    for width, following, count in zip(layout.widths, layout.widths[1:], layout.frame_factors, strict=False):
        yield from (_Block(width, wide=True) for _ in range(BLOCKS_PER_STAGE))
        yield from (_convolution(width, 4 * following), nn.ReLU(), nn.PixelShuffle(2))
        yield _Grow(following, count, scale=1)
    yield _convolution(layout.widths[-1], 3 * layout.patch_size**2)
