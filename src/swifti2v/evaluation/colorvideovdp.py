"""ColorVideoVDP with the truth, frame by frame, by the package cvvdp in a Python environment of its own.

The package (MIT, with its parameters) is never imported here: it needs torchvision, whose builds on PyPI bring CUDA.
The user names the interpreter, which is given the very frames that all other measures see, one pair after the other
through a pipe: it needs no FFmpeg, nothing is written to disk, and memory does not grow with the video.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.evaluation.interpreter import find_interpreter, last_line

if TYPE_CHECKING:
    from collections.abc import Iterable

    from swifti2v.geometry import Size

Array = np.ndarray[Any, Any]

DISPLAY = "standard_4k"
"""The viewer's screen: 30 inches, 3840x2160, 200 cd/m2, in an office, seen from twice its height."""

INSTALL = "python -m venv cvvdp && cvvdp/bin/pip install cvvdp==0.5.7"
"""What makes the environment; its interpreter is then ``cvvdp/bin/python``."""

_ANSWER = "JOD"

# The JOD of a frame is that of a video of such frames: of two, because one alone counts as a photograph.
_MEASURE = """
import json, sys
import numpy, pycvvdp, torch
from pycvvdp.video_source import numpy2torch_frame, video_source_dm

job = json.loads(sys.argv[1])
metric = pycvvdp.cvvdp(display_name=job["display"], quiet=True)

class Pipe(video_source_dm):
    def __init__(self):
        super().__init__(display_photometry=job["display"])
        self.num_read, self.waiting = 0, {}

    def get_video_size(self):
        return job["height"], job["width"], job["num_frames"]

    def get_frames_per_second(self):
        return job["fps"]

    def get_test_frame(self, frame, device, colorspace):
        return self.get(frame, 0, device, colorspace)

    def get_reference_frame(self, frame, device, colorspace):
        return self.get(frame, 1, device, colorspace)

    def get(self, frame, part, device, colorspace):
        while frame >= self.num_read:
            for each in range(2):
                pixels = sys.stdin.buffer.read(job["height"] * job["width"] * 3)
                self.waiting[self.num_read, each] = numpy.frombuffer(pixels, numpy.uint8)
            self.num_read += 1
        pixels = self.waiting.pop((frame, part)).reshape(job["height"], job["width"], 3)
        return self.apply_dm_and_color_transform(numpy2torch_frame(pixels, 0, device, dim_order="HWC"), colorspace)

answer = {"conditions": metric.get_info_string()}
if job["num_frames"]:
    total, details = metric.predict_video_source(Pipe())
    bands = torch.as_tensor(details["Q_per_ch"], device=metric.device)
    jods = [metric.do_pooling_and_jods(bands[:, :, [t] * min(2, len(bands[0, 0]))]) for t in range(job["num_frames"])]
    answer.update(total=float(total), frames=[float(jod) for jod in jods])
print("\\nJOD" + json.dumps(answer))
"""


class JodScores(NamedTuple):
    """Quality in just-objectionable differences: 10 where none is visible, less where one is, below 0 where all is.

    Args:
        total: of the video.
        frames: of a video of which every frame is like this one, for each frame; a defect shows with the delay of the
            eye's response, about an eighth of a second.
    """

    total: float
    frames: tuple[float, ...]


@dataclass(frozen=True)
class ColorVideoVdp:
    """ColorVideoVDP as the user has it (`open_colorvideovdp`).

    Args:
        python: the interpreter of its environment.
        conditions: version and display, which its authors ask to be reported with every number.
    """

    python: str
    conditions: str

    def scores(self, pairs: Iterable[tuple[Array, Array]], *, size: Size, fps: float, num_frames: int) -> JodScores:
        """Return the quality of a video beside its truth; on a card if PyTorch finds one there.

        Args:
            pairs: frame and truth, uint8 RGB [H, W, 3], sRGB.
            size: of all frames.
            fps: frames per second.
            num_frames: that `pairs` has.

        Raises:
            InvalidInputError: the process failed; the message has its last words.
            MemoryBudgetError: it ran out of memory.
        """
        job = {"width": size.width, "height": size.height, "fps": fps, "num_frames": num_frames}
        answer = _ask(self.python, job, pairs)
        return JodScores(answer["total"], tuple(answer["frames"]))


def open_colorvideovdp(python: str) -> ColorVideoVdp:
    """Return ColorVideoVDP after a start of its interpreter.

    Args:
        python: a path, or a name on the search path.

    Raises:
        InvalidInputError: no such interpreter, or one without cvvdp; the message says how to make its environment.
    """
    answer = _ask(python, {"num_frames": 0}, ())
    return ColorVideoVdp(python, answer["conditions"].strip('"'))


def _ask(python: str, job: dict[str, Any], pairs: Iterable[tuple[Array, Array]]) -> dict[str, Any]:
    """Start the process, feed it, return its answer."""
    path = find_interpreter(python, owner="ColorVideoVDP")
    command = [path, "-W", "ignore", "-c", _MEASURE, json.dumps({"display": DISPLAY, **job})]
    with tempfile.TemporaryFile() as words:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=words, stderr=subprocess.STDOUT) as process:  # noqa: S603 - the interpreter that the user named
            try:
                _feed(process, pairs)
            except BaseException:  # Ctrl-C, a damaged video: nothing more will come
                process.kill()
                raise
        words.seek(0)
        said = words.read().decode("utf-8", errors="replace")
    answers = [line for line in said.splitlines() if line.startswith(_ANSWER)]
    if process.returncode == 0 and answers:
        return dict(json.loads(answers[-1].removeprefix(_ANSWER)))
    if "out of memory" in said or process.returncode == -9:
        msg = f"ColorVideoVDP ran out of memory ({last_line(said)}); judge smaller videos, or without --cvvdp"
        raise MemoryBudgetError(msg)
    msg = f"{python!r} cannot run ColorVideoVDP ({last_line(said)}); make its environment with: {INSTALL}"
    raise InvalidInputError(msg)


def _feed(process: subprocess.Popen[bytes], pairs: Iterable[tuple[Array, Array]]) -> None:
    pipe = process.stdin
    if pipe is None:
        return
    with suppress(BrokenPipeError), pipe:  # a process that has ended says why in its last words
        for frame, truth in pairs:
            pipe.write(np.ascontiguousarray(frame).data)
            pipe.write(np.ascontiguousarray(truth).data)
