"""Which clips of a folder of videos a recipe trains on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from swifti2v.data.buckets import BucketOptions, make_buckets
from swifti2v.data.clips import ClipOptions, plan_clips
from swifti2v.data.manifest import ManifestOptions, read_manifest
from swifti2v.data.validation import ValidationOptions, validate_videos
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from swifti2v.data.clips import ClipRequest

REPORT_NAME = "data.json"


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
        on_video: Callable[[int, int], None] | None = None,
    ) -> tuple[ClipRequest, ...]:
        """Read every video of a folder once and return the clips that can be cut.

        Args:
            folder: of videos with captions (`data.manifest`).
            size_multiple: of both sides, as codec and patch need it.
            report: folder for `REPORT_NAME`, which says what was left out and why; None: not written.
            on_video: called with the number of videos read and of all.

        Raises:
            InvalidInputError: nothing can be used.
        """
        buckets = make_buckets(BucketOptions(Size(self.width, self.height), size_multiple, self.max_aspect))
        options = ValidationOptions(
            fps=self.fps, min_frames=self.clips.num_frames, min_short_side_pixels=min(min(size) for size in buckets)
        )
        listed = read_manifest(folder, ManifestOptions())
        validated = validate_videos(listed.entries, options, on_video=on_video)
        plan = plan_clips(validated.scenes, buckets, self.clips, fps=self.fps)
        skipped = (*listed.skipped, *validated.skipped, *plan.skipped)
        outcome = replace(validated, scenes=plan.scenes, skipped=skipped)
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            outcome.write(report / REPORT_NAME)
        if not plan.requests:
            msg = f"nothing in {str(folder)!r} can be used ({outcome.counts}); see why with `swifti2v data check`"
            raise InvalidInputError(msg)
        return plan.requests
