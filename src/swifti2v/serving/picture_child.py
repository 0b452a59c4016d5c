"""The child process that decodes untrusted pictures, confined in memory, files and computing time.

Run as a program by `PictureDecoder`. A request is a line of JSON on standard input; the answer is a line of JSON on
standard output, followed by the pixels if the picture could be read.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from swifti2v.errors import ImageInputError
from swifti2v.media.images import LoadedImage, load_image

if TYPE_CHECKING:
    from typing import BinaryIO

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA")  # the loader's
_MAX_OPEN_FILES = 16


def confine(memory_bytes: int) -> None:
    """Let this process take `memory_bytes` more of address space, write no file, open few, and leave no core dump."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory_bytes,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for name, limit in limits.items():
        resource.setrlimit(name, (limit, limit))


def read_picture(path: str, max_pixels: int) -> LoadedImage:
    """Return the picture in `path`; size is judged from the header.

    Raises:
        ImageInputError: it cannot be read.
        MemoryError: it has more than `max_pixels`, or needs more memory than this process may take.
    """
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=formats) as image:
                pixels = image.width * image.height
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise MemoryError from error
        except Exception:  # noqa: BLE001 - many plugins without one exception of their own; the loader will say it
            pixels = 0
    if pixels > max_pixels:
        raise MemoryError
    return load_image(path)


def allow_seconds(seconds: float) -> None:
    """Limit this process to `seconds` more of computing; the system then ends it (SIGXCPU)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def serve(requests: BinaryIO, answers: BinaryIO, *, seconds: float) -> None:
    """Answer requests until there are no more, each within `seconds` of computing."""
    for line in requests:
        allow_seconds(seconds)
        asked = json.loads(line)
        head, pixels = _answer(asked["path"], asked["max_pixels"])
        answers.write(json.dumps(head).encode() + b"\n")
        answers.write(pixels)
        answers.flush()


def _answer(path: str, max_pixels: int) -> tuple[dict[str, Any], bytes]:
    try:
        loaded = read_picture(path, max_pixels)
        image = loaded.image
        return {"width": image.width, "height": image.height, "notes": loaded.notes}, image.tobytes()
    except ImageInputError as error:
        return {"error": "invalid", "message": str(error)}, b""
    except MemoryError:
        return {"error": "too_large"}, b""


def main() -> None:
    """Confine this process, then serve; the arguments are bytes of memory and seconds of computing for a picture."""
    Image.preinit()
    Image.init()  # imports every plugin, for which there would be no memory and no open file later
    confine(int(sys.argv[1]))
    serve(sys.stdin.buffer, sys.stdout.buffer, seconds=float(sys.argv[2]))


if __name__ == "__main__":
    main()
