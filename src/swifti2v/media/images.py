"""The input image: read a picture file of any usual kind as sRGB, say what was done to it, fit it to an output size.

A file that cannot be used is an `ImageInputError` whose one line names the fix. What can be handled is handled and
said in `LoadedImage.notes`. Pillow does the decoding; size and number of frames are judged from the header, before
any pixel is decoded, and Pillow's own warnings never reach the caller.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from swifti2v.errors import ImageInputError, InvalidInputError
from swifti2v.geometry import Size

if TYPE_CHECKING:
    import os

    from torch import Tensor

MAX_PIXELS = 100_000_000
"""Larger images are refused from their header alone."""

MAX_ENLARGEMENT = 4.0
"""Beyond this factor `fit_notes` says that the image is small for the output."""

# A closed list: among the other formats that Pillow opens, some start programs (EPS runs Ghostscript).
# (A camera's MPO file opens as JPEG.)
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA")
_KINDS = "JPEG, PNG, WebP, AVIF, TIFF, BMP or GIF"
_MOVING_FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_ORIENTATION_TAG = 0x0112
# What Pillow's decoders raise on damaged files: they are many plugins without one exception of their own.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error)


@dataclass(frozen=True)
class LoadedImage:
    """An input image and what was done to make it one.

    Args:
        image: mode RGB, sRGB colors, upright.
        notes: one clause per thing that was handled ("rotated by its EXIF orientation"), in the order it was done.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def load_image(path: str | os.PathLike[str]) -> LoadedImage:
    """Read the picture in `path` as an upright RGB image.

    Handled and noted: EXIF orientation, embedded color profiles, CMYK, alpha (laid on white), 16 bits, grayscale,
    palettes, the second picture of a camera's MPO file.

    Raises:
        ImageInputError: the file is missing, unreadable, empty, truncated, damaged, not a picture, animated,
            of several pages, or larger than `MAX_PIXELS`.
    """
    path = Path(path)
    with _opened(path) as file, _quiet_pillow():
        image = _header(path, file)
        _check_size(path, image)
        notes = _check_frames(path, image)
        return _converted(path, image, notes)


def as_loaded_image(image: Image.Image | str | os.PathLike[str]) -> LoadedImage:
    """Return a picture, or the one in a file, as an upright RGB image; both are treated alike.

    Raises:
        ImageInputError: as `load_image` does; of a picture, damaged or 32-bit pixels.
        InvalidInputError: it is neither a picture of Pillow nor a path.
    """
    if isinstance(image, Image.Image):
        with _quiet_pillow():
            return _converted(Path(getattr(image, "filename", "") or "in memory"), image, [])
    if not isinstance(image, str | Path):
        msg = (
            f"the image is a {type(image).__name__}; give a path or a PIL image, of an array for instance "
            "PIL.Image.fromarray(array) with uint8 [height, width, 3]"
        )
        raise InvalidInputError(msg)
    return load_image(image)


def fit_image(image: Image.Image, size: Size) -> Image.Image:
    """Return `image` cut to the aspect of `size` about its center and resampled to it (Lanczos, antialiased)."""
    if image.size == tuple(size):
        return image.copy()
    return image.resize((size.width, size.height), Image.Resampling.LANCZOS, box=_crop_box(image, size))


def fit_notes(image: Image.Image, size: Size) -> tuple[str, ...]:
    """Say what `fit_image` does to the picture where it shows: more than 1% cut away, a strong enlargement."""
    left, _top, right, _bottom = _crop_box(image, size)
    kept = _kept(image, size)
    enlargement = size.width / (right - left)
    notes = []
    if kept < 0.99:
        note = f"cut to the aspect of {size} about its center ({100 * (1 - kept):.0f}% of the picture left out)"
        turned = Size(size.height, size.width)
        if _kept(image, turned) > kept + 0.01:
            note += f"; a size of {turned} would leave out less"
        notes.append(note)
    if enlargement > MAX_ENLARGEMENT:
        notes.append(f"enlarged {enlargement:.1f} times to {size}: a larger picture would give more detail")
    return tuple(notes)


def image_to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB image as a float32 tensor [3, H, W] in [-1, 1]; raise `InvalidInputError` for another mode."""
    import torch

    if image.mode != "RGB":
        msg = f"image has mode {image.mode}; load it with load_image, which returns RGB"
        raise InvalidInputError(msg)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def _converted(path: Path, image: Image.Image, notes: list[str]) -> LoadedImage:
    """Decode an opened picture and bring it to upright RGB; `notes` are those of its header."""
    sixteen_bits = _has_sixteen_bits(image)
    try:
        image.load()
    except (*_DECODING_ERRORS, Image.DecompressionBombError) as error:
        raise _unreadable(path, f"is truncated or damaged ({_first_line(error)})", "export or copy it again") from error
    if sixteen_bits:
        notes.append("reduced from 16 to 8 bits per channel")
    upright = _upright(image, notes)
    try:
        return LoadedImage(_as_rgb(path, upright, notes), tuple(notes))
    except _DECODING_ERRORS as error:
        if isinstance(error, ImageInputError):
            raise
        why = f"has pixels of kind {upright.mode} that cannot be read as RGB"
        raise _unreadable(path, why, "convert it to an 8-bit RGB JPEG or PNG") from error


def _crop_box(image: Image.Image, size: Size) -> tuple[float, float, float, float]:
    scale = max(size.width / image.width, size.height / image.height)
    width, height = min(size.width / scale, image.width), min(size.height / scale, image.height)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return left, top, left + width, top + height


def _kept(image: Image.Image, size: Size) -> float:
    """Share of the picture that is left when it is cut to the aspect of `size`."""
    left, top, right, bottom = _crop_box(image, size)
    return (right - left) * (bottom - top) / (image.width * image.height)


def _unreadable(path: Path, problem: str, fix: str) -> ImageInputError:
    return ImageInputError(f"image {str(path)!r} {problem}; {fix}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keep Pillow's warnings (large pictures, odd metadata) in: what matters of them becomes an error or a note."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.is_dir():
        raise _unreadable(path, "is a folder", "give the path of a picture file")
    if not path.exists():
        raise _unreadable(path, "does not exist", "check the path")
    if not path.is_file():
        raise _unreadable(path, "is not a regular file", "save the picture to a file first")
    try:
        file = path.open("rb")
    except OSError as error:
        raise _unreadable(path, f"cannot be opened ({error.strerror})", "check its permissions") from error
    with file:
        if not file.read(1):
            raise _unreadable(path, "is empty (zero bytes)", "export or copy it again")
        file.seek(0)
        yield file


def _header(path: Path, file: BinaryIO) -> Image.Image:
    Image.init()  # registers the plugins; a build of Pillow may lack some, AVIF for one
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        return Image.open(file, formats=formats)
    except Image.DecompressionBombError as error:
        raise _too_large(path, "far more") from error
    except UnidentifiedImageError as error:
        file.seek(4)
        if file.read(8) in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
            raise _unreadable(path, "is a HEIC picture, which is not supported", "export it as JPEG or PNG") from error
        raise _unreadable(path, "is not a readable picture", f"give a {_KINDS} file") from error
    except _DECODING_ERRORS as error:
        raise _unreadable(path, f"has a damaged header ({_first_line(error)})", "export or copy it again") from error


def _too_large(path: Path, amount: str) -> ImageInputError:
    limit = MAX_PIXELS // 1_000_000
    return _unreadable(
        path, f"is too large: {amount} than {limit} megapixels", "scale it down, for instance to 4096 pixels wide"
    )


def _check_size(path: Path, image: Image.Image) -> None:
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise _too_large(path, f"{image.width}x{image.height} = {pixels / 1e6:.0f} megapixels, more")


def _check_frames(path: Path, image: Image.Image) -> list[str]:
    """Return the notes so far: a camera's MPO file holds the photograph first, then a preview or the other eye."""
    try:
        num_frames = int(getattr(image, "n_frames", 1))
        image.seek(0)
    except _DECODING_ERRORS as error:
        raise _unreadable(path, f"is truncated or damaged ({_first_line(error)})", "export or copy it again") from error
    if num_frames <= 1:
        return []
    if image.format in _MOVING_FORMATS:
        raise _unreadable(path, f"is animated ({num_frames} frames)", "pass one frame of it, saved as PNG or JPEG")
    if image.format == "MPO":
        return [f"took the first of the {num_frames} pictures in the file"]
    raise _unreadable(path, f"has {num_frames} pages", "pass one of them, saved as PNG or JPEG")


def _has_sixteen_bits(image: Image.Image) -> bool:
    """Whether the file stores 16 bits per channel; asked before loading, which forgets it (the raw mode of a tile)."""
    if image.mode.startswith("I"):
        return True
    modes = [tile[3] if isinstance(tile[3], str) else tile[3] and tile[3][0] for tile in getattr(image, "tile", ())]
    return any(isinstance(mode, str) and ";16" in mode for mode in modes)


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        upright = ImageOps.exif_transpose(image)
    except _DECODING_ERRORS:
        notes.append("left as stored: its EXIF orientation cannot be read")
        return image
    if orientation in range(2, 9):
        notes.append("rotated by its EXIF orientation")
    return upright


def _as_rgb(path: Path, image: Image.Image, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    colors, alpha = _split_alpha(_eight_bits(path, image), notes)
    if colors.mode == "L":
        notes.append("converted from grayscale to RGB")
    elif colors.mode != "RGB":
        notes.append(f"converted from {colors.mode} to RGB")
    converted = _by_profile(colors, profile, notes) if profile else None
    rgb = converted or colors.convert("RGB")
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append("transparent parts laid on white")
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    rgb.info = {}  # the profile and the transparency have been applied: they must not be applied again
    return rgb


def _eight_bits(path: Path, image: Image.Image) -> Image.Image:
    """Bring deep grayscale to 8 bits by scaling (Pillow's own conversion clips it)."""
    if image.mode == "1":
        return image.convert("L")
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise _unreadable(path, f"has 32-bit pixels (mode {image.mode})", "convert it to an 8-bit or 16-bit picture")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _split_alpha(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Return the colors (no palette, no alpha) and the alpha channel, if there is one."""
    transparent = "transparency" in image.info or image.mode in ("PA", "LA", "La", "RGBA", "RGBa")
    if image.mode in ("P", "PA"):
        notes.append("converted from a color palette")
    if not transparent:
        return (image.convert("RGB") if image.mode == "P" else image), None
    gray = image.mode in ("L", "LA", "La")
    with_alpha = image.convert("RGBA")
    return with_alpha.convert("L" if gray else "RGB"), with_alpha.getchannel("A")


def _by_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image | None:
    """Convert to sRGB through the embedded profile; None where it already is sRGB or cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(source).strip()
        if "srgb" in name.lower():
            return None
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *_DECODING_ERRORS):
        notes.append("colors taken as sRGB: its embedded color profile cannot be used")
        return None
    notes.append(f"colors converted to sRGB from the embedded profile {name!r}")
    return converted
