"""The light decoder against plain convolutions over the whole clip, and what it makes of public files."""

from __future__ import annotations

import re
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.memory.live_bytes import LiveBytes
from swifti2v.wan.taehv import LightDecoder, LightDecoderNetwork, LightLayout, decoder_from_weights, read_light_weights

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = LightLayout(5, (8, 6, 4, 4), (1, 2, 2), 2)
WIDE = LightLayout(5, (8, 6, 4, 4), (1, 2, 2), 2, is_wide=True)
Weights = dict[str, Tensor]


def plain_names() -> set[str]:
    """Names in a public file, as TAEHV's own sequence of layers numbers them: 3, 6, 7, 8, 9, 12, ... have weights."""
    names = {f"{index}.{kind}" for index in (1, 22) for kind in ("weight", "bias")}
    for start in (3, 9, 15):
        for block in (start, start + 1, start + 2):
            names |= {f"{block}.conv.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
        names |= {f"{start + 4}.conv.weight", f"{start + 5}.weight"}
    return {f"decoder.{name}" for name in names}


def wide_names() -> set[str]:
    names = {"0.weight", "22.weight", "22.bias"}
    for start in (1, 8, 15):
        for block in (start, start + 1, start + 2):
            names |= {f"{block}.conv.{rest}" for rest in ("0.weight", "1.weight", "1.bias", "3.weight")}
        names |= {f"{start + 3}.weight", f"{start + 3}.bias", f"{start + 6}.conv.weight"}
    return {f"decoder.{name}" for name in names}


def random_weights(layout: LightLayout, seed: int = 0) -> Weights:
    """Weights of that layout: large enough that every layer shows in the pixels, which are not all cut at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LightDecoderNetwork(layout).state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        fan = shape[1:].numel() if len(shape) > 1 else 1
        weights[name] = torch.randn(shape, generator=generator) * (fan**-0.5 if fan > 1 else 0.2)
    weights["decoder.22.weight"] *= 0.1
    weights["decoder.22.bias"] = torch.full_like(weights["decoder.22.bias"], 0.5)
    return weights


def with_the_frame_before(frames: Tensor) -> Tensor:
    return torch.cat([frames, torch.cat([torch.zeros_like(frames[:1]), frames[:-1]])], dim=1)


def plain_reference(weights: Weights, latents: Tensor) -> Tensor:
    """Every frame of a clip at once, ``[T, C, h, w]`` to ``[4T, 12, H, W]``, in the order of TAEHV's layers."""

    def convolved(frames: Tensor, name: str) -> Tensor:
        kernel = weights[f"decoder.{name}.weight"]
        return F.conv2d(frames, kernel, weights.get(f"decoder.{name}.bias"), padding=kernel.shape[-1] // 2)

    frames = convolved(3 * torch.tanh(latents / 3), "1").relu()
    for start in (3, 9, 15):
        for block in (start, start + 1, start + 2):
            inner = convolved(with_the_frame_before(frames), f"{block}.conv.0").relu()
            inner = convolved(inner, f"{block}.conv.2").relu()
            frames = (convolved(inner, f"{block}.conv.4") + frames).relu()
        frames = frames.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        width = frames.shape[1]
        frames = convolved(frames, f"{start + 4}.conv")
        frames = convolved(frames.reshape(-1, width, *frames.shape[2:]), f"{start + 5}")
    return convolved(frames.relu(), "22")


def wide_reference(weights: Weights, latents: Tensor) -> Tensor:
    """The same for the ``_super`` files: depthwise 7x7, then twice a 1x1, and pixels dealt out instead of repeated."""
    frames = F.conv2d(latents, weights["decoder.0.weight"])
    for start in (1, 8, 15):
        for block in (start, start + 1, start + 2):
            first, second, bias, third = (
                weights[f"decoder.{block}.conv.{name}"] for name in ("0.weight", "1.weight", "1.bias", "3.weight")
            )
            inner = F.conv2d(with_the_frame_before(frames), first, padding=3, groups=len(first))
            frames = F.conv2d(F.conv2d(inner, second, bias).relu(), third) + frames
        kernel, bias = weights[f"decoder.{start + 3}.weight"], weights[f"decoder.{start + 3}.bias"]
        frames = dealt_out(F.conv2d(frames, kernel, bias, padding=1).relu())
        width = frames.shape[1]
        grown = F.conv2d(frames, weights[f"decoder.{start + 6}.conv.weight"])
        frames = grown.reshape(-1, width, *grown.shape[2:])
    return F.conv2d(frames, weights["decoder.22.weight"], weights["decoder.22.bias"], padding=1)


def dealt_out(frames: Tensor) -> Tensor:
    """Every four channels become the pixels of 2x2 places, in reading order."""
    result = torch.empty(len(frames), frames.shape[1] // 4, 2 * frames.shape[2], 2 * frames.shape[3])
    for row in range(2):
        for column in range(2):
            result[:, :, row::2, column::2] = frames[:, 2 * row + column :: 4]
    return result


@pytest.mark.parametrize("layout", [PLAIN, WIDE], ids=["plain", "wide"])
def test_a_stream_is_the_whole_clip_by_plain_convolutions(layout: LightLayout) -> None:
    weights = random_weights(layout)
    latents = torch.randn(1, 5, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    reference = wide_reference if layout.is_wide else plain_reference
    raw = dealt_out(reference(weights, latents[0].transpose(0, 1)))
    expected = raw.clamp(0, 1)[3:]  # 4 x 4 frames, of which the first three are dropped
    assert float(((raw > 0) & (raw < 1)).float().mean()) > 0.5
    decoder = LightDecoder(decoder_from_weights(weights, dtype=torch.float32))
    assert (decoder.num_channels, decoder.spatial_factor, decoder.temporal_factor) == (5, 16, 4)
    pieces = list(decoder.decode_pixel_stream(latents.split([1, 2, 1], dim=2)))
    assert [piece.shape for piece in pieces] == [(1, 3, 1, 32, 48)] + [(1, 3, 4, 32, 48)] * 3
    actual = torch.cat(pieces, dim=2)[0].transpose(0, 1)
    torch.testing.assert_close((actual + 1) / 2, expected, rtol=1e-5, atol=1e-5)
    levels = torch.cat(list(decoder.decode_stream([latents])))
    assert levels.dtype == torch.uint8
    assert levels.shape == (13, 32, 48, 3)
    assert (levels.permute(0, 3, 1, 2) - 255 * expected).abs().max() <= 0.5 + 1e-2


def test_names_are_those_of_the_public_files() -> None:
    for layout, names, num_parameters in (
        # 64 of 128 tensors, 9.8 of the 11.3 million of taew2_1: the rest is the encoder.
        (LightLayout(16), plain_names(), 9_844_611),
        (LightLayout(48, (512, 256, 128, 64), patch_size=2, is_wide=True), wide_names(), 18_993_420),
    ):
        with torch.device("meta"):
            weights = LightDecoderNetwork(layout).state_dict()
        assert weights.keys() == names
        assert sum(weight.numel() for weight in weights.values()) == num_parameters
        assert LightLayout.of(weights) == layout
    assert len(plain_names()) == 64


def test_every_weight_is_used_and_none_is_made_up() -> None:
    weights = random_weights(PLAIN)
    with_encoder = weights | {"encoder.0.weight": torch.zeros(1)}
    assert decoder_from_weights(with_encoder, dtype=torch.bfloat16).decoder[1].weight.dtype == torch.bfloat16
    for name in sorted(weights):
        rest = {other: weight for other, weight in weights.items() if other != name}
        with pytest.raises(CheckpointError, match=re.escape(name)):
            decoder_from_weights(rest, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"1 have no place .*decoder\.2\.weight"):
        decoder_from_weights(weights | {"decoder.2.weight": torch.zeros(1)}, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"1 have another shape.*decoder\.9\.conv\.0\.bias"):
        decoder_from_weights(weights | {"decoder.9.conv.0.bias": torch.zeros(7)}, dtype=torch.float32)


def test_two_streams_do_not_mix_and_latents_are_checked() -> None:
    decoder = LightDecoder(decoder_from_weights(random_weights(PLAIN), dtype=torch.float32))
    one, other = (torch.randn(1, 5, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    alone = [torch.cat(list(decoder.decode_stream([latents]))) for latents in (one, other)]
    streams = [decoder.decode_stream(latents.split(1, dim=2)) for latents in (one, other)]
    turns = list(zip(*streams, strict=True))
    for index, expected in enumerate(alone):
        assert torch.equal(torch.cat([turn[index] for turn in turns]), expected)
    with pytest.raises(InvalidInputError, match=r"give normalized floats \[1, 5, frames"):
        list(decoder.decode_stream([torch.zeros(1, 4, 1, 2, 2)]))
    with pytest.raises(InvalidInputError, match="latent frame 1 is 3x2 but the stream began with 2x2"):
        list(decoder.decode_stream([torch.zeros(1, 5, 1, 2, 2), torch.zeros(1, 5, 1, 2, 3)]))
    with pytest.raises(InvalidInputError, match="latent frame 0 holds NaN"):
        list(decoder.decode_stream([torch.full((1, 5, 1, 2, 2), torch.nan)]))


def test_the_floats_of_a_chunk_are_gone_when_its_frames_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = LightDecoder(decoder_from_weights(random_weights(PLAIN), dtype=torch.float32))
    made: list[weakref.ref[torch.Tensor]] = []
    decode = decoder._decode

    def noted(*arguments: Any) -> torch.Tensor:
        chunk = decode(*arguments)
        assert not any(other() is not None for other in made)  # nor is the one before held while the next is made
        made.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(decoder, "_decode", noted)
    for frames in decoder.decode_stream([torch.zeros(1, 5, 3, 2, 2)]):
        assert frames.dtype == torch.uint8
        assert made[-1]() is None
    assert len(made) == 3


def test_statistics_undo_the_normalization() -> None:
    network = decoder_from_weights(random_weights(PLAIN), dtype=torch.float32)
    latents = torch.randn(1, 5, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = [0.5, -1.0, 0.0, 2.0, 0.1], [1.0, 0.5, 2.0, 1.5, 0.8]
    raw = latents * torch.tensor(std).view(1, 5, 1, 1, 1) + torch.tensor(mean).view(1, 5, 1, 1, 1)
    scaled = torch.cat(list(LightDecoder(network, mean=mean, std=std).decode_stream([latents])))
    assert torch.equal(scaled, torch.cat(list(LightDecoder(network).decode_stream([raw]))))
    assert not torch.equal(scaled, torch.cat(list(LightDecoder(network).decode_stream([latents]))))


@pytest.mark.parametrize(
    "layout",
    [LightLayout(48, patch_size=2), LightLayout(48, (512, 256, 128, 64), (1, 2, 2), 2, True)],
    ids=["plain", "wide"],
)
def test_memory_and_work_of_a_frame_at_full_size_do_not_grow(layout: LightLayout) -> None:
    with torch.device("meta"):
        decoder = LightDecoder(LightDecoderNetwork(layout).bfloat16())
    latents = (torch.empty(1, 48, 1, 88, 160, device="meta") for _ in range(4))
    peaks, flops = [], []
    with FlopCounterMode(display=False) as counter, LiveBytes() as live:
        for frames in decoder.decode_pixel_stream(latents):
            del frames
            peaks.append(live.peak_bytes)
            flops.append(counter.get_total_flops())
    assert peaks[1] == peaks[3]
    assert peaks[3] < 1.5 * 2**30
    assert flops[3] == 4 * flops[0] > 0


def test_files(tmp_path: Path) -> None:
    weights = {name: weight.half() for name, weight in random_weights(PLAIN).items()}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        found = read_light_weights(tmp_path / name)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    (tmp_path / "text.pth").write_text("not a file of weights")
    for name in ("cut.safetensors", "text.pth"):
        with pytest.raises(CheckpointError, match=f"cannot read the light decoder .*{name}"):
            read_light_weights(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"give a \.safetensors file, or OWNER/NAME/FILE"):
        read_light_weights(tmp_path / "none.safetensors")


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(random_weights(PLAIN), tmp_path / "light.safetensors")
    asked = []

    def download(repository: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append((repository, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_light_weights("owner/name/light.safetensors").keys() == random_weights(PLAIN).keys()
    with pytest.raises(CheckpointError, match=r"owner/name has no file heavy\.safetensors"):
        read_light_weights("owner/name/heavy.safetensors")
    assert asked == [("owner/name", ["light.safetensors"]), ("owner/name", ["heavy.safetensors"])]
