"""Runs that were stopped, and work directories: continued to the same bytes, or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.errors import GenerationCancelled, OutputError, WorkDirectoryError
from swifti2v.geometry import Size
from swifti2v.runner.acceleration import Acceleration
from swifti2v.runner.two_stage import TwoStagePipeline
from tests.runner.whole_runs import OPTIONS, frames_of, segments, stage_one_calls, stage_two_calls, stop_at

if TYPE_CHECKING:
    from collections.abc import Callable

    import PIL.Image

    from swifti2v.runs import GenerationRequest


@pytest.mark.parametrize(
    ("phase", "done", "kept"),
    [("stage_one", 1, 0), ("stage_one", 2, 0), ("stage_two", 1, 0), ("stage_two", 4, 1), ("frames", 9, 2)],
)
@pytest.mark.parametrize("error", [GenerationCancelled, KeyboardInterrupt], ids=["cancelled", "ctrl-c"])
def test_a_stopped_run_continues_to_the_same_bytes(
    pipe: TwoStagePipeline,
    image: PIL.Image.Image,
    uninterrupted: Any,
    tmp_path: Path,
    phase: str,
    done: int,
    kept: int,
    error: type[BaseException],
) -> None:
    with pytest.raises(error, match="stopped at"):
        pipe(image, "pan left", **OPTIONS, work_dir=tmp_path, on_progress=stop_at(phase, done, error))
    found = len(segments(tmp_path))  # the segment made ahead may be finished too
    assert found == kept == 0 if phase == "stage_one" else kept <= found <= kept + 1
    with stage_one_calls(pipe) as first, stage_two_calls(pipe) as second:
        video = pipe(image, "pan left", **OPTIONS, work_dir=tmp_path)
    assert first.count == (2 if phase == "stage_one" else 0)  # two windows of one step
    assert second.count == 2 * (3 - found)
    assert torch.equal(video.frames, uninterrupted[0])
    assert segments(tmp_path) == uninterrupted[1]


def test_a_finished_run_is_only_decoded(
    pipe: TwoStagePipeline, image: PIL.Image.Image, uninterrupted: Any, tmp_path: Path
) -> None:
    frames, files, folder = uninterrupted

    def times() -> dict[Path, int]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in found}

    before = times()
    with stage_one_calls(pipe) as first, stage_two_calls(pipe) as second:
        again = pipe(image, "pan left", **{**OPTIONS, "fps": 24.0}, work_dir=folder)
    assert (first.count, second.count) == (0, 0)
    assert again.fps == 24
    assert torch.equal(again.frames, frames)
    assert segments(folder) == files
    assert times() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "pan right"}, "another prompt"),
        ({"seed": 4}, "another seed"),
        ({"size": Size(96, 64)}, "another image, size"),
        ({"num_frames": 9}, "another num_frames"),
        ({"num_inference_steps": 1}, "another num_inference_steps"),
        ({"reference": "replace"}, "another flow_scale, reference"),
        ({"guidance_scale": 2.0, "negative_prompt": "blurry"}, "another guidance_scale, negative_prompt"),
    ],
)
def test_another_run_is_refused(
    pipe: TwoStagePipeline,
    request_of: Callable[..., GenerationRequest],
    uninterrupted: Any,
    change: dict[str, Any],
    words: str,
) -> None:
    frames, files, folder = uninterrupted
    with pytest.raises(WorkDirectoryError, match=f"{words};.*--work-dir"):
        next(pipe.stream(request_of(**change), work_dir=folder))
    assert segments(folder) == files
    assert torch.equal(frames_of(pipe.stream(request_of(), work_dir=folder)), frames)


def test_another_image_is_refused(pipe: TwoStagePipeline, image: PIL.Image.Image, uninterrupted: Any) -> None:
    other = image.copy()
    other.putpixel((48, 36), (255, 0, 0))
    with pytest.raises(WorkDirectoryError, match="another image;"):
        pipe(other, "pan left", **OPTIONS, work_dir=uninterrupted[2])


def test_a_preview_is_continued(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], uninterrupted: Any, tmp_path: Path
) -> None:
    """Look at the motion, then choose how Stage II works: until a segment is done, that may change."""
    with stage_two_calls(pipe) as second:
        motion = frames_of(pipe.preview(request_of(), work_dir=tmp_path))
        again = frames_of(pipe.preview(request_of(), work_dir=tmp_path))
    assert second.count == 0
    assert motion.shape == (13, 16, 16, 3)
    assert torch.equal(motion, again)
    with stage_one_calls(pipe) as first:
        for changes in ({"num_inference_steps": 4}, {"segment_size": 3}):
            pieces = pipe.stream(request_of(**changes), work_dir=tmp_path)
            next(pieces)
            pieces.close()
        assert torch.equal(frames_of(pipe.stream(request_of(), work_dir=tmp_path)), uninterrupted[0])
    assert first.count == 0
    assert segments(tmp_path) == uninterrupted[1]
    with pytest.raises(WorkDirectoryError, match="another segment_size"):
        next(pipe.stream(request_of(segment_size=3), work_dir=tmp_path))


def test_segments_of_exact_products_are_not_continued_by_rounded_ones(
    tiny_checkpoint: Path,
    image: PIL.Image.Image,
    uninterrupted: tuple[torch.Tensor, dict[str, bytes], Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "begun"
    shutil.copytree(uninterrupted[2], folder)
    rounded = TwoStagePipeline.from_pretrained(
        tiny_checkpoint, device="cpu", acceleration=Acceleration(quantization="int8")
    )
    with pytest.raises(WorkDirectoryError, match="another quantization"):
        rounded(image, "pan left", **OPTIONS, work_dir=folder)
    assert segments(folder) == uninterrupted[1]


def test_damage_in_the_work_directory(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], uninterrupted: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(uninterrupted[2], tmp_path / "copy"))
    segment = folder / "segments" / "segment_0001.safetensors"
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-8])
    with pytest.raises(WorkDirectoryError, match=r"segment_0001\.safetensors is damaged; remove it"):
        frames_of(pipe.stream(request_of(), work_dir=folder))
    segment.unlink()
    assert torch.equal(frames_of(pipe.stream(request_of(), work_dir=folder)), uninterrupted[0])
    assert segment.read_bytes() == whole
    piece = folder / "motion_reference" / "piece_000000.npy"
    piece.write_bytes(piece.read_bytes()[:-8])
    with pytest.raises(WorkDirectoryError, match=r"damaged.*delete"):
        frames_of(pipe.stream(request_of(), work_dir=folder))


def test_work_directory_that_is_a_file(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be made"):
        next(pipe.stream(request_of(), work_dir=tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
