"""Training of Stage I: examples are what their prompts say, and an interrupted run goes on as if it had not been."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from swifti2v.mini.motion_examples import UNASKED_SPEED, draw_prompt
from swifti2v.mini.prompt_notes import motions_of
from swifti2v.mini.recipes import StageOneRun, train_stage_one
from swifti2v.mini.train_stage_one import Phase, StageOneRecipe
from swifti2v.training.engine.loop import LoopOptions

if TYPE_CHECKING:
    from pathlib import Path

RECIPE = StageOneRecipe(
    width=32, num_layers=1, num_heads=2, text_width=16, text_layers=1, vocabulary_size=300, num_views=3,
    phases=(Phase(0.0, 4, 6), Phase(0.5, 2, 300)), num_steps=4,
)  # fmt: skip


@pytest.fixture
def index(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.png"), noise)
    file = tmp_path / "INDEX.csv"
    file.write_text("file,kind,width,caption,licence_tier,licence\nphoto.png,photo,200,Noise.,A,CC0\n")
    return file


def test_prompts_name_their_motions_and_no_others() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        motions, prompt = draw_prompt("", rng)
        asked = sorted({name.split()[0] for name, _speed in motions})
        if motions == [("zoom in", UNASKED_SPEED)]:
            asked = []
        assert sorted(motion.name for motion in motions_of(prompt)) == asked, prompt


def test_an_interrupted_run_goes_on_with_the_same_losses(index: Path, tmp_path: Path) -> None:
    loop = LoopOptions(num_steps=4, warmup_steps=1, checkpoint_every=2, log_every=1, bfloat16=False)
    train_stage_one(StageOneRun(loop, RECIPE), index=index, output=tmp_path / "whole")
    train_stage_one(StageOneRun(replace(loop, max_seconds=0.0), RECIPE), index=index, output=tmp_path / "parts")
    train_stage_one(StageOneRun(loop, RECIPE), index=index, output=tmp_path / "parts")
    whole, parts = (
        [json.loads(line)["loss"] for line in (tmp_path / run / "stage_one" / "log.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    )
    assert whole == parts
    assert len(whole) == 4
