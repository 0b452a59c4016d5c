"""Decode untrusted pictures in child processes with limits of memory and time.

Decoders are C code with a history of flaws, and a picture of a few kilobytes may unfold to gigabytes. What goes wrong
in a child (`picture_child.py`) ends the child; the service answers that the picture cannot be used, and starts another.
Children have limits of memory, files and time; they are not cut off from the network or from files that can be read.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from swifti2v.errors import ImageInputError
from swifti2v.media.images import LoadedImage

if TYPE_CHECKING:
    from collections.abc import Iterator

# The loader holds a picture in up to five copies of four bytes a pixel on its way to RGB; the rest is for decoders.
BYTES_PER_PIXEL = 24
SPARE_BYTES = 96 << 20

PATIENCE = 6

_PIPE_BYTES = 1 << 20
_CHILD = "swifti2v.serving.picture_child"


class PictureTooLargeError(ImageInputError):
    """A picture has too many pixels, or needs too much memory to be decoded."""


class PictureDecoder:
    """Decodes pictures in `num_children` processes at most, which are started when they are needed, and kept.

    Args:
        max_pixels: of a picture; judged from its header.
        seconds: of computing that a picture may take; on a busy machine that may be `PATIENCE` times as long.
        num_children: pictures that are decoded at once.
        memory_bytes: that a process may take beyond its own start; default: what `max_pixels` need.
    """

    def __init__(
        self, *, max_pixels: int, seconds: float = 10.0, num_children: int = 2, memory_bytes: int | None = None
    ) -> None:
        self._max_pixels = max_pixels
        needed = BYTES_PER_PIXEL * max_pixels + SPARE_BYTES
        self._free: queue.LifoQueue[_Child] = queue.LifoQueue()
        self._children = [_Child(memory_bytes or needed, seconds) for _ in range(num_children)]
        for child in self._children:
            self._free.put(child)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Ids of the running processes."""
        return tuple(child.process.pid for child in self._children if child.process is not None)

    def decode(self, content: bytes) -> LoadedImage:
        """Return the picture in the bytes of a file; waits while all processes are at work.

        Raises:
            PictureTooLargeError: it has too many pixels, or needs too much memory.
            ImageInputError: it cannot be read, or not in time.
        """
        with tempfile.NamedTemporaryFile(prefix="swifti2v-upload-") as file:
            file.write(content)
            file.flush()
            with self._child() as child:
                head, pixels = child.ask({"path": file.name, "max_pixels": self._max_pixels})
            if head.get("error") == "too_large":
                msg = f"the picture is larger than {self._max_pixels / 1e6:.0f} megapixels; scale it down"
                raise PictureTooLargeError(msg)
            if "error" in head:
                raise ImageInputError(head["message"].replace(repr(file.name), "input_reference"))
        image = Image.frombytes("RGB", (head["width"], head["height"]), pixels)
        return LoadedImage(image, tuple(head["notes"]))

    def close(self) -> None:
        """End the processes; a later `decode` starts new ones."""
        for child in self._children:
            child.end()

    @contextmanager
    def _child(self) -> Iterator[_Child]:
        child = self._free.get()
        try:
            yield child
        finally:
            self._free.put(child)


class _Child:
    """One child process, which is started again after it has died."""

    def __init__(self, memory_bytes: int, seconds: float) -> None:
        self._command = [sys.executable, "-m", _CHILD, str(memory_bytes), str(seconds)]
        self._seconds = PATIENCE * seconds
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Return the head of the answer, and the pixels; raise `ImageInputError` if the process dies of it."""
        process = self.process = self.process or self._start()
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        try:
            return _exchange(process, request)
        except (OSError, ValueError, EOFError) as error:
            self.end()
            msg = "image input_reference takes more memory or time to decode than it may; export it again"
            raise ImageInputError(msg) from error
        finally:
            timer.cancel()

    def end(self) -> None:
        """Kill the process."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # a question that was never read
                    continue

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - our own program
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pipesize=_PIPE_BYTES,
        )


def _exchange(process: subprocess.Popen[bytes], request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    questions, answers = process.stdin, process.stdout
    if questions is None or answers is None:
        raise EOFError
    questions.write(json.dumps(request).encode() + b"\n")
    questions.flush()
    head: dict[str, Any] = json.loads(answers.readline())
    num_bytes = 3 * head.get("width", 0) * head.get("height", 0)
    pixels = answers.read(num_bytes)
    if len(pixels) != num_bytes:
        raise EOFError
    return head, pixels
