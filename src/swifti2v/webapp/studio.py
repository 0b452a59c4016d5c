"""What the buttons of the app do, without the app: every function takes and returns plain values."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swifti2v.errors import InvalidInputError, JobError
from swifti2v.jobs.state import ACTIVE_STATES, Job, JobRequest
from swifti2v.media.images import load_image
from swifti2v.pipelines.loading import settings_of
from swifti2v.settings import plain_choices
from swifti2v.webapp.presets import Preset, preset_of, size_choices, summary
from swifti2v.webapp.views import job_view, library_view

if TYPE_CHECKING:
    from swifti2v.jobs.queue import JobQueue
    from swifti2v.memory.networks import PipelineNetworks

MAX_LISTED = 40
_SEED_LIMIT = 2**31  # short enough to be read out, and far more than anybody will try


@dataclass(frozen=True)
class Form:
    """What the user has filled in.

    Args:
        image: path of the picture that was dropped.
        prompt: what should move, and how.
        size: of the video, WIDTHxHEIGHT.
        num_frames: pixel frames, 4k+1; None for the checkpoint's.
        num_inference_steps: of Stage II; None for the checkpoint's.
        seed: None to draw one, which is then kept with the job.
    """

    image: str | None = None
    prompt: str = ""
    size: str = ""
    num_frames: float | None = None
    num_inference_steps: float | None = None
    seed: float | None = None


class Studio:
    """The app's side of the queue.

    Args:
        queue: whose workers make the videos.
        model: checkpoint, by the name that the workers have.
        dimensions: of its networks, for the plan; None where they are not known without loading.
        few_step: how the workers have loaded Stage I.

    Raises:
        CheckpointError: there is no such checkpoint.
    """

    def __init__(
        self, queue: JobQueue, model: str, *, dimensions: PipelineNetworks | None = None, few_step: bool = True
    ) -> None:
        self.queue = queue
        self.model = model
        self.defaults = settings_of(model, few_step=few_step)
        self._dimensions = dimensions

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes to choose from, as the form writes them."""
        return tuple(map(str, size_choices(self.defaults)))

    def preset(self, label: str) -> Preset:
        """Return what a card is given."""
        if self._dimensions is None:
            return Preset(label, self.defaults.size, self.defaults.num_frames, _NO_PLAN)
        return preset_of(label, self._dimensions, self.defaults)

    def plan(self, label: str, form: Form) -> str:
        """Say what the form's run takes on a card, or what is wrong with the form."""
        if self._dimensions is None:
            return _NO_PLAN
        choices = self._choices(form)
        shown = {name: choices[name] for name in ("size", "num_frames", "num_inference_steps")}
        return summary(label, self._dimensions, self.defaults, **shown)

    def preview(self, form: Form) -> Job:
        """Queue the motion preview of a form.

        Raises:
            InvalidInputError: the picture or a value cannot be used.
            QueueFullError: the queue takes no more.
            OutputError: the picture cannot be kept.
        """
        return self._submit(form, preview=True)

    def video(self, form: Form) -> Job:
        """Queue the video of a form at once; raises as `preview`."""
        return self._submit(form, preview=False)

    def go_on(self, job_id: str) -> Job:
        """Queue the video of a finished preview, which begins with the motion that was seen.

        Raises:
            JobError: there is no such preview, or it is not finished.
            QueueFullError, OutputError: as `preview`.
        """
        return self.queue.continue_preview(job_id)

    def another_motion(self, job_id: str) -> Job:
        """Queue a preview of the same picture, prompt and settings with another seed; raises as `go_on`."""
        job = self.queue.store.get(job_id)
        options = {**job.request.options, "seed": secrets.randbelow(_SEED_LIMIT)}
        request = replace(job.request, preview=True, options=options)
        return self.queue.submit(load_image(self._picture(job)).image, request, owner=job.owner)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that waits or runs; its worker stops at its next step. Raises `JobError` if there is none."""
        return self.queue.store.cancel(job_id)

    def remove(self, job_id: str) -> None:
        """Remove a job and its files; one at work is cancelled first. Raises `JobError` if there is none."""
        self.queue.remove(job_id)

    def reuse(self, job_id: str) -> Form:
        """Return the form that a job came from, its seed included; raises `JobError` if its picture is gone."""
        job = self.queue.store.get(job_id)
        options = self.defaults.settled(job.request.options)
        return Form(
            image=str(self._picture(job)),
            prompt=job.request.prompt,
            size=str(options.size),
            num_frames=options.num_frames,
            num_inference_steps=options.num_inference_steps,
            seed=options.seed,
        )

    def newest(self) -> str:
        """Return the job to show first: the newest that waits or runs, else the newest; empty if there is none."""
        jobs = self.queue.store.list(limit=1, states=ACTIVE_STATES) or self.queue.store.list(limit=1)
        return jobs[0].id if jobs else ""

    def look(self, job_id: str) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return what the stage shows of a job, None if it is gone, and the lines of queue and history."""
        try:
            stage = job_view(self.queue, self.queue.store.get(job_id)) if job_id else None
        except JobError:
            stage = None
        return stage, library_view(self.queue, self.queue.store.list(limit=MAX_LISTED), current=job_id)

    def _submit(self, form: Form, *, preview: bool) -> Job:
        if not form.image:
            msg = "there is no picture yet; drop one into the field, or choose a file"
            raise InvalidInputError(msg)
        loaded = load_image(form.image)
        choices = plain_choices(self._choices(form))
        request = JobRequest(self.model, form.prompt, choices, loaded.notes, preview=preview, keep_motion=True)
        return self.queue.submit(loaded.image, request)

    def _choices(self, form: Form) -> dict[str, Any]:
        """Return the settings of a form with every choice settled, so that a job says all that it was made of."""
        seed = secrets.randbelow(_SEED_LIMIT) if form.seed is None else _whole("seed", form.seed)
        wanted = {
            "size": form.size.strip() or None,
            "num_frames": None if form.num_frames is None else _whole("frames", form.num_frames),
            "num_inference_steps": (
                None if form.num_inference_steps is None else _whole("steps", form.num_inference_steps)
            ),
            "seed": seed,
        }
        settled = self.defaults.settled(wanted)
        return {name: getattr(settled, name) for name in (*wanted, "fps")}

    def _picture(self, job: Job) -> Path:
        path = self.queue.files.input(job.id)
        if not path.is_file():
            msg = "the picture of this job is gone; drop it into the form again"
            raise JobError(msg)
        return path


_NO_PLAN = "No plan: the parts of this checkpoint are not on this machine yet; a first run downloads them."


def _whole(name: str, value: float) -> int:
    if value != int(value):
        msg = f"{name} is {value}; write a whole number"
        raise InvalidInputError(msg)
    return int(value)
