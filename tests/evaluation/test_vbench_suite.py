"""The suite's pictures: which crop, exactly which pixels, nothing squeezed; and every way a checkout can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from swifti2v.errors import ImageInputError, InvalidInputError, OutputError
from swifti2v.evaluation.vbench.suite import (
    PROMPTS_PATH,
    checkout_commit,
    load_suite,
    nearest_crop,
    prepare_suite,
    ratio_name,
    read_prompts,
)
from swifti2v.geometry import Size
from tests.evaluation.vbench_checkout import BOXES, ORIGIN, coordinates, make_checkout

SIZE = Size(160, 88)  # 20:11, as 2560x1408


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "VBench")


def size_of(path: Path) -> tuple[int, int]:
    with PIL.Image.open(path) as image:
        return image.size


def corners(path: Path) -> tuple[float, float, float, float]:
    """Left, top, right and bottom edge of what a picture shows, in pixels of its original."""
    with PIL.Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    x = pixels[..., 0].mean(axis=0) / 255 * (ORIGIN[0] - 1) + 0.5  # centers of pixels
    y = pixels[..., 1].mean(axis=1) / 255 * (ORIGIN[1] - 1) + 0.5
    half_x, half_y = (x[-2] - x[1]) / (len(x) - 3) / 2, (y[-2] - y[1]) / (len(y) - 3) / 2
    return x[1] - 3 * half_x, y[1] - 3 * half_y, x[-2] + 3 * half_x, y[-2] + 3 * half_y


@pytest.mark.parametrize(
    ("size", "crop"),
    [("2560x1408", "16-9"), ("1280x704", "16-9"), ("832x480", "7-4"), ("1536x1024", "8-5"), ("512x512", "1-1")],
)
def test_the_crop_that_loses_least(size: str, crop: str) -> None:
    assert nearest_crop(Size.parse(size)) == crop


@pytest.mark.parametrize("size", ["704x1280", "1024x768", "2560x1024"])
def test_sizes_that_would_lose_the_subject(size: str) -> None:
    with pytest.raises(InvalidInputError, match=r"would lose \d+% .*crop_to_diff_ratio"):
        nearest_crop(Size.parse(size))


def test_names_of_ratios() -> None:
    assert ratio_name(Size(2560, 1408)) == "20-11"
    assert ratio_name(Size(1920, 1080)) == "16-9"


def test_pictures_show_the_middle_of_the_suites_box(checkout: Path, tmp_path: Path) -> None:
    """16:9 is 320x180 here; at 20:11 it loses two rows above and below, as 2560x1440 loses 16."""
    suite = prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    left, top, width, height = BOXES["16-9"]
    for entry in suite.prompts:
        assert size_of(suite.image_of(entry)) == SIZE
        expected = (left, top + 2, left + width, top + height - 2)
        assert corners(suite.image_of(entry)) == pytest.approx(expected, abs=1.5)
    assert suite.images == tmp_path / "suite" / "vbench2_beta_i2v" / "data" / "crop" / "20-11"
    assert suite.crop == "16-9"


def test_what_is_prepared_can_be_loaded(checkout: Path, tmp_path: Path) -> None:
    suite = prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    assert load_suite(tmp_path / "suite") == suite
    bear, beach, pan = suite.prompts
    assert "temporal_flickering" not in bear.dimensions
    assert bear.dimensions[0] == "i2v_subject"
    assert pan.dimensions == ("camera_motion",)
    assert pan.image_name == beach.image_name == "a beach at dusk.jpg"
    assert "3 prompts, the benchmark of 2026-03 has 1118" in suite.notes[0]
    assert len(list(suite.images.iterdir())) == 2


def test_progress_and_continuation(checkout: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    suite = prepare_suite(checkout, tmp_path / "suite", size=SIZE, on_image=lambda *counts: seen.append(counts))
    assert seen == [(1, 2), (2, 2)]
    lost, kept = (suite.images / name for name in ("a beach at dusk.jpg", "a bear in the water.jpg"))
    lost.unlink()
    kept.write_bytes(b"kept as it is")
    prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    assert lost.is_file()
    assert kept.read_bytes() == b"kept as it is"


def test_an_interrupted_suite_is_not_continued_at_another_size(checkout: Path, tmp_path: Path) -> None:
    """2560x1408 and 1280x704 share the folder of their ratio."""

    def stop(_done: int, _count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_suite(checkout, tmp_path / "suite", size=SIZE, on_image=stop)
    with pytest.raises(InvalidInputError, match="is not in"):
        load_suite(tmp_path / "suite")
    with pytest.raises(InvalidInputError, match="another size or source"):
        prepare_suite(checkout, tmp_path / "suite", size=Size(320, 176))
    prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    assert load_suite(tmp_path / "suite").size == SIZE


def test_ready_crops_serve_where_there_are_no_originals(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "VBench", pictures=False)
    crops = checkout / "vbench2_beta_i2v" / "data" / "crop" / "16-9"
    crops.mkdir(parents=True)
    for name in ("a bear in the water.jpg", "a beach at dusk.jpg"):
        coordinates().crop((40, 60, 360, 240)).save(crops / name, quality=100, subsampling=0)
    suite = prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    assert corners(suite.image_of(suite.prompts[0])) == pytest.approx((40, 62, 360, 238), abs=1.5)


def test_an_original_that_does_not_fit_its_box_gives_way_to_the_ready_crop(checkout: Path, tmp_path: Path) -> None:
    data = checkout / "vbench2_beta_i2v" / "data"
    PIL.Image.new("RGB", (400, 480)).save(data / "origin" / "a bear in the water.jpg")
    with pytest.raises(ImageInputError, match="is 400x480, the suite's box is for 480x400"):
        prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    (data / "crop" / "16-9").mkdir(parents=True)
    coordinates().crop((40, 60, 360, 240)).save(data / "crop" / "16-9" / "a bear in the water.jpg", quality=100)
    suite = prepare_suite(checkout, tmp_path / "suite", size=SIZE)
    assert corners(suite.image_of(suite.prompts[0])) == pytest.approx((40, 62, 360, 238), abs=2)


def test_pictures_of_the_users_own(checkout: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for name in ("a bear in the water.jpg", "a beach at dusk.jpg"):
        coordinates((400, 300)).save(own / name)
    suite = prepare_suite(checkout, tmp_path / "suite", size=Size(128, 96), images=own)
    assert suite.crop == "custom"
    assert size_of(suite.image_of(suite.prompts[0])) == (128, 96)
    with pytest.raises(ImageInputError, match=r"would lose 25% to become 96x96"):
        prepare_suite(checkout, tmp_path / "square", size=Size(96, 96), images=own)


def test_a_missing_picture(checkout: Path, tmp_path: Path) -> None:
    (checkout / "vbench2_beta_i2v" / "data" / "origin" / "a beach at dusk.jpg").unlink()
    with pytest.raises(ImageInputError, match="does not exist"):
        prepare_suite(checkout, tmp_path / "suite", size=SIZE)


def test_a_checkout_without_the_data(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "VBench", pictures=False)
    with pytest.raises(InvalidInputError, match=r"download_data\.sh"):
        prepare_suite(checkout, tmp_path / "suite", size=SIZE)


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="PyPI package lacks"):
        read_prompts(tmp_path)


ENTRY = {"prompt_en": "p", "image_name": "p.jpg", "image_type": "animal", "dimension": ["i2v_subject"]}


@pytest.mark.parametrize(
    "content",
    [
        "[{",
        *map(
            json.dumps,
            (
                [],
                {"a": 1},
                [{"prompt_en": "p"}],
                [ENTRY, ENTRY],
                [ENTRY | {"prompt_en": "../p"}],
                [ENTRY | {"image_name": "../p.jpg"}],
                [ENTRY | {"image_name": "p.py"}],
            ),
        ),
    ],
)
def test_lists_of_another_form(tmp_path: Path, content: str) -> None:
    (tmp_path / PROMPTS_PATH).parent.mkdir(parents=True)
    (tmp_path / PROMPTS_PATH).write_text(content)
    with pytest.raises(InvalidInputError):
        read_prompts(tmp_path)


def test_a_folder_that_is_no_suite(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="vbench prepare"):
        load_suite(tmp_path)
    (tmp_path / "suite.json").write_text(json.dumps({"format": 2, "prompts": []}))
    with pytest.raises(InvalidInputError, match="not a suite of this version"):
        load_suite(tmp_path)


def test_a_suite_that_cannot_be_written(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        prepare_suite(checkout, tmp_path / "file" / "suite", size=SIZE)


def test_the_commit_of_a_checkout() -> None:
    """Of the repository of this test; a folder without git has none."""
    root = Path(__file__).parents[2]
    commit = checkout_commit(root)
    if (root / ".git").exists():
        assert commit is not None
        assert len(commit) == 40
    assert checkout_commit(Path(__file__).parent) is None
