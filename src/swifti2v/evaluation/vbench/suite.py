"""The images and prompts of VBench-I2V, read from the benchmark's own files in a checkout that the user names.

`prepare_suite` makes a folder of the pictures that condition the videos, which is also laid out as VBench looks for
them, relative to the folder it is started in, so that nothing is written into the checkout:

```
suite/
  suite.json                                    size, where the pictures come from, prompts
  vbench2_beta_i2v/data/crop/20-11/<image>.jpg  each picture in exactly the size of the video
```

The suite's four crops (1:1, 8:5, 7:4, 16:9) keep the subject. For a size between or beside them the nearest is taken
and cut about its center: 2560x1408 is 16:9 with 16 of 1440 rows cut away above and below. Nothing is squeezed.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swifti2v.errors import ImageInputError, InvalidInputError
from swifti2v.evaluation.vbench.total import DIMENSION_NAMES
from swifti2v.geometry import Size
from swifti2v.media.atomic_files import make_folder, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import PIL.Image

PROMPTS_PATH = "vbench2_beta_i2v/vbench2_i2v_full_info.json"
DATA_PATH = "vbench2_beta_i2v/data"
SUITE_NAME = "suite.json"
FORMAT = 1
NUM_PROMPTS = 1118
"""Prompts of the benchmark, of 2026-03: 355 pictures, of which 109 have seven prompts of camera motion more."""

CROPS: Mapping[str, float] = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
MAX_CUT = 0.1
"""Share of a crop that may be cut away to reach the video's aspect: beyond it, the subject may be lost."""

_JPEG: Mapping[str, Any] = {"format": "JPEG", "quality": 98, "subsampling": 0}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class SuitePrompt:
    """One entry of the benchmark.

    Args:
        prompt: unique; the names of its videos begin with it.
        dimensions: that its videos are judged in; dimensions outside the I2V score are left out.
        image_name: of its picture.
        image_type: subject matter, for instance `animal`.
    """

    prompt: str
    dimensions: tuple[str, ...]
    image_name: str
    image_type: str


@dataclass(frozen=True)
class Suite:
    """A folder made by `prepare_suite`.

    Args:
        folder: where it is.
        size: of the pictures, and of the videos to be made.
        crop: of the suite, that the pictures were cut from; `custom` for a folder of the user's.
        prompts: of the benchmark, in its order.
        commit: of the checkout, None if it is not under git.
        notes: a clause for each thing to be known of the pictures.
    """

    folder: Path
    size: Size
    crop: str
    prompts: tuple[SuitePrompt, ...]
    commit: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> str:
        """Name of the folder of pictures, which VBench wants to be told: ``20-11``."""
        return ratio_name(self.size)

    @property
    def images(self) -> Path:
        """The folder of pictures."""
        return self.folder / DATA_PATH / "crop" / self.ratio

    def image_of(self, prompt: SuitePrompt) -> Path:
        """Return the picture of an entry."""
        return self.images / prompt.image_name


def ratio_name(size: Size) -> str:
    """Return the aspect in lowest terms, ``20-11`` for 2560x1408."""
    divisor = math.gcd(*size)
    return f"{size.width // divisor}-{size.height // divisor}"


def nearest_crop(size: Size) -> str:
    """Return the suite's crop that loses least when cut to the aspect of `size`.

    Raises:
        InvalidInputError: more than `MAX_CUT` would be cut away.
    """
    aspect = size.width / size.height
    name = min(CROPS, key=lambda crop: _cut_share(CROPS[crop], aspect))
    cut = _cut_share(CROPS[name], aspect)
    if cut > MAX_CUT:
        msg = (
            f"{size} would lose {100 * cut:.0f}% of the suite's nearest crop ({name}); use a size nearer to one of "
            f"{', '.join(CROPS)}, or give --images with pictures from VBench's crop_to_diff_ratio.py"
        )
        raise InvalidInputError(msg)
    return name


def read_prompts(checkout: Path) -> tuple[SuitePrompt, ...]:
    """Return the entries of the benchmark in a checkout of Vchitect/VBench.

    Raises:
        InvalidInputError: it is no such checkout (the PyPI package lacks the list), or the list is of another form.
    """
    path = checkout / PROMPTS_PATH
    if not path.is_file():
        msg = f"{str(path)!r} does not exist; give a git checkout of Vchitect/VBench (the PyPI package lacks the files)"
        raise InvalidInputError(msg)
    entries = _read_json(path)
    if not isinstance(entries, list) or not entries:
        msg = f"{str(path)!r} is not a list of prompts; check the checkout out again"
        raise InvalidInputError(msg)
    prompts = tuple(_prompt(path, number, entry) for number, entry in enumerate(entries))
    names = [entry.prompt for entry in prompts]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        msg = f"{str(path)!r} holds the prompt {twice!r} twice, and videos are named by it; check it out again"
        raise InvalidInputError(msg)
    return prompts


def prepare_suite(
    checkout: Path,
    folder: Path,
    *,
    size: Size,
    images: Path | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Suite:
    """Cut every picture to `size` and write the suite; pictures that are there already are kept.

    Args:
        checkout: of Vchitect/VBench, with the data of its `download_data.sh` (or `images`).
        folder: of the suite, made if it does not exist.
        size: of the videos.
        images: a folder with the pictures by their names, instead of the checkout's.
        on_image: called with the number done and the number of all.

    Raises:
        InvalidInputError: no such checkout, an unfit size, or a folder that holds a suite of another size.
        ImageInputError: a picture is missing or unreadable.
        OutputError: the folder cannot be written.
    """
    from swifti2v.media.images import fit_image

    prompts = read_prompts(checkout)
    crop = nearest_crop(size) if images is None else "custom"
    source = _Pictures.of(checkout, crop) if images is None else _Pictures(images, images, {}, crop)
    suite = Suite(folder, size, crop, prompts, checkout_commit(checkout), _suite_notes(prompts))
    _check_same_suite(suite)
    names = sorted({entry.image_name for entry in prompts})
    make_folder(suite.images)
    # The list first, so that an interrupted suite is not continued at another size.
    content = {"format": FORMAT, **asdict(suite)}
    del content["folder"]
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / SUITE_NAME, text.encode())
    for done, name in enumerate(names, start=1):
        target = suite.images / name
        if not target.is_file():
            picture = fit_image(source.picture(name, size), size)
            with io.BytesIO() as file:
                picture.save(file, **({"format": "PNG"} if target.suffix.lower() == ".png" else _JPEG))
                write_atomically(target, file.getvalue())
        if on_image is not None:
            on_image(done, len(names))
    return suite


def load_suite(folder: Path) -> Suite:
    """Read what `prepare_suite` wrote; raise `InvalidInputError` if it is not there, or pictures are missing."""
    path = folder / SUITE_NAME
    if not path.is_file():
        msg = f"folder {str(folder)!r} holds no suite; make one with `swifti2v vbench prepare`"
        raise InvalidInputError(msg)
    try:
        content = _read_json(path)
        prompts = tuple(
            SuitePrompt(**{**entry, "dimensions": tuple(entry["dimensions"])}) for entry in content["prompts"]
        )
        if content["format"] != FORMAT:
            raise KeyError("format")
        size, notes = Size(*content["size"]), tuple(content["notes"])
        suite = Suite(folder, size, content["crop"], prompts, content["commit"], notes)
    except (KeyError, TypeError) as error:
        msg = f"{str(path)!r} is not a suite of this version ({error}); make it again with `swifti2v vbench prepare`"
        raise InvalidInputError(msg) from error
    missing = next((entry.image_name for entry in prompts if not suite.image_of(entry).is_file()), None)
    if missing is not None:
        msg = f"picture {missing!r} is not in {str(suite.images)!r}; run `swifti2v vbench prepare` again"
        raise InvalidInputError(msg)
    return suite


def checkout_commit(checkout: Path) -> str | None:
    """Return the commit that is checked out, None without git or if it is another project's."""
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return None
    command = [git, "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - git itself, no shell
    return done.stdout.strip() or None


@dataclass(frozen=True)
class _Pictures:
    """Where the pictures come from.

    The originals with the suite's boxes go first: the ready crops were compressed a second time, by Pillow's default.
    """

    originals: Path
    crops: Path
    boxes: Mapping[str, Mapping[str, Any]]
    crop: str

    @classmethod
    def of(cls, checkout: Path, crop: str) -> _Pictures:
        data = checkout / DATA_PATH
        info = data / "i2v-bench-info.json"
        boxes = {entry["file_name"]: entry for entry in _read_json(info)} if info.is_file() else {}
        originals, crops = data / "origin", data / "crop" / crop
        if not crops.is_dir() and not (boxes and originals.is_dir()):
            msg = (
                f"{str(data)!r} holds neither crop/{crop} nor origin with i2v-bench-info.json; "
                "run vbench2_beta_i2v/download_data.sh in the checkout"
            )
            raise InvalidInputError(msg)
        return cls(originals, crops, boxes, crop)

    def picture(self, name: str, size: Size) -> PIL.Image.Image:
        """Return the suite's crop of a picture, at its full resolution, or raise `ImageInputError`."""
        from swifti2v.media.images import load_image

        original, ready = self.originals / name, self.crops / name
        if name in self.boxes and original.is_file():
            try:
                return self._cropped(original, load_image(original).image)
            except ImageInputError:  # too large to be read, or turned since the boxes were drawn
                if not ready.is_file():
                    raise
        image = load_image(ready).image
        cut = _cut_share(image.width / image.height, size.width / size.height)
        if cut > MAX_CUT:
            msg = f"image {str(ready)!r} would lose {100 * cut:.0f}% to become {size}; give one nearer to its aspect"
            raise ImageInputError(msg)
        return image

    def _cropped(self, path: Path, image: PIL.Image.Image) -> PIL.Image.Image:
        entry = self.boxes[path.name]
        left, top, width, height = (int(number) for number in entry["diff_ratio_crop"][self.crop])
        known = (entry["origin_width"], entry["origin_height"])
        inside = left >= 0 and top >= 0 and left + width <= image.width and top + height <= image.height
        if image.size != known or not inside or min(width, height) < 1:
            msg = (
                f"image {str(path)!r} is {image.width}x{image.height}, the suite's box is for {known[0]}x{known[1]}; "
                "download the suite again"
            )
            raise ImageInputError(msg)
        return image.crop((left, top, left + width, top + height))


def _cut_share(aspect: float, target: float) -> float:
    """Return the share of a picture of `aspect` that is lost when it is cut to `target`."""
    return 1 - min(aspect, target) / max(aspect, target)


def _prompt(path: Path, number: int, entry: Any) -> SuitePrompt:
    try:
        prompt, image_name, image_type = entry["prompt_en"], entry["image_name"], entry["image_type"]
        dimensions = tuple(name for name in DIMENSION_NAMES if name in entry["dimension"])
    except (KeyError, TypeError) as error:
        msg = f"entry {number} of {str(path)!r} lacks {error}; use VBench at 45e79ec or later"
        raise InvalidInputError(msg) from error
    plain = all(Path(name).name == name and not name.startswith(".") for name in (prompt, image_name))
    if not plain or Path(image_name).suffix.lower() not in _IMAGE_SUFFIXES:
        msg = f"entry {number} of {str(path)!r} names a file that is no plain picture or video; check it out again"
        raise InvalidInputError(msg)
    return SuitePrompt(prompt, dimensions, image_name, image_type)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{str(path)!r} cannot be read as JSON ({error}); copy or download it again"
        raise InvalidInputError(msg) from error


def _suite_notes(prompts: tuple[SuitePrompt, ...]) -> tuple[str, ...]:
    if len(prompts) == NUM_PROMPTS:
        return ()
    return (f"the checkout lists {len(prompts)} prompts, the benchmark of 2026-03 has {NUM_PROMPTS}",)


def _check_same_suite(suite: Suite) -> None:
    path = suite.folder / SUITE_NAME
    if not path.is_file():
        return
    found = _read_json(path)
    if found.get("size") != list(suite.size) or found.get("crop") != suite.crop:
        msg = f"folder {str(suite.folder)!r} holds a suite of another size or source; choose another folder"
        raise InvalidInputError(msg)
