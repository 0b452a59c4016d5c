"""Another decoder than the codec's changes how latents become frames, and nothing before that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.runner.acceleration import Acceleration
from swifti2v.runner.decoders import Undecoded, open_light_decoder
from swifti2v.runner.fitting import networks_of, place, plan_for
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.streaming import WanStreamingCodec
from swifti2v.wan.taehv import LightDecoder
from tests.runner.light_weights import write_light_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

SHORT = {"num_frames": 9, "num_inference_steps": 1, "stage_one_steps": 1, "segment_size": 1}
CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKLWan",
    "z_dim": 48,
    "latents_mean": [0.25] * 48,
    "latents_std": [2.0] * 48,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
}


class Watched:
    """A decoder that keeps the latents it was given."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.latents: list[Tensor] = []

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        yield from self.decoder.decode_stream(self._kept(latents))

    def _kept(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        for item in latents:
            self.latents.append(item.clone())
            yield item


def made(checkpoint: Path, **changes: Any) -> tuple[Tensor, Any, list[Tensor]]:
    """Frames of a short run, its decoder, and the latents that came to it."""
    parts = load_parts(checkpoint, device="cpu", acceleration=Acceleration(attention="native", **changes))
    watched = Watched(parts.decoder or parts.stage_two.codec)
    object.__setattr__(parts, "decoder", watched)
    image = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))
    frames = TwoStagePipeline(parts)(image, "a wave", **SHORT).frames
    return frames, watched.decoder, watched.latents


def test_a_light_decoder_reads_the_latents_of_the_exact_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = write_light_weights(tmp_path / "light.safetensors")
    exact, codec, latents = made(tiny_checkpoint)
    light, decoder, same = made(tiny_checkpoint, decoder="light", decoder_weights=str(weights))
    assert isinstance(codec, WanStreamingCodec)
    assert isinstance(decoder, LightDecoder)
    assert torch.equal(torch.cat(latents, dim=2), torch.cat(same, dim=2))
    assert exact.shape == light.shape == (9, 64, 64, 3)
    assert not torch.equal(exact, light)
    assert torch.equal(light, torch.cat(list(decoder.decode_stream(same))))


def test_the_exact_decoder_elsewhere_has_weights_of_its_own_and_makes_the_same_frames(tiny_checkpoint: Path) -> None:
    here, codec, _ = made(tiny_checkpoint)
    there, decoder, _ = made(tiny_checkpoint, decode_device="cpu")
    assert torch.equal(here, there)
    parts = load_parts(tiny_checkpoint, device="cpu", acceleration=Acceleration("native", decode_device="cpu"))
    own, shared = (next(each.vae.parameters()) for each in (parts.decoder, parts.stage_two.codec))
    assert torch.equal(own, shared)
    assert own.data_ptr() != shared.data_ptr()
    assert isinstance(decoder, WanStreamingCodec)
    assert decoder is not codec


def test_a_plan_cuts_the_frames_of_a_decoder_elsewhere_too(tiny_checkpoint: Path) -> None:
    parts = load_parts(
        tiny_checkpoint,
        device="cpu",
        memory=MemoryLimits(),
        acceleration=Acceleration("native", decode_device="cpu"),
    )
    settings = parts.defaults.settled({"size": Size(288, 224), "num_frames": 9, "segment_size": 1})
    plan = plan_for(parts, settings, MemoryLimits())
    while plan.codec.columns * plan.codec.rows == 1:
        plan = plan_for(parts, settings, MemoryLimits(plan.peak_bytes - 1))
    networks = PlacedNetworks(parts.device)
    placed = place(parts, plan, networks)
    networks.release()
    assert isinstance(placed.decoder, WanStreamingCodec)
    assert placed.decoder.tiling is not None
    assert placed.decoder.tiling == placed.stage_two.codec.tiling
    assert placed.decoder.vae is parts.decoder.vae
    assert placed.overlap == "decode"


def test_the_plan_of_loaded_parts_knows_the_light_decoder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    weights = write_light_weights(tmp_path / "light.safetensors")
    parts = load_parts(
        tiny_checkpoint,
        device="cpu",
        acceleration=Acceleration("native", decoder="light", decoder_weights=str(weights)),
    )
    decoder = networks_of(parts).light_decoder
    assert decoder is not None
    assert decoder.config["widths"] == [8, 8, 4, 4]
    assert decoder.class_name == "LightDecoderNetwork"


def test_latents_that_are_not_normalized_are_for_the_files_of_that_name(tmp_path: Path) -> None:
    latents = torch.randn(1, 48, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    normalized, raw = (
        open_light_decoder(CONFIG, write_light_weights(tmp_path / name), device=CPU, dtype=torch.float32)
        for name in ("taew2_2.safetensors", "lighttaew2_2.safetensors")
    )
    expected = torch.cat(list(normalized.decode_stream([latents * 2 + 0.25])))
    assert torch.equal(torch.cat(list(raw.decode_stream([latents]))), expected)


def test_what_cannot_be_is_refused_before_networks_are_loaded(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("swifti2v.runner.loading.load_stage_two_transformer", never)
    other = write_light_weights(tmp_path / "other.safetensors", num_channels=16, patch_size=1)
    cases: tuple[tuple[Any, Acceleration, type[Exception], str], ...] = (
        (
            "mini",
            Acceleration("native", decoder="light"),
            InvalidInputError,
            "a BlockTransformCodec; use decoder exact",
        ),
        (
            tiny_checkpoint,
            Acceleration("native", decoder="light", decoder_weights=str(other)),
            InvalidInputError,
            "for latents of 16 channels, 8 pixels and 4 frames a cell, those of this checkpoint have 48, 16 and 4",
        ),
        (
            tiny_checkpoint,
            Acceleration("native", decoder="light", decoder_weights="nowhere.safetensors"),
            CheckpointError,
            "there is no file nowhere.safetensors",
        ),
        (
            tiny_checkpoint,
            Acceleration("native", decoder="light", decode_device="cuda:99"),
            InvalidInputError,
            "device 'cuda:99' cannot be used",
        ),
    )
    for checkpoint, acceleration, error, words in cases:
        with pytest.raises(error, match=words):
            load_parts(checkpoint, device="cpu", acceleration=acceleration)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(InvalidInputError, match="decoder 'tiny' is not known; use exact or light"):
        Acceleration(decoder="tiny")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="use decoder light"):
        Acceleration(decoder_weights="taew2_2.safetensors")


def test_mini_cannot_decode_elsewhere() -> None:
    with pytest.raises(InvalidInputError, match="leave the device of the decoder out"):
        load_parts("mini", device="cpu", acceleration=Acceleration("native", decode_device="cpu"))


def test_undecoded_reads_everything() -> None:
    left = [torch.zeros(1), torch.ones(1)]
    assert list(Undecoded().decode_stream(left.pop() for _ in range(2))) == []
    assert left == []
