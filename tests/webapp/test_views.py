"""Files as the browser asks for them: which there are, and how much of a growing video can be played."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from swifti2v.errors import JobError
from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter
from swifti2v.webapp.views import KINDS, media_file, playable_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.worker import Worker
    from swifti2v.webapp.studio import Form, Studio

FRAMES = 48


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a fragmented video just before it is finished."""
    path = tmp_path_factory.mktemp("growing") / "video.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 64, 96, 3), dtype=np.uint8)
    with VideoWriter(path, size=Size(96, 64), fps=8) as writer:
        for frame in noise:
            writer.write(frame[None])
        return writer.part_path.read_bytes()


def decoded(content: bytes) -> int:
    with av.open(io.BytesIO(content)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_every_length_gives_whole_fragments(growing: bytes, tmp_path: Path) -> None:
    path = tmp_path / "part.mp4"
    counts = []
    for length in range(0, len(growing) + 1, max(1, len(growing) // 60)):
        path.write_bytes(growing[:length])
        playable = playable_bytes(path)
        assert playable <= length
        assert playable_bytes(path) == playable
        if playable:
            path.write_bytes(growing[:playable])
            assert playable_bytes(path) == playable, "what can be played ends at a box"
            counts.append(playable)
    assert counts == sorted(counts)
    assert len(set(counts)) > 3, "it grows in pieces"
    frames = [decoded(growing[:count]) for count in sorted(set(counts))[1:]]
    assert frames == sorted(frames)
    assert 0 < frames[0] < frames[-1] <= FRAMES


@pytest.mark.parametrize("content", [b"", b"abc", b"\x00\x00\x00\x00mdat", b"\xff" * 40])
def test_what_is_no_video_has_nothing_to_play(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "part.mp4"
    path.write_bytes(content)
    assert playable_bytes(path) == 0


def test_which_files_there_are(studio: Studio, form: Form, worker: Worker) -> None:
    video, preview = studio.video(form), studio.preview(form)

    def kinds(job_id: str) -> set[str]:
        return {kind for kind in KINDS if media_file(studio.queue, job_id, kind) is not None}

    assert kinds(video.id) == kinds(preview.id) == {"input"}
    worker.run(until_idle=True)
    assert kinds(video.id) == {"input", "thumbnail", "video", "motion"}
    assert kinds(preview.id) == {"input", "thumbnail", "motion"}
    stage = studio.look(video.id)[0]
    assert stage is not None
    assert set(stage["media"]) == kinds(video.id)
    assert (stage["percent"], stage["headline"]) == (100, "Video")
    studio.cancel(video.id)  # too late: a finished job stays as it is
    assert kinds(video.id) == {"input", "thumbnail", "video", "motion"}


@pytest.mark.parametrize("name", ["../../etc", "video_", "video_" + "0" * 32, "VIDEO_" + "a" * 32, "x\0y"])
def test_names_that_are_none(studio: Studio, name: str) -> None:
    with pytest.raises(JobError):
        media_file(studio.queue, name, "input")
