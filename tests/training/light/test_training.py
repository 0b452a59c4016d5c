"""From an index to weights: pairs that repeat, a loop that resumes to the bit, and what the loss counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.config import load_yaml, to_mapping
from swifti2v.data.sources import read_index
from swifti2v.errors import CheckpointError, ConfigurationError
from swifti2v.light.network import LightNetwork
from swifti2v.light.weights import load_network
from swifti2v.training.light.losses import high_pass, psnr_of, sequence_loss
from swifti2v.training.light.pairs import PairOptions, plan_items, prepare_pairs
from swifti2v.training.light.run import LightRun, LightTraining, train_light
from swifti2v.training.light.sequences import Items, read, spoiled

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def prepared(index: Path, recipe: LightRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run with its pairs."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare_pairs(index, folder / "pairs", recipe.pairs)
    return folder


@pytest.fixture
def directory(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


def test_pairs_are_the_same_again_and_made_once(prepared: Path, index: Path, recipe: LightRun, tmp_path: Path) -> None:
    made: list[tuple[int, int]] = []
    shutil.copytree(prepared / "pairs" / "val-held_0", tmp_path / "val-held_0")
    (tmp_path / ".train-clip_1.part").mkdir()  # of a run that was killed
    prepare_pairs(index, tmp_path, recipe.pairs, on_item=lambda done, total: made.append((done, total)))
    assert made == [(done, 6) for done in range(1, 7)]
    assert contents(tmp_path) == contents(prepared / "pairs")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "train-clip_0",
        "train-clip_1",
        "train-photo_photo_0",
        "train-photo_photo_1",
        "val-held_0",
        "val-held_1",
    ]


def test_arrays_are_what_the_module_says(prepared: Path) -> None:
    arrays = Items(prepared / "pairs", "train").arrays["train-photo_photo_1"]
    shapes = {name: (values.shape, values.dtype.name) for name, values in arrays.items()}
    assert shapes == {
        "truth": ((17, 3, 320, 576), "uint8"),
        "base": ((16, 3, 320, 576), "uint8"),
        "detail": ((16, 3, 320, 576), "int8"),
        "evidence": ((16, 19, 80, 144), "int8"),
        "flow": ((16, 2, 80, 144), "float16"),
    }


def test_only_what_may_be_trained_on_is_planned(index: Path) -> None:
    sources = read_index(index)
    options = PairOptions(validation=("held",), left_out=("clip",))
    assert {item.folder_name for item in plan_items(sources, options)} == {
        "val-held_0", "val-held_1", *(f"train-photo_photo_{variant}" for variant in range(4)),
    }  # fmt: skip
    with pytest.raises(ConfigurationError):
        plan_items(sources, PairOptions(tiers=("C",)))


def test_flips_move_pictures_and_flows_alike(prepared: Path) -> None:
    arrays = Items(prepared / "pairs", "train").arrays["train-photo_photo_0"]
    plain = read(arrays, 2, 3, 4, 6, 16, 16)
    for flips, axes in (((True, False, False), (-1,)), ((False, True, False), (-2,)), ((True, True, False), (-1, -2))):
        flipped = read(arrays, 2, 3, 4, 6, 16, 16, flips=flips)
        for name in ("truth", "base", "detail", "evidence", "first"):
            assert torch.equal(flipped[name], plain[name].flip(axes)), name
        signs = torch.tensor([-1.0 if flips[0] else 1.0, -1.0 if flips[1] else 1.0])[:, None, None]
        assert torch.equal(flipped["flow"], plain["flow"].flip(axes) * signs)
    turned = read(arrays, 2, 3, 4, 6, 16, 16, flips=(False, False, True))
    assert torch.equal(turned["flow"], plain["flow"].transpose(-1, -2).flip(1))


def test_the_loss_is_in_decibels(prepared: Path, recipe: LightRun) -> None:
    """Untrained, the network gives back about what transport gives; PSNR is that of numpy."""
    arrays = Items(prepared / "pairs", "val").arrays["val-held_0"]
    batch = {name: values[None] for name, values in read(arrays, 0, 4, 0, 0, 24, 40).items()}
    network = LightNetwork(recipe.network)
    with torch.no_grad():
        judged = sequence_loss(network, batch, temporal=0, spectral=0, autocast=False)
    assert float(judged.loss) == pytest.approx(judged.made)
    assert judged.made == pytest.approx(judged.given, abs=1.0)
    frame, truth = judged.state.frame[0].numpy(), batch["truth"][0, 4].numpy()
    with torch.no_grad():
        last = [sequence_loss(network, batch, temporal=t, spectral=s, autocast=False).loss
                for t, s in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1))]  # fmt: skip
    assert len({float(value) for value in last}) == 3
    assert psnr_of(10 * np.log10(np.mean((frame - truth) ** 2))) == pytest.approx(
        10 * np.log10(4 / np.mean((frame - truth) ** 2))
    )
    assert high_pass(torch.full((1, 3, 16, 16), 0.3)).abs().max() < 1e-6


def test_a_spoiled_frame_is_near_the_frame() -> None:
    first = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    difference = (spoiled(first, np.random.default_rng(0)) - first).abs().mean()
    assert 0 < difference < 0.3


def test_a_stopped_run_goes_on_to_the_same_weights(directory: Path, recipe: LightRun, tmp_path: Path) -> None:
    """Three steps are two, a new process, and one more: streams go on with the frames that they had."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    whole = LightTraining(recipe, directory)
    whole.run()
    begun = LightTraining(recipe, other)
    with pytest.raises(KeyboardInterrupt):
        begun.run(on_step=lambda report: begun._stop() if report.step == 2 else None)
    assert begun.step == 2
    resumed = LightTraining(recipe, other)
    assert resumed.step == 2
    assert [stream.begin for stream in resumed.streams] == [stream.begin for stream in begun.streams]
    resumed.run()
    for name, value in whole.average.items():
        assert torch.equal(resumed.average[name], value), name
    lines = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (directory, other)
    ]
    losses = [[line["loss"] for line in each if "loss" in line] for each in lines]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert {"validation/gained_clean", "validation/gained_damaged", "validation/held_0"} <= lines[0][-1].keys()


def test_the_loss_falls_on_what_is_trained(prepared: Path, recipe: LightRun) -> None:
    arrays = Items(prepared / "pairs", "val").arrays["val-held_1"]
    batch = {name: values[None] for name, values in read(arrays, 0, 3, 0, 0, 16, 16).items()}
    torch.manual_seed(0)
    network = LightNetwork(recipe.network)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    losses = []
    for _ in range(25):
        found = sequence_loss(network, batch, temporal=0.15, spectral=0.1, autocast=False)
        optimizer.zero_grad()
        found.loss.backward()
        optimizer.step()
        losses.append(float(found.loss.detach()))
    assert losses[-1] < losses[0] - 0.2


def test_the_command_writes_weights(prepared: Path, index: Path, recipe: LightRun, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(to_mapping(replace(recipe, num_steps=1))))
    shutil.copytree(prepared / "pairs", tmp_path / "run" / "pairs")
    arguments = [
        "train",
        "light",
        str(tmp_path / "recipe.json"),
        "--data",
        str(index),
        "--output",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    weights = load_network(torch.device("cpu"), tmp_path / "run" / "weights")
    assert weights.config == recipe.network
    result = CliRunner().invoke(app, [*arguments, "--init", str(tmp_path)])
    assert result.exit_code == 2


def test_weights_of_another_network_are_refused(directory: Path, recipe: LightRun, index: Path) -> None:
    train_light(replace(recipe, num_steps=1), index=index, output=directory)
    wider = replace(recipe, network=replace(recipe.network, width=16))
    with pytest.raises(CheckpointError):
        LightTraining(wider, directory)
    with pytest.raises(CheckpointError):
        LightTraining(wider, directory, initial=directory / "weights")


def test_the_recipe_that_ships_is_read() -> None:
    from tests.training.light.conftest import EXAMPLE

    run = load_yaml(LightRun, EXAMPLE.parents[1] / "recipes" / "light" / "light.yaml")
    assert run.network == load_network(torch.device("cpu")).config
    for wrong in ({"crop": 15}, {"length": 0}):
        with pytest.raises(ConfigurationError):
            replace(run, **wrong)
