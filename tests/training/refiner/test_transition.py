"""Stage-transition: what Stage I redraws lies between the clip and a video of its own; the encoder keeps the truth."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.pixels import from_uint8
from swifti2v.runner.loading import load_parts
from swifti2v.sampling.schedules import FEW_STEP_SIGMAS
from swifti2v.training.refiner.encoding import (
    EncodingOptions,
    EncodingParts,
    StageTwoEncoder,
    load_encoding_parts,
    resized,
)
from swifti2v.training.refiner.transition import TransitionOptions, light_schedule, lightly_denoised


@dataclass(frozen=True)
class Clip:
    name: str
    prompt: str
    frames: np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path) -> EncodingParts:
    return load_encoding_parts(tiny_checkpoint, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def clip() -> Clip:
    """Blobs that slide by two pixels a frame, uint8 [9,128,128,3]: 32x32 for Stage I."""
    coarse = np.random.default_rng(0).integers(0, 255, (10, 12, 3), dtype=np.uint8)
    wide = cv2.resize(coarse, (160, 128), interpolation=cv2.INTER_CUBIC)
    return Clip("blobs", "a red ball", np.stack([wide[:, 2 * t : 2 * t + 128] for t in range(9)]))


@pytest.fixture(scope="module")
def reduced(clip: Clip, parts: EncodingParts) -> torch.Tensor:
    return torch.from_numpy(resized(clip.frames, parts.motion_size(Size(128, 128))))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).square().mean())


@given(st.floats(1e-3, 1.0))
def test_light_schedule_is_the_end_of_the_few_step_schedule(sigma: float) -> None:
    schedule = light_schedule(sigma)
    assert schedule[0] == sigma
    assert all(later < earlier for earlier, later in pairwise(schedule))
    assert list(schedule[1:]) == [level for level in FEW_STEP_SIGMAS if level < sigma - 1e-6]


def test_schedule_from_one_is_that_of_inference() -> None:
    assert light_schedule(1.0) == FEW_STEP_SIGMAS


@given(st.integers(0, 2**31))
def test_levels_lie_in_the_range(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert TransitionOptions(0.6, 0.9).draw(generator) in (0.625, 5 / 6)
    assert 0.2 <= TransitionOptions(0.2, 0.3, on_schedule=False).draw(generator) <= 0.3


@pytest.mark.parametrize(
    "options",
    [
        {"sigma_low": 0.0},
        {"sigma_high": 1.0},
        {"sigma_low": 0.8, "sigma_high": 0.7},
        {"sigma_low": 0.1, "sigma_high": 0.2},
        {"num_variants": 0},
    ],
)
def test_ranges_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"give low|widen|between|at least 1"):
        TransitionOptions(**options)


def test_more_noise_leads_further_from_the_clip(parts: EncodingParts, reduced: torch.Tensor) -> None:
    embeds = parts.stage_one.encode_prompt("a red ball")
    vae = parts.stage_one.pipeline.vae
    with torch.no_grad():
        coded = vae.decode(vae.encode(from_uint8(reduced)).latent_dist.mode()).sample
    coded = ((coded[0].permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round()
    near, middle, far = (
        lightly_denoised(parts.stage_one, reduced, embeds, sigma=sigma, seed=3) for sigma in (0.001, 0.3, 0.95)
    )
    assert near.shape == reduced.shape
    assert near.dtype == torch.uint8
    # With hardly any noise only the codec remains, which random weights make far from transparent.
    assert distance(near, coded) < distance(middle, coded) < distance(far, coded)
    assert distance(near, coded) < 0.1 * distance(far, coded)


def test_the_same_seed_gives_the_same_clip(parts: EncodingParts, reduced: torch.Tensor) -> None:
    embeds = parts.stage_one.encode_prompt("a red ball")
    one, same, other = (lightly_denoised(parts.stage_one, reduced, embeds, sigma=0.9, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_stage_one_is_given_back_as_it_was(parts: EncodingParts, reduced: torch.Tensor) -> None:
    before = parts.stage_one.pipeline.scheduler
    lightly_denoised(parts.stage_one, reduced, parts.stage_one.encode_prompt(""), sigma=0.7, seed=0)
    assert parts.stage_one.pipeline.scheduler is before


def test_clip_longer_than_a_window_is_refused(parts: EncodingParts) -> None:
    frames = torch.zeros(13, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(InvalidInputError, match=r"longer than Stage I's 9; cut it"):
        lightly_denoised(parts.stage_one, frames, parts.stage_one.encode_prompt(""), sigma=0.7, seed=0)


def test_encoder_gives_truth_and_every_reference(parts: EncodingParts, clip: Clip) -> None:
    options = EncodingOptions(TransitionOptions(num_variants=2), unchanged=True)
    tensors = StageTwoEncoder(parts, options)(clip)
    assert sorted(tensors) == ["latents", "prompt_embeds", *(f"reference.{n}" for n in range(6))]
    assert {tuple(tensors[f"reference.{n}"].shape) for n in range(6)} == {(48, 3, 8, 8)}
    vae = parts.codec.vae
    with torch.no_grad():
        whole = vae.encode(from_uint8(clip.frames)).latent_dist.mode()[0]
    assert torch.allclose(tensors["latents"].float(), whole, atol=5e-3)
    for number in range(6):
        # The codec is causal and frame 0 of every reference is the image, so latent frame 0 is the truth's.
        assert torch.allclose(tensors[f"reference.{number}"][:, 0], tensors["latents"][:, 0], atol=5e-3)
        assert not torch.allclose(tensors[f"reference.{number}"][:, 1:], tensors["latents"][:, 1:], atol=5e-3)


def test_references_depend_on_the_clip_and_not_on_the_order(parts: EncodingParts, clip: Clip) -> None:
    encoder = StageTwoEncoder(parts, EncodingOptions(TransitionOptions(num_variants=1), modes=("replace",)))
    first, again = encoder(clip), encoder(clip)
    other = encoder(Clip("other", clip.prompt, clip.frames))
    assert torch.equal(first["reference.0"], again["reference.0"])
    assert not torch.equal(first["reference.0"], other["reference.0"])


def test_without_transition_the_reference_is_the_reduced_clip(
    parts: EncodingParts, clip: Clip, reduced: torch.Tensor
) -> None:
    encoder = StageTwoEncoder(parts, EncodingOptions(transition=None, unchanged=True))
    (only,) = encoder.motion_references(clip, parts.stage_one.encode_prompt(clip.prompt))
    assert torch.equal(only, reduced)


def test_nothing_is_loaded_that_is_not_used(tiny_checkpoint: Path, clip: Clip, tmp_path: Path) -> None:
    """Without the weights of Stage II's transformer, and with the size of motion that inference has."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    for weights in (folder / "stage_two" / "transformer").glob("*.safetensors"):
        weights.unlink()
    parts = load_encoding_parts(folder, device=torch.device("cpu"))
    encoder = StageTwoEncoder(parts, EncodingOptions(transition=None, unchanged=True, modes=("replace",)))
    assert sorted(encoder(clip)) == ["latents", "prompt_embeds", "reference.0"]
    whole = load_parts(tiny_checkpoint, device="cpu")
    for size in (Size(128, 128), Size(256, 128)):
        assert parts.motion_size(size) == whole.motion_size(size)
    assert parts.geometry == whole.stage_two.geometry
