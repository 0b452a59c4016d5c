"""What the buttons do, without a browser: forms, seeds, what is shown, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import CheckpointError, ImageInputError, InvalidInputError, JobError, SwiftI2VError
from swifti2v.jobs.state import JobFailure, JobProgress, JobRequest, JobState
from swifti2v.webapp.studio import Form, Studio
from swifti2v.webapp.views import one_line

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.jobs.queue import JobQueue


def test_a_job_says_all_that_it_was_made_of(studio: Studio, form: Form) -> None:
    job = studio.video(replace(form, size="", num_frames=None, num_inference_steps=None, seed=None))
    options = job.request.options
    settings = studio.defaults
    assert options["size"] == list(settings.size)
    assert (options["num_frames"], options["fps"]) == (settings.num_frames, settings.fps)
    assert 0 <= options["seed"] < 2**31


def test_seeds_are_drawn_anew(studio: Studio, form: Form) -> None:
    seeds = {studio.preview(replace(form, seed=None)).request.options["seed"] for _ in range(4)}
    assert len(seeds) == 4


def test_settings_are_reused_as_they_were(studio: Studio, form: Form, photo: Path) -> None:
    again = studio.reuse(studio.preview(form).id)
    assert again == replace(form, image=again.image)
    assert again.image is not None
    with PIL.Image.open(again.image) as kept, PIL.Image.open(photo) as given:
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(given))


def test_another_motion_differs_in_its_seed_only(studio: Studio, form: Form) -> None:
    preview = studio.preview(form)
    other = studio.another_motion(preview.id)
    assert other.request.options["seed"] != preview.request.options["seed"]
    one, two = studio.reuse(preview.id), studio.reuse(other.id)
    assert replace(one, seed=None, image=None) == replace(two, seed=None, image=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "no picture yet; drop one"),
        ({"size": "large"}, "large"),
        ({"size": "100x64"}, "multiple"),
        ({"num_frames": 10}, "10"),
        ({"num_frames": 9.5}, "frames is 9.5; write a whole number"),
        ({"num_inference_steps": 0}, "it should be"),
        ({"seed": -1}, "it should be"),
    ],
)
def test_a_form_that_cannot_be_used_is_refused_in_one_line(
    studio: Studio, form: Form, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        studio.preview(replace(form, **changes))  # type: ignore[arg-type]
    assert "\n" not in one_line(caught.value)
    assert studio.look("")[1] == []
    assert list(studio.queue.files.ids()) == []


def test_what_is_no_picture_is_refused(studio: Studio, form: Form, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not a picture")
    with pytest.raises(ImageInputError, match="not a readable picture"):
        studio.preview(replace(form, image=str(path)))


def test_a_model_that_is_not_there_is_refused_at_the_start(queue: JobQueue, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        Studio(queue, str(tmp_path / "nothing"))


def test_the_queue_tells_each_job_its_place(studio: Studio, form: Form) -> None:
    jobs = [studio.preview(form) for _ in range(3)]
    lines = {line["id"]: line["headline"] for line in studio.look("")[1]}
    assert [lines[job.id] for job in jobs] == [
        "Next in the queue",
        "In the queue, 1 ahead of it",
        "In the queue, 2 ahead of it",
    ]
    studio.cancel(jobs[0].id)
    lines = {line["id"]: line for line in studio.look(jobs[1].id)[1]}
    assert lines[jobs[1].id]["headline"] == "Next in the queue"
    assert [lines[job.id]["active"] for job in jobs] == [False, True, True]
    assert [lines[job.id]["current"] for job in jobs] == [False, True, False]


def test_the_stage_follows_a_job_to_its_failure(studio: Studio, form: Form) -> None:
    job = studio.video(form)
    store = studio.queue.store
    claimed = store.claim("w", lease_seconds=60)
    assert claimed is not None

    def shown(progress: JobProgress) -> tuple[str, int]:
        store.renew(claimed, lease_seconds=60, progress=progress)
        stage = studio.look(job.id)[0]
        assert stage is not None
        return stage["headline"], stage["percent"]

    assert shown(JobProgress()) == ("Preparing", 0)
    assert shown(JobProgress(12, "stage_one")) == ("Stage I: finding the motion", 12)
    assert shown(JobProgress(65, "stage_two", 2, 7)) == ("Stage II: segment 2 of 7", 65)
    store.fail(claimed, JobFailure("invalid_input", "too dark; use a lighter one"))
    stage = studio.look(job.id)[0]
    assert stage is not None
    assert (stage["state"], stage["error"]) == ("failed", "too dark; use a lighter one")
    assert set(stage["media"]) == {"input"}


def test_a_cancelled_job_says_that_its_worker_still_stops(studio: Studio, form: Form) -> None:
    job = studio.video(form)
    claimed = studio.queue.store.claim("w", lease_seconds=60)
    assert claimed is not None
    studio.cancel(job.id)
    assert studio.look(job.id)[0]["headline"] == "Cancelled; the worker stops at its next step"  # type: ignore[index]
    studio.queue.store.let_go(claimed)
    assert studio.look(job.id)[0]["headline"] == "Cancelled"  # type: ignore[index]


def test_who_opens_the_page_sees_what_is_at_work(studio: Studio, form: Form) -> None:
    assert studio.newest() == ""
    first, second = studio.preview(form), studio.preview(form)
    assert studio.newest() == second.id
    studio.cancel(second.id)
    assert studio.newest() == first.id
    studio.cancel(first.id)
    assert studio.newest() == second.id


def test_a_removed_job_leaves_no_files(studio: Studio, form: Form) -> None:
    job = studio.preview(form)
    studio.remove(job.id)
    assert list(studio.queue.files.ids()) == []
    assert studio.look(job.id) == (None, [])
    with pytest.raises(JobError):
        studio.reuse(job.id)


def test_jobs_of_the_service_are_shown_too(studio: Studio) -> None:
    request = JobRequest(studio.model, "from elsewhere " * 20)
    job = studio.queue.submit(PIL.Image.new("RGB", (64, 64)), request, owner="ann")
    stage, (line,) = studio.look(job.id)
    assert stage is not None
    assert stage["state"] == JobState.QUEUED.value
    assert len(line["title"]) <= 90


def test_errors_of_others_are_not_spelled_out() -> None:
    assert "/secret" not in one_line(OSError("/secret/path"))
    assert one_line(SwiftI2VError("two\nlines; fix it")) == "two lines; fix it"
