"""The picture continued beyond its borders."""

from __future__ import annotations

import numpy as np
import pytest

from swifti2v.mini.canvas import Margins, continued


def landscape(width: int = 96, height: int = 54) -> np.ndarray:
    """Sky above, a striped ground below."""
    rng = np.random.default_rng(0)
    picture = np.empty((height, width, 3), np.uint8)
    picture[: height // 2] = (90, 140, 230)
    ground = 60 + 40 * (np.arange(width) // 6 % 2)
    picture[height // 2 :] = ground[None, :, None]
    return (picture + rng.integers(0, 4, picture.shape)).astype(np.uint8)


def test_the_picture_itself_stays_as_it_is() -> None:
    picture = landscape()
    painted, left, top = continued(picture, Margins(0.1, 0.05, 0.2, 0.0)).painted(picture)
    assert (left, top) == (10, 5)
    np.testing.assert_array_equal(painted[5 : 5 + 54, 10 : 10 + 96], picture)


def test_sky_goes_on_as_sky_and_ground_as_ground() -> None:
    picture = landscape()
    painted, left, _top = continued(picture, Margins(right=0.25)).painted(picture)
    beyond = painted[:, int(left) + 96 :].astype(int)
    assert beyond.shape[1] == 24
    assert np.abs(beyond[:22] - (91, 141, 231)).mean() < 6
    assert beyond[32:].std(axis=1).mean() > 5  # stripes, not their mean
    assert beyond[32:, :, 2].mean() < 110


def test_a_larger_picture_is_continued_by_its_own_detail() -> None:
    large = landscape(288, 162)
    canvas = continued(large[::3, ::3], Margins(right=0.2))
    painted, _left, _top = canvas.painted(large)
    assert painted.shape[0] == 162
    assert painted.shape[1] == pytest.approx(288 * 1.2, abs=4)


def test_without_margins_there_is_nothing_to_do() -> None:
    picture = landscape()
    painted, left, top = continued(picture, Margins()).painted(picture)
    assert (left, top) == (0, 0)
    np.testing.assert_array_equal(painted, picture)


def test_results_repeat() -> None:
    picture = landscape()
    one, other = (continued(picture, Margins(left=0.2)).places for _ in range(2))
    np.testing.assert_array_equal(one, other)
