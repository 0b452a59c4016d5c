"""Make the videos that VBench-I2V asks for, by one process or by many; what is there already is kept.

```
run/
  run.json              model, options, seed and suite, so that another run is not mixed in
  clips*.jsonl          one line a video: seed and seconds; a file for each shard
  videos/<prompt>-<index>.mp4
```

VBench takes the extension of all videos from whichever file it lists first, so `videos` holds nothing but them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from swifti2v.errors import InvalidInputError, MemoryBudgetError, OutputError, VideoInputError, WorkDirectoryError
from swifti2v.media.atomic_files import make_folder, write_atomically
from swifti2v.memory.device_errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from swifti2v.evaluation.vbench.clips import Clip
    from swifti2v.evaluation.vbench.makers import ClipMaker, ClipShape, MakerSettings

CRF = 10
"""Quality of the files: that of VBench's own writer."""

RECORD_NAME = "clips.jsonl"
RUN_NAME = "run.json"


@dataclass(frozen=True)
class ClipRecord:
    """What making a video took.

    Args:
        video: name of the file.
        prompt, index, seed: of the `Clip`.
        num_frames, size, fps: of the file; size as ``WIDTHxHEIGHT``.
        seconds: from the start of the generation to the finished file, without loading the model.
        clips_before: videos that the process made before it; the first pays for compiling and for filling caches.
    """

    video: str
    prompt: str
    index: int
    seed: int
    num_frames: int
    size: str
    fps: float
    seconds: float
    clips_before: int


OnClip = Callable[[int, int, ClipRecord | None], None]
"""Called after each clip with the number done, of all, and the record; None for one that was there."""


class VideoRun:
    """A folder of videos of one model.

    Args:
        folder: made if it does not exist.
        identity: what decides all videos; must be that of the videos that are there.

    Raises:
        WorkDirectoryError: the folder holds videos of another model, other options or another suite.
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.videos = folder / "videos"
        self._num_made = 0
        make_folder(self.videos)
        found = self._claimed(dict(identity))
        differing = sorted(name for name in found.keys() | identity.keys() if found.get(name) != identity.get(name))
        if differing:
            msg = f"folder {str(folder)!r} holds another run (unequal: {', '.join(differing)}); choose another folder"
            raise WorkDirectoryError(msg)

    def is_made(self, clip: Clip, shape: ClipShape) -> bool:
        """Tell whether the video is there, whole.

        Raises:
            WorkDirectoryError: it is there, but of another size, length or rate.
        """
        from swifti2v.media.video_reader import VideoReader

        path = self.videos / clip.file_name
        if not path.exists():
            return False
        try:
            info = VideoReader(path).info
        except VideoInputError:  # a copy that broke off: it is made again
            return False
        if (info.size, info.num_frames, round(info.fps, 2)) != (shape.size, shape.num_frames, round(shape.fps, 2)):
            msg = (
                f"{str(path)!r} is {info.size}, {info.num_frames} frames at {info.fps:g} fps, this run makes "
                f"{shape.size}, {shape.num_frames} at {shape.fps:g}; remove it or choose another folder"
            )
            raise WorkDirectoryError(msg)
        return _num_packets(path) == shape.num_frames

    def make(self, clip: Clip, maker: ClipMaker) -> ClipRecord:
        """Make a video; its name appears when it is whole.

        Raises:
            InvalidInputError: the maker's, or if it makes another number of frames than it says.
            MemoryBudgetError: memory, the machine's or the card's, does not suffice.
            OutputError: it cannot be written.
        """
        from swifti2v.media.video_writer import VideoWriter

        shape, path = maker.shape, self.videos / clip.file_name
        started = time.perf_counter()
        with (
            memory_errors(f"to make {clip.file_name!r}; finished videos are kept"),
            VideoWriter(path, size=shape.size, fps=shape.fps, crf=CRF, keep_partial=False) as writer,
        ):
            with closing(maker.frames(clip)) as pieces:
                for frames in pieces:
                    writer.write(frames)
            if writer.num_frames != shape.num_frames:
                msg = f"{clip.file_name!r} has {writer.num_frames} frames, not {shape.num_frames}; check the model"
                raise InvalidInputError(msg)
        self._num_made += 1
        return ClipRecord(
            video=clip.file_name,
            prompt=clip.prompt,
            index=clip.index,
            seed=clip.seed,
            num_frames=shape.num_frames,
            size=str(shape.size),
            fps=shape.fps,
            seconds=round(time.perf_counter() - started, 3),
            clips_before=self._num_made - 1,
        )

    def _claimed(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Write the identity unless there is one; return the one that is there."""
        path = self.folder / RUN_NAME
        if not path.is_file():  # shards may begin at the same time
            text = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            write_atomically(path, text.encode(), writer=f".{id(self)}")
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            msg = f"{str(path)!r} is damaged; remove it if the videos beside it are of the run that is to continue"
            raise WorkDirectoryError(msg) from error


def open_run(folder: Path, settings: MakerSettings, *, seed: int) -> tuple[VideoRun, ClipMaker]:
    """Load the model and open its folder; dimensions, samples and shards may differ from call to call.

    Raises:
        WorkDirectoryError: the folder holds another run.
        CheckpointError: the model cannot be loaded.
        MemoryBudgetError: memory does not suffice for the model.
    """
    with memory_errors(f"to load {settings.model!r}"):
        maker = settings.open()
    return VideoRun(folder, {**maker.identity(), "base_seed": str(seed)}), maker


def make_videos(
    clips: Sequence[Clip],
    maker: ClipMaker,
    run: VideoRun,
    *,
    record_name: str = RECORD_NAME,
    on_clip: OnClip | None = None,
) -> int:
    """Make the videos that are not there yet; return how many were made.

    Args:
        clips: of this process (`Shard.select`).
        maker: of the frames.
        run: where they go.
        record_name: the file of records; one for each process that writes at the same time.
        on_clip: see `OnClip`.

    Raises:
        WorkDirectoryError: a video is there, but of another size, length or rate.
    """
    num_made = 0
    for done, clip in enumerate(clips, start=1):
        record = None
        if not run.is_made(clip, maker.shape):
            record = run.make(clip, maker)
            append_record(run.folder / record_name, record)
            num_made += 1
        if on_clip is not None:
            on_clip(done, len(clips), record)
    return num_made


def append_record(path: Path, record: ClipRecord) -> None:
    """Add a line to a file of records; raise `OutputError` if that is not possible."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
    except OSError as error:
        msg = f"{str(path)!r} cannot be written ({error.strerror}); free space and run again"
        raise OutputError(msg) from error


@contextmanager
def memory_errors(purpose: str) -> Iterator[None]:
    """Turn the end of memory, the machine's or the card's, into a `MemoryBudgetError` of one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        msg = (
            f"there is not enough memory {purpose}; use fewer --frames, a suite of a smaller size, or a smaller "
            "segment_size in --options"
        )
        raise MemoryBudgetError(msg) from error


def _num_packets(path: Path) -> int:
    """Count whole coded frames without decoding them: the index in front of a file speaks of those cut off too."""
    import av

    try:
        with av.open(str(path)) as container:
            return sum(1 for packet in container.demux(video=0) if packet.size and not packet.is_corrupt)
    except OSError:
        return 0
