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
from swifti2v.mini.motion_transformer import MotionTransformer
from swifti2v.mini.recipes import (
    SourceOptions,
    StageOneRun,
    StageTwoRun,
    export_mini,
    train_stage_one,
    train_stage_two,
)
from swifti2v.mini.reference_pairs import PairOptions
from swifti2v.mini.train_stage_one import ClipShape, StageOneRecipe
from swifti2v.mini.train_stage_two import StageTwoRecipe
from swifti2v.pipelines.loading import settings_of
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.training.engine.loop import LoopOptions
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

LOOP = LoopOptions(num_steps=2, warmup_steps=1, checkpoint_every=2, log_every=1, bfloat16=False)
SOURCES = SourceOptions(photograph_width=480)
STAGE_ONE = StageOneRun(
    LOOP,
    StageOneRecipe(width=128, num_layers=1, ffn_width=64, num_steps=2, shapes=(ClipShape(3, 48, 32, 2, 1.0),)),
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


def test_guidance_of_what_was_trained_leads_away_from_no_words(checkpoint: Path) -> None:
    settings = settings_of(checkpoint, few_step=False)
    assert (settings.negative_prompt, settings.stage_one_guidance_scale) == ("", 3.5)


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
    for part, network in (("stage_one", MotionTransformer), ("stage_two", StageTwoTransformer)):
        start, trained = (
            network.from_pretrained(folder / part / "transformer", torch_dtype=torch.float32).state_dict()
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
