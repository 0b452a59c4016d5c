"""`swifti2v generate` under torchrun: the frames of one process, written once, and errors that end all in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.cli.processes import ProcessGroup, launched_processes
from swifti2v.errors import GenerationCancelled, InvalidInputError
from swifti2v.media.frame_store import FrameStore
from swifti2v.media.video_reader import VideoReader

COMMAND = Path(__file__).with_name("sharing_command.py")
# 128x64: of Stage I's 32x16 there are two tokens a frame, of Stage II's eight: both divide among two processes.
SHORT = ("--size", "128x64", "--frames", "9", "--steps", "1", "--stage-one-steps", "2", "--segment-size", "1")
LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((128, 64)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def in_two_processes(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(COMMAND), "generate", *arguments]
    return subprocess.run(  # noqa: S603 - our own
        command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | environment
    )


def frames_of(path: Path) -> np.ndarray:
    return np.concatenate(list(VideoReader(path)))


@pytest.mark.slow
def test_two_processes_write_the_video_of_one(tiny_checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    given = (str(photo), "--model", str(tiny_checkpoint), "--prompt", "pan left", *SHORT)
    work, alone = tmp_path / "work", tmp_path / "alone"
    one = (*given, "--device", "cpu", "--work-dir", str(alone), "--output", str(tmp_path / "one.mp4"))
    ended = CliRunner().invoke(app, ["generate", *one])
    assert ended.exit_code == 0, ended.output
    result = in_two_processes(*given, "--json", "--work-dir", str(work), "--output", str(tmp_path / "two.mp4"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["num_frames"] == 9  # one object: the other process says nothing
    expected, actual = (frames_of(tmp_path / name).astype(int) for name in ("one.mp4", "two.mp4"))
    assert expected.shape == actual.shape == (9, 64, 128, 3)
    assert expected.std() > 1
    # What is compared is what was written to work directories: the encoder makes levels of differences in rounding.
    motions = [np.concatenate(list(FrameStore(folder / "motion_reference"))).astype(int) for folder in (alone, work)]
    assert np.abs(motions[0] - motions[1]).max() <= 1
    for path in (alone / "segments").iterdir():
        latents = [load_file(folder / "segments" / path.name)["targets"] for folder in (alone, work)]
        torch.testing.assert_close(latents[1], latents[0], rtol=0, atol=1e-4)
    segments = {path.name: path.stat().st_mtime_ns for path in (work / "segments").iterdir()}
    assert len(segments) == 2
    # All processes go on from what the directory holds: if only the first did, the other would wait for it for good.
    (work / "segments" / "segment_0001.safetensors").unlink()
    again = in_two_processes(*given, "--json", "--work-dir", str(work), "--output", str(tmp_path / "three.mp4"))
    assert again.returncode == 0, again.stderr
    assert np.abs(frames_of(tmp_path / "three.mp4").astype(int) - actual).max() <= 1
    kept = work / "segments" / "segment_0000.safetensors"
    assert kept.stat().st_mtime_ns == segments[kept.name]


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tiny_checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    given = (str(photo), "--model", str(tiny_checkpoint), *SHORT, "--output", str(tmp_path / "two.mp4"))
    result = in_two_processes(*given, "--size", "64x64")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [
        "error: 3 tokens of a window do not divide among 2 processes; choose another size, or fewer processes"
    ]
    assert not (tmp_path / "two.mp4").exists()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other(tiny_checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    given = (str(photo), "--model", str(tiny_checkpoint), *SHORT, "--output", str(tmp_path / "two.mp4"))
    result = in_two_processes(*given, FAILING_RANK="1")
    assert result.returncode != 0
    assert "error: this card is full" in result.stderr.splitlines()
    assert result.stdout == ""
    assert not (tmp_path / "two.mp4").exists()


def test_without_torchrun_there_is_one_process() -> None:
    with launched_processes() as processes:
        assert processes == ProcessGroup(0, 1, None)
        assert processes.is_first
        assert processes.together(lambda: 3) == 3
        with processes.work_directory(Path("work")) as directory:
            assert directory == Path("work")


@pytest.mark.parametrize(
    ("environment", "cards", "words"),
    [
        ({"WORLD_SIZE": "4"}, 2, "4 processes were started and 2 are on this machine; start all of them on one"),
        ({}, 1, "2 processes were started for 1 CUDA cards; use torchrun --nproc-per-node 1"),
    ],
    ids=["machines", "cards"],
)
def test_a_launch_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cards: int, words: str
) -> None:
    for name, value in (LAUNCHED | environment).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    with pytest.raises(InvalidInputError, match=words), launched_processes():
        pass


def test_the_end_of_another_process_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    @contextmanager
    def joined() -> object:
        yield ProcessGroup(1, 2, "cpu")

    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("swifti2v.training.engine.distributed.joined_processes", joined)
    with pytest.raises(GenerationCancelled, match="its own message says why"), launched_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(RuntimeError, match="a bug"), launched_processes():
        raise RuntimeError("a bug")
