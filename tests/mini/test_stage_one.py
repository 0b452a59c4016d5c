"""Stage I of `mini` from end to end, with a network of random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.mini.motion_examples import path_of
from swifti2v.mini.network import MotionNetwork
from swifti2v.mini.render import render_path
from swifti2v.mini.stage_one import PathStageOne
from swifti2v.mini.text import make_text_encoder, train_tokenizer
from swifti2v.settings import GenerationSettings
from swifti2v.wan.checkpoints import resolve

if TYPE_CHECKING:
    from pathlib import Path

SIZE = Size(64, 48)


@pytest.fixture(scope="module")
def image() -> PIL.Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((256, 192), PIL.Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def stage() -> PathStageOne:
    tokenizer = train_tokenizer(["the camera pans left", "zoom in slowly"], vocabulary_size=300)
    encoder = make_text_encoder(vocabulary_size=len(tokenizer), width=16, num_layers=1)
    torch.manual_seed(0)
    network = MotionNetwork(width=32, num_layers=1, num_heads=2, text_width=16)
    return PathStageOne(network, encoder, tokenizer, max_sequence_length=12)


SETTINGS = GenerationSettings(num_frames=9, seed=3, stage_one_steps=4, stage_one_guidance_scale=1.0)


def made(stage: PathStageOne, image: PIL.Image.Image, **options: object) -> list[torch.Tensor]:
    return list(stage.generate(image, "the camera pans left", SETTINGS, size=SIZE, **options))


def test_pieces_are_frame_0_and_then_latent_frames(stage: PathStageOne, image: PIL.Image.Image) -> None:
    pieces = made(stage, image)
    assert [len(piece) for piece in pieces] == [1, 4, 4]
    assert all(piece.dtype == torch.uint8 and piece.shape[1:] == (48, 64, 3) for piece in pieces)


def test_frame_0_is_the_picture(stage: PathStageOne, image: PIL.Image.Image) -> None:
    first = made(stage, image)[0][0].numpy().astype(int)
    expected = np.asarray(image.resize(tuple(SIZE), PIL.Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(first - expected).mean() < 1.5


def test_a_result_repeats_and_survives_saving(stage: PathStageOne, image: PIL.Image.Image, tmp_path: Path) -> None:
    stage.save_pretrained(tmp_path, dtype=torch.float32)
    again = PathStageOne.from_pretrained(tmp_path)
    first, repeated, loaded = (torch.cat(made(each, image)).int() for each in (stage, stage, again))
    assert torch.equal(first, repeated)
    # Weights of a file are aligned otherwise in memory, so that a sum may be rounded otherwise.
    assert int((first - loaded).abs().max()) <= 1


def test_progress_is_told_and_can_stop_the_work(stage: PathStageOne, image: PIL.Image.Image) -> None:
    told: list[tuple[int, int]] = []
    made(stage, image, on_step=lambda step, total: told.append((step, total)))
    assert told == [(0, 3), (1, 3), (2, 3)]

    def stop(_step: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(stage, image, on_step=stop)


def test_what_cannot_be_used_is_refused_at_the_call(stage: PathStageOne, image: PIL.Image.Image) -> None:
    with pytest.raises(InvalidInputError):
        stage.generate(image, "pan left", SETTINGS, size=Size(60, 48))
    with pytest.raises(InvalidInputError):
        stage.generate(image.convert("L"), "pan left", SETTINGS, size=SIZE)
    guided = replace(SETTINGS, stage_one_guidance_scale=3.5)
    with pytest.raises(InvalidInputError) as refusal:
        stage.generate(image, "pan left", guided, size=SIZE)
    assert (refusal.value.param, refusal.value.value) == ("stage_one_guidance_scale", 3.5)


def test_what_has_no_effect_is_said(stage: PathStageOne) -> None:
    notes = stage.notes_of("zoom in while petals fall and many more words than this encoder reads", "blurry")
    assert any("petals fall" in note for note in notes)
    assert any("was cut" in note for note in notes)
    assert any("negative prompt" in note for note in notes)


def test_embeddings_of_any_prompt_have_one_length(stage: PathStageOne) -> None:
    embeds = stage.encode_prompt("zoom in", "blurry and dark")
    assert embeds.prompt.shape == embeds.negative.shape == (1, 12, 16)


def test_a_motion_that_would_leave_the_picture_is_slowed_and_said(image: PIL.Image.Image) -> None:
    """Of the weights that are shipped: a quick pan of 401 frames would be two widths."""
    mini = PathStageOne.from_pretrained(resolve("mini", parts=("stage_one",)).folder_of("stage_one"))
    long = replace(SETTINGS, num_frames=401)
    (note,) = mini.motion_notes(image, "the camera pans quickly to the right", long, size=Size(256, 192))
    assert "slowed" in note


def test_an_exact_path_moves_the_picture_by_what_it_says(image: PIL.Image.Image) -> None:
    path = path_of([("pan right", 1.0)], rows=20, columns=28, aspect=48 / 64, horizon=0.0)
    frames = torch.cat(list(render_path(path, image, size=SIZE, num_frames=41))).numpy()
    # 0.2 widths in 80 frames: 6.4 pixels at frame 40
    still = np.asarray(image.resize(tuple(SIZE), PIL.Image.Resampling.LANCZOS)).astype(float)
    shifted = frames[40].astype(float)[:, :-7]
    errors = [np.abs(shifted - still[:, by : by + shifted.shape[1]]).mean() for by in range(8)]
    assert int(np.argmin(errors)) == 6
