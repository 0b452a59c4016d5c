"""Stage I's objective: small motions count as much as large ones, and a batch follows from its step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from swifti2v.geometry import Size
from swifti2v.mini.motion_codec import MOTION_CHANNELS
from swifti2v.mini.text import make_text_encoder, train_tokenizer
from swifti2v.mini.train_stage_one import (
    ClipShape,
    StageOneObjective,
    StageOneRecipe,
    fit_motion_codec,
    make_motion_transformer,
)

RECIPE = StageOneRecipe(width=128, num_layers=1, ffn_width=32, shapes=(ClipShape(3, 48, 32, 2, 1.0),))


@pytest.fixture(scope="module")
def objective() -> StageOneObjective:
    rng = np.random.default_rng(0)
    photographs = [rng.integers(0, 255, (240, 400, 3), dtype=np.uint8) for _ in range(2)]
    codec = fit_motion_codec(photographs, size=Size(160, 96))
    tokenizer = train_tokenizer(["pan left quickly", "a lake"] * 20, vocabulary_size=300)
    return StageOneObjective(
        RECIPE,
        codec=codec,
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(vocabulary_size=len(tokenizer), width=RECIPE.text_width, seed=0),
        transformer=make_motion_transformer(RECIPE, codec),
        photographs=photographs,
        captions=["a lake", "a hill"],
    )


def latents(scale: float) -> torch.Tensor:
    """Motion of a given size that neither the place nor the frame changes, and no residual."""
    clean = torch.zeros(2, 64, 3, 4, 6)
    clean[:, :MOTION_CHANNELS] = scale
    return clean


@pytest.mark.parametrize("scale", [3.0, 1.0, 0.2])
def test_an_error_counts_by_its_share_of_the_motion(objective: StageOneObjective, scale: float) -> None:
    """Half of a pan missed and half of a sway missed weigh the same: a quarter of the energy."""
    _, numbers = objective._compare(0.5 * latents(scale), latents(scale))
    assert numbers["motion"] == pytest.approx(0.25, rel=0.03)
    assert numbers["roughness"] == pytest.approx(0.0, abs=1e-6)


def test_what_should_stand_still_counts_by_the_floor(objective: StageOneObjective) -> None:
    _, numbers = objective._compare(latents(0.01), latents(0.0))
    assert numbers["motion"] == pytest.approx(0.01**2 / RECIPE.energy_floor, rel=1e-3)


def test_roughness_sees_what_differs_between_neighbours(objective: StageOneObjective) -> None:
    clean = latents(1.0)
    rough = clean.clone()
    rough[:, :MOTION_CHANNELS, :, ::2] += 0.1
    smooth = clean.clone()
    smooth[:, :MOTION_CHANNELS] += 0.0707  # the same mean square
    (loss, numbers), (even, even_numbers) = (objective._compare(each, clean) for each in (rough, smooth))
    assert numbers["motion"] == pytest.approx(even_numbers["motion"], rel=0.01)
    assert loss > even


def test_loss_follows_from_the_step(objective: StageOneObjective) -> None:
    first, again = (float(objective.loss(3)[0].detach()) for _ in range(2))
    other = float(objective.loss(4)[0].detach())
    assert first == again
    assert first != other
