"""`swifti2v generate` and `preview` on a tiny checkpoint, from the command line to the file."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

from swifti2v.cli import progress
from swifti2v.cli.main import EXIT_ERROR, EXIT_INTERRUPTED, app
from swifti2v.errors import GenerationCancelled, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.media.video_reader import VideoReader
from swifti2v.memory.ways import stored_bytes
from swifti2v.runner.fitting import networks_of
from swifti2v.runner.loading import load_parts
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.checkpoints import PARTS
from tests.runner.light_weights import write_light_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from click.testing import Result

    Run = Callable[..., Result]

PROGRESS_LINES = progress._Lines
SHORT = ("--frames", "9", "--steps", "1", "--stage-one-steps", "1", "--segment-size", "1")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).resize((80, 80)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path, photo: Path) -> Run:
    """Run a command on the photograph, writing ``out.mp4``."""

    def invoke(*arguments: str, command: str = "generate", **environment: str) -> Result:
        given = [command, str(photo), "--model", str(tiny_checkpoint), "--output", str(tmp_path / "out.mp4")]
        return CliRunner().invoke(app, [*given, *arguments], env=environment)

    return invoke


def num_frames(path: Path) -> int:
    return sum(len(chunk) for chunk in VideoReader(path))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_pieces: int, error: BaseException) -> None:
    """Let the stream of a pipeline raise after so many pieces."""
    stream = TwoStagePipeline.stream

    def stopping(self: TwoStagePipeline, *arguments: Any, **options: Any) -> Iterator[Any]:
        for number, piece in enumerate(stream(self, *arguments, **options)):
            if number == num_pieces:
                raise error
            yield piece

    monkeypatch.setattr(TwoStagePipeline, "stream", stopping)


def test_video_is_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_Lines", PROGRESS_LINES)
    result = run("--prompt", "pan left", *SHORT)
    assert result.exit_code == 0, result.output
    assert "error" not in result.stderr
    assert "Stage II, segment 2/2: 100%" in result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out.mp4'}: 9 frames of 64x64, ")
    reader = VideoReader(tmp_path / "out.mp4")
    assert (reader.info.size, reader.info.fps) == (Size(64, 64), 8)
    assert num_frames(tmp_path / "out.mp4") == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "photo.png"]


def test_json(run: Run, tmp_path: Path) -> None:
    result = run("--prompt", "", "--json", "--size", "96x64", "--fps", "24", *SHORT)
    assert result.exit_code == 0
    assert result.stderr == ""
    summary = json.loads(result.stdout)
    assert summary["output"] == str(tmp_path / "out.mp4")
    assert (summary["size"], summary["num_frames"], summary["fps"]) == ("96x64", 9, 24.0)
    assert 0 < summary["first_frames_seconds"] <= summary["seconds"]
    assert summary["load_seconds"] > 0
    assert any("cut to the aspect" in note for note in summary["notes"])
    assert any("prompt is empty" in note for note in summary["notes"])


def test_options_reach_the_pipeline(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    request = TwoStagePipeline.request

    def watching(self: TwoStagePipeline, *arguments: Any, **options: Any) -> Any:
        seen.append(request(self, *arguments, **options))
        return seen[-1]

    monkeypatch.setattr(TwoStagePipeline, "request", watching)
    given = {
        "--size": "96x64",
        "--frames": "5",
        "--fps": "12",
        "--seed": "7",
        "--steps": "2",
        "--sigma-start": "0.75",
        "--guidance": "1.5",
        "--negative-prompt": "blurry",
        "--refiner": "concat",
        "--reference": "replace",
        "--flow-scale": "0.75",
        "--segment-size": "2",
        "--neighbors-before": "0",
        "--neighbors-after": "1",
        "--positions": "compact",
        "--stage-one-steps": "3",
        "--stage-one-guidance": "1.25",
        "--stage-one-guidance-2": "1.5",
        "--stage-one-flow-shift": "3",
    }
    result = run("--prompt", "tilt", "--many-step", *(word for pair in given.items() for word in pair))
    assert result.exit_code == 0, result.stderr
    settings = seen[0].settings
    assert seen[0].prompt == "tilt"
    assert str(settings.size) == "96x64"
    assert (settings.num_frames, settings.fps, settings.seed) == (5, 12, 7)
    assert (settings.num_inference_steps, settings.sigma_start, settings.guidance_scale) == (2, 0.75, 1.5)
    assert (settings.refiner, settings.reference, settings.flow_scale) == ("concat", "replace", 0.75)
    assert (settings.segment_size, settings.neighbors_before, settings.neighbors_after) == (2, 0, 1)
    assert (settings.positions, settings.negative_prompt) == ("compact", "blurry")
    assert (settings.few_step, settings.stage_one_steps, settings.stage_one_guidance_scale) == (False, 3, 1.25)
    assert (settings.stage_one_guidance_scale_2, settings.stage_one_flow_shift) == (1.5, 3)


def test_float8_products_that_a_card_has_not_are_refused_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swifti2v.runner.loading.open_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    result = run(*SHORT, "--quantization", "float8", "--device", "cuda:0")
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.count("\n") == 1
    assert "A100 has no float8 matmul (capability 8.0" in result.stderr
    assert "use quantization int8 or none" in result.stderr
    result = run(*SHORT, "--quantization", "float8", "--device", "cpu")  # loaded; these networks are too narrow
    assert result.exit_code == EXIT_ERROR
    assert "24 by 24, and float8 matmul takes multiples of 16; use quantization none" in result.stderr


def test_int8_products_write_a_video(run: Run, tmp_path: Path) -> None:
    """These networks are 24 wide: too narrow for float8, and wide enough for int8."""
    videos = []
    for quantization in ("none", "int8"):
        output = tmp_path / f"{quantization}.mp4"
        result = run(*SHORT, "--quantization", quantization, "--device", "cpu", "--output", str(output))
        assert result.exit_code == 0, result.stderr
        videos.append(output.read_bytes())
    assert videos[0] != videos[1]


@pytest.mark.parametrize(
    ("model", "notes"),
    [(None, ["the small model `mini` is used"]), ("wan2.2", ["try --model mini"]), ("mini", [])],
)
def test_whoever_has_no_gpu_is_told_which_model_is_for_it(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str | None, notes: list[str]
) -> None:
    def load(*_arguments: object, **_options: object) -> None:
        raise InvalidInputError("far enough")

    monkeypatch.setattr("swifti2v.runner.two_stage.load_parts", load)
    chosen = () if model is None else ("--model", model)
    arguments = ["generate", str(photo), "--device", "cpu", "--output", str(tmp_path / "out.mp4"), *chosen]
    result = CliRunner().invoke(app, arguments)
    *said, error = result.stderr.splitlines()
    assert len(said) == len(notes)
    assert all(words in line for words, line in zip(notes, said, strict=True))
    assert error == "error: far enough"


def test_the_light_decoder_writes_another_video_of_the_same_clip(run: Run, tmp_path: Path) -> None:
    work, weights = tmp_path / "work", write_light_weights(tmp_path / "light.safetensors")
    few = ("--prompt", "pan left", "--work-dir", str(work), *SHORT)
    assert run(*few).exit_code == 0
    exact = np.concatenate(list(VideoReader(tmp_path / "out.mp4")))
    segments = {path: path.stat().st_mtime_ns for path in (work / "segments").iterdir()}
    result = run(*few, "--decoder", "light", "--decoder-weights", str(weights))
    assert result.exit_code == 0, result.stderr
    light = np.concatenate(list(VideoReader(tmp_path / "out.mp4")))
    assert exact.shape == light.shape == (9, 64, 64, 3)
    assert np.abs(exact.astype(int) - light).max() > 16
    # The latents are those of the run before.
    assert segments == {path: path.stat().st_mtime_ns for path in (work / "segments").iterdir()}
    result = run(*few, "--decoder-weights", str(weights))
    assert result.exit_code == EXIT_ERROR
    assert "use decoder light" in result.stderr


def test_progress_in_a_terminal(run: Run) -> None:
    result = run("--prompt", "pan left", *SHORT, FORCE_COLOR="1", COLUMNS="100")
    assert result.exit_code == 0
    for words in ("Stage I, motion", "Stage II, segment 2/2", "frames written", "9/9"):
        assert words in result.stderr, result.stderr


def test_preview_then_generate(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    few = ("--prompt", "pan left", "--work-dir", str(work), "--frames", "9")
    result = run(*few, "--json", command="preview")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["size"] == "16x16"
    assert num_frames(tmp_path / "out.mp4") == 9
    motion = {path: path.stat().st_mtime_ns for path in (work / "motion_reference").iterdir()}
    result = run(*few, "--steps", "1")
    assert result.exit_code == 0, result.stderr
    assert motion == {path: path.stat().st_mtime_ns for path in (work / "motion_reference").iterdir()}
    reader = VideoReader(tmp_path / "out.mp4")
    assert reader.info.size == Size(64, 64)


def test_preview_of_many_steps_then_generate(run: Run, tmp_path: Path) -> None:
    work = tmp_path / "work"
    many = ("--prompt", "pan", "--frames", "9", "--many-step", "--stage-one-steps", "2", "--work-dir", str(work))
    result = run(*many, "--negative-prompt", "blurry", command="preview")
    assert result.exit_code == 0, result.stderr
    asked = json.loads((work / "run.json").read_text())["stage_one"]
    assert (asked["few_step"], asked["stage_one_flow_shift"], asked["negative_prompt"]) == ("False", "5.0", "blurry")
    motion = {path: path.stat().st_mtime_ns for path in (work / "motion_reference").iterdir()}
    result = run(*many, "--steps", "1")
    assert result.exit_code == EXIT_ERROR
    assert "another negative_prompt" in result.stderr
    result = run(*many, "--negative-prompt", "blurry", "--steps", "1")
    assert result.exit_code == 0, result.stderr
    assert motion == {path: path.stat().st_mtime_ns for path in (work / "motion_reference").iterdir()}


def test_stages_are_loaded_in_turn_where_the_host_is_short(run: Run, tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert run("--prompt", "pan left", *SHORT).exit_code == 0
    expected = (tmp_path / "out.mp4").read_bytes()
    stages = [load_parts(tiny_checkpoint, device="cpu", stages=(stage,)) for stage in PARTS]
    larger = max(stored_bytes(networks_of(parts), "float32") for parts in stages)
    host = f"{(larger + 2**10) / 2**20:.4f}MiB"
    result = run("--prompt", "pan left", *SHORT, "--memory", "2GiB", "--host-memory", host)
    assert result.exit_code == 0, result.output
    assert result.stderr == "note: the host has room for one stage at a time; each is loaded when it is its turn\n"
    assert (tmp_path / "out.mp4").read_bytes() == expected


@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["text", "json"])
def test_ctrl_c_leaves_what_is_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, json_option: tuple[str, ...]
) -> None:
    interrupt_after(monkeypatch, 2, KeyboardInterrupt())
    result = run("--prompt", "pan left", "--work-dir", str(tmp_path / "work"), *SHORT, *json_option)
    assert result.exit_code == EXIT_INTERRUPTED
    assert result.stdout == ""
    note, last = result.stderr.splitlines()
    assert note.startswith(f"note: 5 finished frames are kept in {tmp_path / 'out.partial.mp4'}; the same command")
    assert last == "interrupted: stopped by Ctrl-C"
    assert num_frames(tmp_path / "out.partial.mp4") == 5
    assert not (tmp_path / "out.mp4").exists()
    monkeypatch.undo()
    assert run("--prompt", "pan left", "--work-dir", str(tmp_path / "work"), *SHORT).exit_code == 0
    assert num_frames(tmp_path / "out.mp4") == 9


def test_ctrl_c_before_the_first_frame(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 0, KeyboardInterrupt())
    result = run("--prompt", "pan left", *SHORT)
    assert result.exit_code == EXIT_INTERRUPTED
    assert result.stderr == "interrupted: stopped by Ctrl-C\n"
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_cancelled(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 1, GenerationCancelled("asked to stop"))
    result = run("--prompt", "pan left", *SHORT)
    assert result.exit_code == EXIT_INTERRUPTED
    assert result.stderr.endswith("cancelled: asked to stop\n")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried")])
def test_too_little_memory(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    interrupt_after(monkeypatch, 0, error)
    result = run("--prompt", "pan left", *SHORT)
    assert result.exit_code == EXIT_ERROR
    assert result.stderr.startswith("error: there is not enough memory")
    assert "--segment-size" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_nothing_but_our_own_words_on_the_screen(tiny_checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    """In a process of its own: libraries speak while they are imported and while they load."""
    command = [sys.executable, "-m", "swifti2v.cli.main", "generate", str(photo), "--output", str(tmp_path / "out.mp4")]
    given = ["--model", str(tiny_checkpoint), "--prompt", "", "--json", *SHORT]
    result = subprocess.run([*command, *given], capture_output=True, text=True, timeout=300, check=False)  # noqa: S603 - our own command
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["num_frames"] == 9
