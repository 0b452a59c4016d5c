"""Bad input to `swifti2v generate`: one line that names the fix and exit code 2, or handled and said."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from swifti2v.cli.main import EXIT_ERROR, app
from swifti2v.media import video_writer
from swifti2v.media.video_reader import VideoReader
from swifti2v.runner import two_stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.testing import Result

    from swifti2v.runner.parts import Parts
    from swifti2v.wan.checkpoints import Part

    Run = Callable[..., Result]

SHORT = ("--frames", "5", "--steps", "1", "--stage-one-steps", "1")


@pytest.fixture
def picture() -> PIL.Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((96, 64))


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path, picture: PIL.Image.Image) -> Run:
    """Run `generate`; keywords replace the good input."""
    picture.save(tmp_path / "photo.png")

    def invoke(
        *arguments: str, image: Path | None = None, output: Path | None = None, model: str | Path = tiny_checkpoint
    ) -> Result:
        given = ["generate", str(image or tmp_path / "photo.png"), "--model", str(model)]
        return CliRunner().invoke(app, [*given, "--output", str(output or tmp_path / "out.mp4"), *arguments])

    return invoke


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the full system take minutes: what can be found wrong without them is to be found before."""
    load_parts = two_stage.load_parts

    def load(*arguments: Any, stages: tuple[Part, ...], **options: Any) -> Parts:
        assert not stages, "weights were loaded first"
        return load_parts(*arguments, stages=stages, **options)

    monkeypatch.setattr(two_stage, "load_parts", load)


def refused(result: Result, *words: str, notes: int = 0) -> None:
    """Exit code 2, nothing on standard output, one line of error, that says so."""
    assert result.exit_code == EXIT_ERROR, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["note"] * notes + ["error"]
    for word in words:
        assert word in lines[-1], lines[-1]
    assert "Traceback" not in result.output


# ------------------------------------------------------------------------------------------------ images


def truncated(picture: PIL.Image.Image, path: Path) -> None:
    picture.resize((400, 400)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:2000])


def animated(picture: PIL.Image.Image, path: Path) -> None:
    picture.save(path, "GIF", save_all=True, append_images=[picture.rotate(90)])


def huge(_picture: PIL.Image.Image, path: Path) -> None:
    PIL.Image.new("1", (10_001, 10_000)).save(path, "PNG")


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _picture, _path: None, ("does not exist; check the path",)),
        (lambda _picture, path: path.mkdir(), ("is a folder; give the path of a picture",)),
        (lambda _picture, path: path.write_bytes(b""), ("is empty", "export or copy it again")),
        (lambda _picture, path: path.write_text("hello"), ("is not a readable picture; give a JPEG",)),
        (truncated, ("is truncated or damaged", "export or copy it again")),
        (huge, ("is too large: 10001x10000 = 100 megapixels", "scale it down")),
        (animated, ("is animated (2 frames); pass one frame",)),
    ],
    ids=["missing", "folder", "empty", "text", "truncated", "huge", "animated"],
)
def test_images_that_cannot_be_used(
    run: Run,
    tmp_path: Path,
    picture: PIL.Image.Image,
    make: Callable[[PIL.Image.Image, Path], object],
    words: tuple[str, ...],
) -> None:
    make(picture, tmp_path / "bad")
    refused(run(image=tmp_path / "bad"), *words)
    assert not list(tmp_path.glob("*.mp4"))


def cmyk(picture: PIL.Image.Image, path: Path) -> None:
    picture.convert("CMYK").save(path, "JPEG")


def rotated(picture: PIL.Image.Image, path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    picture.save(path, "JPEG", exif=exif)


def transparent(picture: PIL.Image.Image, path: Path) -> None:
    picture = picture.copy()
    picture.putalpha(128)
    picture.save(path, "PNG")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (cmyk, "note: converted from CMYK to RGB"),
        (rotated, "note: rotated by its EXIF orientation"),
        (transparent, "note: transparent parts laid on white"),
    ],
)
def test_images_that_are_handled_and_said(
    run: Run,
    tmp_path: Path,
    picture: PIL.Image.Image,
    make: Callable[[PIL.Image.Image, Path], None],
    words: str,
) -> None:
    make(picture, tmp_path / "odd")
    result = run("--prompt", "pan", *SHORT, image=tmp_path / "odd")
    assert result.exit_code == 0, result.stderr
    assert words in result.stderr.splitlines()
    assert (tmp_path / "out.mp4").is_file()


# ------------------------------------------------------------------------------------------------ options


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--size", "1280x720"), "the nearest is 1280x704"),
        (("--size", "big"), "WIDTHxHEIGHT; write for instance"),
        (("--size", "0x0"), "multiple of 32"),
        (("--size", "99968x99968"), "width is 99968; it must be from"),
        (("--frames", "80"), "4k+1 frames, for instance 77 or 81"),
        (("--frames", "-3"), "4k+1"),
        (("--fps", "0"), "fps is 0.0; it must be from 1 to 240"),
        (("--seed", "-1"), "seed is -1"),
        (("--steps", "0"), "num_inference_steps is 0"),
        (("--sigma-start", "2"), "sigma_start is 2"),
        (("--guidance", "0.5"), "guidance_scale is 0.5"),
        (("--segment-size", "0"), "segment_size is 0; it must be at least 1"),
        (("--neighbors-before", "-1"), "neighbors_before is -1"),
        (("--flow-scale", "0"), "flow_scale is 0"),
        (("--stage-one-flow-shift", "3"), "stage_one_flow_shift has no effect with few steps; ask for many"),
        (("--stage-one-flow-shift", "0", "--many-step"), "stage_one_flow_shift is 0"),
        (("--stage-one-guidance-2", "3"), "no effect without guidance in Stage I; set stage_one_guidance_scale"),
        (("--stage-one-guidance-2", "0", "--many-step"), "stage_one_guidance_scale_2 is 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_out_of_range(run: Run, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    refused(run(*arguments), words)
    assert not list(tmp_path.glob("*.mp4"))


def test_refiner_that_the_checkpoint_has_not(run: Run) -> None:
    refused(run("--refiner", "training-free", *SHORT), "use the refiner concat")


def test_memory_that_is_too_little_is_named_as_it_was_given(run: Run) -> None:
    result = run("--memory", "10MiB", "--prompt", "left", *SHORT)
    refused(
        result, "no plan fits into 10.0 MiB: ", " needs at least ", "MiB; allow that", notes=1
    )  # of the picture's aspect


def test_device_that_there_is_not(run: Run) -> None:
    refused(run("--device", "cuda:99", *SHORT), "cuda:99", "use cpu")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("", "note: the prompt is empty"), ("left " * 2000, "note: the prompt was cut: the text encoder reads 16 of its")],
    ids=["empty", "10,000 characters"],
)
def test_prompts_that_are_handled_and_said(run: Run, tmp_path: Path, prompt: str, words: str) -> None:
    result = run("--prompt", prompt, *SHORT)
    assert result.exit_code == 0, result.stderr
    assert any(line.startswith(words) for line in result.stderr.splitlines()), result.stderr
    assert (tmp_path / "out.mp4").is_file()


# ------------------------------------------------------------------------------------------------ output and disk


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere/out.mp4", "does not exist; create the folder first"),
        ("out.gif", "use .mp4, .mov, .mkv"),
        ("photo.png/out.mp4", "is not a folder"),
        ("folder.mp4", "it is a folder; give the name of a file"),
    ],
)
def test_outputs_that_cannot_be_written(run: Run, tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    refused(run(output=tmp_path / name), words)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_folder_without_permission(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by taking the permission away, which stops nobody who is root."""

    def denied(*_arguments: object, **_options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(video_writer.tempfile, "NamedTemporaryFile", denied)
    refused(run(), "Permission denied", "make the folder writable")


def full(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_disk_is_full_for_the_video(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_writer, "_copy_packets", full)
    result = run("--prompt", "pan", "--size", "96x64", *SHORT)
    refused(result, "the disk is full", "free space there or choose another folder", notes=1)
    assert str(tmp_path / "out.partial.mp4") in result.stderr
    assert sum(len(chunk) for chunk in VideoReader(tmp_path / "out.partial.mp4")) == 5
    assert not (tmp_path / "out.mp4").exists()


def test_disk_is_full_for_the_work_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    result = run("--prompt", "pan", "--size", "96x64", "--work-dir", str(tmp_path / "work"), *SHORT)
    refused(result, "No space left on device", str(tmp_path / "work"), "free some space")
    assert not list(tmp_path.glob("*.mp4"))
    assert not [path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.name != ".lock"]


# ------------------------------------------------------------------------------------------------ work directory


@pytest.mark.usefixtures("nothing_is_loaded")
def test_work_directory_that_is_a_file(run: Run, tmp_path: Path) -> None:
    refused(run("--work-dir", str(tmp_path / "photo.png")), "cannot be made", "choose one that is writable")


def test_work_directory_of_another_run(run: Run, tmp_path: Path) -> None:
    given = ("--size", "96x64", "--work-dir", str(tmp_path / "work"), *SHORT)
    assert run("--prompt", "pan left", *given).exit_code == 0
    (tmp_path / "out.mp4").unlink()
    refused(run("--prompt", "pan right", *given), "another prompt;", "another --work-dir")
    refused(run("--prompt", "pan left", *given, "--seed", "5"), "another seed;")
    refused(run("--prompt", "pan left", *given, "--sigma-start", "0.5"), "another sigma_start;")
    assert not (tmp_path / "out.mp4").exists()
    assert run("--prompt", "pan left", *given, "--fps", "12").exit_code == 0


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("stage_two/transformer/diffusion_pytorch_model.safetensors", cut, "cut short"),
        ("stage_one/transformer/diffusion_pytorch_model.safetensors", cut, "cut short"),
        ("stage_one/text_encoder/model.safetensors", Path.unlink, "text_encoder"),
        ("swifti2v.json", cut, "is damaged: get it again"),
        ("swifti2v.json", Path.unlink, "pass the folder of a SwiftI2V checkpoint"),
        ("adapters/low.safetensors", Path.unlink, "correct weight_name"),
    ],
)
def test_corrupt_checkpoint(
    run: Run, broken: Path, tmp_path: Path, file: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(broken / file)
    refused(run(*SHORT, model=broken), words)
    assert not list(tmp_path.glob("*.mp4"))


def test_adapter_that_matches_in_part(run: Run, broken: Path, tmp_path: Path) -> None:
    file = broken / "adapters" / "low.safetensors"
    save_file(load_file(file) | {"diffusion_model.blocks.9.ffn.0.lora_down.weight": torch.ones(2, 24)}, file)
    refused(run(*SHORT, model=broken), "low.safetensors: 1 of 3 keys")
    assert not list(tmp_path.glob("*.mp4"))


@pytest.mark.usefixtures("nothing_is_loaded")
def test_no_such_checkpoint(run: Run, tmp_path: Path) -> None:
    refused(run(model="no-such-model"), "there is no checkpoint 'no-such-model'", "wan2.2")
    refused(run(model=tmp_path), "holds no swifti2v.json")


def test_json_form_has_the_same_error(run: Run) -> None:
    refused(run("--json", "--size", "1280x720"), "the nearest is 1280x704")
