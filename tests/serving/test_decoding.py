"""Pictures decoded in child processes: the same pixels, and a child that dies takes nothing with it."""

from __future__ import annotations

import io
import os
import resource
import signal
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import ImageInputError
from swifti2v.serving.decoding import PictureDecoder, PictureTooLargeError
from tests.serving.conftest import picture_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def decoder() -> Iterator[PictureDecoder]:
    decoder = PictureDecoder(max_pixels=1_000_000, num_children=1)
    yield decoder
    decoder.close()


def test_the_pixels_are_pillows(decoder: PictureDecoder) -> None:
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        content = picture_bytes((40, 24), kind)
        loaded = decoder.decode(content)
        expected = PIL.Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(np.asarray(loaded.image), np.asarray(expected)), kind
        assert loaded.notes == ()
    assert len(decoder.process_ids) == 1, "one process for all of them"


def test_notes_come_along(decoder: PictureDecoder) -> None:
    content = io.BytesIO()
    PIL.Image.new("L", (8, 8), 7).save(content, "PNG")
    assert decoder.decode(content.getvalue()).notes == ("converted from grayscale to RGB",)


def test_messages_name_no_path(decoder: PictureDecoder) -> None:
    with pytest.raises(ImageInputError) as caught:
        decoder.decode(b"no picture")
    assert str(caught.value).startswith("image input_reference is not a readable picture")
    assert "/" not in str(caught.value)


def test_too_many_pixels_are_judged_from_the_header(decoder: PictureDecoder) -> None:
    decoder.decode(picture_bytes((1000, 1000)))
    with pytest.raises(PictureTooLargeError, match="larger than 1 megapixels"):
        decoder.decode(picture_bytes((1000, 1001)))


def zeros(width: int, height: int) -> bytes:
    """A whole PNG of one colour: a thousandth of its size in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((3 * width + 1) * height), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_a_bomb_meets_the_limit_of_memory_in_the_child_only() -> None:
    """36 megapixels, allowed by their number, need 108 MB: more than the child may take."""
    decoder = PictureDecoder(max_pixels=50_000_000, num_children=1, memory_bytes=60 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(ImageInputError):
            decoder.decode(zeros(6000, 6000))
        grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert decoder.decode(picture_bytes()).image.size == (16, 8), "the next picture is decoded"
    finally:
        decoder.close()
    assert grown_kilobytes < 60_000


def test_a_child_that_computes_for_too_long_is_ended_by_the_system() -> None:
    """The limit is on the child's own computing, so a busy machine does not shorten it."""
    program = (
        "import io, sys\n"
        "from swifti2v.serving import picture_child\n"
        "def spin(path, max_pixels):\n"
        "    while True: pass\n"
        "picture_child.read_picture = spin\n"
        'picture_child.serve(io.BytesIO(b\'{"path": "", "max_pixels": 1}\\n\'), sys.stdout.buffer, seconds=0.1)\n'
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=120)  # noqa: S603 - our own program
    assert done.returncode == -signal.SIGXCPU


def test_a_child_that_hangs_is_killed() -> None:
    decoder = PictureDecoder(max_pixels=1_000_000, num_children=1, seconds=20)
    try:
        decoder.decode(picture_bytes())
        (first,) = decoder.process_ids
        decoder._children[0]._seconds = 0.3
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(ImageInputError, match="more memory or time"):
            decoder.decode(picture_bytes())
        decoder._children[0]._seconds = 60
        assert decoder.decode(picture_bytes()).image.size == (16, 8)
        assert decoder.process_ids != (first,)
        assert not os.path.exists(f"/proc/{first}/fd")  # noqa: PTH110 - a process
    finally:
        decoder.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_died_is_replaced(decoder: PictureDecoder, number: signal.Signals) -> None:
    decoder.decode(picture_bytes())
    (first,) = decoder.process_ids
    os.kill(first, number)
    with pytest.raises(ImageInputError):  # noqa: PT012 - it takes one picture or two
        while decoder.process_ids == (first,):  # the signal may come after the next picture
            decoder.decode(picture_bytes())
    assert decoder.decode(picture_bytes()).image.size == (16, 8)


def test_a_child_may_write_nothing_and_open_little(decoder: PictureDecoder) -> None:
    decoder.decode(picture_bytes())
    (number,) = decoder.process_ids
    assert resource.prlimit(number, resource.RLIMIT_FSIZE) == (0, 0)
    assert resource.prlimit(number, resource.RLIMIT_NOFILE) == (16, 16)
    assert resource.prlimit(number, resource.RLIMIT_CORE) == (0, 0)
    memory, _ = resource.prlimit(number, resource.RLIMIT_AS)
    with open(f"/proc/{number}/statm", encoding="ascii") as file:  # noqa: PTH123 - as above
        taken = int(file.read().split()[0]) * resource.getpagesize()
    assert taken < memory < taken + (200 << 20)


def test_several_at_once_share_the_children() -> None:
    decoder = PictureDecoder(max_pixels=1_000_000, num_children=2)
    try:
        with ThreadPoolExecutor(6) as pool:
            sizes = [(8 + number, 8) for number in range(24)]
            loaded = list(pool.map(lambda size: decoder.decode(picture_bytes(size)), sizes))
        assert [picture.image.size for picture in loaded] == sizes
        assert 1 <= len(decoder.process_ids) <= 2
    finally:
        decoder.close()
    assert decoder.process_ids == ()


def test_what_it_costs(decoder: PictureDecoder, record_property: Callable[[str, object], None]) -> None:
    import time

    decoder.decode(picture_bytes())
    content = picture_bytes((1280, 704), "JPEG")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        decoder.decode(content)
        times.append(time.perf_counter() - started)
    record_property("milliseconds_1280x704_jpeg", round(1000 * min(times), 1))
    assert min(times) < 5
