"""Which clips of a folder of videos a recipe trains on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swifti2v.data.buckets import BucketOptions, make_buckets
from swifti2v.data.checked_videos import check_and_keep, read_checked
from swifti2v.data.clips import ClipOptions, plan_clips
from swifti2v.data.manifest import Manifest, ManifestOptions, read_manifest
from swifti2v.data.validation import ValidationOptions, report_of
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.training.engine.distributed import Processes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.data.clips import ClipRequest
    from swifti2v.data.report import Report

REPORT_NAME = "data.json"
CHECKED_FOLDER = "checked"


@dataclass(frozen=True)
class VideoSelection:
    """What is cut out of the videos.

    Args:
        width, height: of the clips; buckets of other aspects have the same area.
        max_aspect: of the buckets; 1: only the size itself.
        fps: of the clips.
        clips: how many of a scene, and how long.
    """

    width: int = 2560
    height: int = 1408
    max_aspect: float = 2.0
    fps: float = 16.0
    clips: ClipOptions = field(default_factory=ClipOptions)

    def requests(
        self,
        folder: Path,
        *,
        size_multiple: int,
        report: Path | None = None,
        processes: Processes | None = None,
        on_video: Callable[[int, int], None] | None = None,
    ) -> tuple[ClipRequest, ...]:
        """Return the clips that can be cut out of a folder of videos; each video is read once.

        Args:
            folder: of videos with captions (`data.manifest`).
            size_multiple: of both sides, as codec and patch need it.
            report: folder for `REPORT_NAME`, which says what was left out and why, and for what is known of each video:
                one that has not changed is not read again. None: nothing is written.
            processes: divide the videos, and have the same outcome; all have to ask. None: this one alone.
            on_video: called with the number of videos that this process has read, and of those that it has to.

        Raises:
            InvalidInputError: nothing can be used.
            LatentCacheError: what is known of the videos is damaged.
        """
        processes = processes or Processes()
        buckets = make_buckets(BucketOptions(Size(self.width, self.height), size_multiple, self.max_aspect))
        options = ValidationOptions(
            fps=self.fps, min_frames=self.clips.num_frames, min_short_side_pixels=min(min(size) for size in buckets)
        )
        listed, validated = _validated(folder, options, report, processes, on_video)
        plan = plan_clips(validated.scenes, buckets, self.clips, fps=self.fps)
        skipped = (*listed.skipped, *validated.skipped, *plan.skipped)
        outcome = replace(validated, scenes=plan.scenes, skipped=skipped)
        if report is not None and processes.is_main:
            report.mkdir(parents=True, exist_ok=True)
            outcome.write(report / REPORT_NAME)
        if not plan.requests:
            msg = f"nothing in {str(folder)!r} can be used ({outcome.counts}); see why with `swifti2v data check`"
            raise InvalidInputError(msg)
        return plan.requests


def _validated(
    folder: Path,
    options: ValidationOptions,
    output: Path | None,
    processes: Processes,
    on_video: Callable[[int, int], None] | None,
) -> tuple[Manifest, Report]:
    """Read the videos that are not known yet, each process its share of them."""
    kept = None if output is None else output / CHECKED_FOLDER
    listed, known = Manifest("", (), ()), {}
    if processes.is_main:  # the others might find another state of the folder a moment later
        listed = read_manifest(folder, ManifestOptions())
        known = {} if kept is None else read_checked(kept, listed.entries, options)
    listed, known = processes.gather((listed, known))[0]
    unknown = [entry for entry in listed.entries if entry.name not in known]
    share = unknown[processes.rank :: processes.count]
    for part in processes.gather(check_and_keep(share, options, folder=kept, on_video=on_video)):
        known |= part
    return listed, report_of(listed.entries, known, options)
