"""The recipes of `mini` from end to end, at a size where a run takes seconds: train, export, load, generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import ConfigurationError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.mini.network import MotionNetwork
from swifti2v.mini.recipes import (
    SourceOptions,
    StageOneRun,
    StageTwoRun,
    export_mini,
    train_stage_one,
    train_stage_two,
)
from swifti2v.mini.reference_pairs import PairOptions
from swifti2v.mini.train_stage_one import Phase, StageOneRecipe
from swifti2v.mini.train_stage_two import StageTwoRecipe
from swifti2v.runner.loading import settings_of
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

LOOP = LoopOptions(num_steps=2, warmup_steps=1, checkpoint_every=2, log_every=1, bfloat16=False)
SOURCES = SourceOptions(photograph_width=480)
STAGE_ONE = StageOneRun(
    LOOP,
    StageOneRecipe(
        width=32,
        num_layers=1,
        num_heads=2,
        text_width=16,
        text_layers=1,
        vocabulary_size=300,
        phases=(Phase(0.0, 4, 6),),
        num_views=2,
        num_steps=2,
    ),
    SOURCES,
)
STAGE_TWO = StageTwoRun(
    LOOP,
    StageTwoRecipe(num_channels=96, width=128, num_layers=1, ffn_width=64, local_detail_width=16, crops=((8, 8),)),
    SOURCES,
    PairOptions(num_frames=9, procedural_per_photograph=1, procedural_width=96, procedural_height=64),
)


def photograph(seed: int) -> np.ndarray:
    """Smooth blobs with edges, uint8 [320,480,3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (10, 15, 3), dtype=np.uint8)
    return cv2.resize(coarse, (480, 320), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs and a clip of 20 frames that slides over one of them."""
    folder = tmp_path_factory.mktemp("data")
    for seed in (0, 1):
        cv2.imwrite(str(folder / f"photo_{seed}.png"), photograph(seed))
    wide = photograph(2)
    with VideoWriter(folder / "clip.mp4", size=Size(96, 64), fps=8) as writer:
        writer.write(np.stack([wide[40:104, 40 + 3 * t : 136 + 3 * t] for t in range(20)]))
    lines = ["file,kind,width,caption,licence_tier,licence"]
    lines += [f"photo_{seed}.png,photo,480,a lake,A,CC0" for seed in (0, 1)]
    lines += ["clip.mp4,clip,96,hills,A,CC0"]
    (folder / "INDEX.csv").write_text("\n".join(lines) + "\n")
    return folder / "INDEX.csv"


@pytest.fixture(scope="module")
def checkpoint(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    train_stage_one(STAGE_ONE, index=index, output=run)
    train_stage_two(STAGE_TWO, index=index, output=run)
    export_mini(run, run / "checkpoint")
    return run / "checkpoint"


def test_what_was_trained_generates(checkpoint: Path) -> None:
    pipe = TwoStagePipeline.from_pretrained(checkpoint)
    image = cv2.cvtColor(photograph(0), cv2.COLOR_BGR2RGB)
    options = {"size": Size(128, 64), "num_frames": 9}
    request = pipe.request(PIL.Image.fromarray(image), "pan left", **options)
    frames = torch.cat([piece.frames for piece in pipe.stream(request)])
    assert frames.shape == (9, 64, 128, 3)
    # 96 of 768 numbers a block, fitted on three pictures: frame 0 is the image as well as the codec can say it.
    error = (frames[0].float() - torch.from_numpy(np.array(request.image)).float()).square().mean()
    assert error < 100


def test_what_was_trained_has_no_guidance_either_way(checkpoint: Path) -> None:
    settings = settings_of(checkpoint, few_step=False)
    assert (settings.negative_prompt, settings.stage_one_guidance_scale, settings.stage_one_steps) == ("", 1.0, 4)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("panda eats bamboo", "knows no motion"),
        ("flowers bloom", "knows no motion"),
        ("the movie star smiles", "knows no motion"),
        ("\u6444\u50cf\u673a\u5411\u5de6", "another script"),
        ("the camera zooms in, blurry", None),
        ("The camera pans slowly to the right.", None),
    ],
)
def test_prompts_that_name_no_motion_are_said(prompt: str, said: str | None) -> None:
    pipe = TwoStagePipeline.describe("mini")
    notes = pipe.parts.stage_one.notes_of(prompt)
    assert any(said in note for note in notes) if said else not any("knows no" in note for note in notes)


def test_training_goes_on_from_a_checkpoint(checkpoint: Path, index: Path, tmp_path: Path) -> None:
    frozen = LoopOptions(num_steps=0, checkpoint_every=1, bfloat16=False)
    train_stage_one(
        StageOneRun(frozen, STAGE_ONE.model, SOURCES), index=index, output=tmp_path, initial=str(checkpoint)
    )
    train_stage_two(
        StageTwoRun(frozen, STAGE_TWO.model, SOURCES, STAGE_TWO.pairs),
        index=index,
        output=tmp_path,
        initial=str(checkpoint),
    )
    for part, network in (("stage_one/network", MotionNetwork), ("stage_two/transformer", StageTwoTransformer)):
        start, trained = (
            network.from_pretrained(folder / part, torch_dtype=torch.float32).state_dict()
            for folder in (checkpoint, tmp_path)
        )
        assert all(torch.equal(trained[name], weight) for name, weight in start.items())


def test_an_unfinished_run_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="train that stage first"):
        export_mini(tmp_path, tmp_path / "checkpoint")


def test_photographs_of_other_licences_are_left_out(index: Path, tmp_path: Path) -> None:
    run = StageOneRun(LOOP, STAGE_ONE.model, SourceOptions(tiers=("B",)))
    with pytest.raises(ConfigurationError, match="no photographs of the tiers"):
        train_stage_one(run, index=index, output=tmp_path)
