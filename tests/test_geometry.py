"""Frame and size arithmetic, against the sizes of the paper and against counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, LatentShape, Size, motion_size, nearest_size

WAN22 = CodecGeometry(spatial=16, temporal=4, patch=2)
WAN21 = CodecGeometry(spatial=8, temporal=4, patch=2)


def test_the_sizes_of_the_paper():
    output = Size(2560, 1408)
    assert WAN22.latent_shape(output, 81) == LatentShape(21, 88, 160)
    assert WAN22.tokens_per_frame(output) == 3520
    assert WAN21.latent_shape(Size(640, 352), 81) == LatentShape(21, 44, 80)
    assert motion_size(output, reduction=4, max_area=None, multiple=WAN21.size_multiple) == Size(640, 352)
    assert (WAN22.size_multiple, WAN21.size_multiple) == (32, 16)


@pytest.mark.parametrize(
    ("output", "expected"), [((2560, 1408), (320, 176)), ((1408, 2560), (176, 320)), ((640, 352), (160, 96))]
)
def test_a_limit_of_area_holds_for_large_outputs_only(output, expected):
    made = motion_size(Size(*output), reduction=4, max_area=320 * 176, multiple=16)
    assert made == Size(*expected)


@given(st.integers(1, 8), st.integers(0, 500))
def test_latent_frames_and_pixel_frames_are_inverse(temporal, k):
    geometry = CodecGeometry(temporal=temporal)
    num_frames = temporal * k + 1
    assert geometry.latent_frames(num_frames) == k + 1
    assert geometry.pixel_frames(k + 1) == num_frames


@given(st.integers(1, 8), st.integers(0, 100))
def test_latent_frames_hold_every_pixel_frame_once_in_order(temporal, k):
    geometry = CodecGeometry(temporal=temporal)
    num_frames = temporal * k + 1
    held = [frame for j in range(k + 1) for frame in geometry.frames_of(j)]
    assert held == list(range(num_frames))


def test_chunks_are_one_frame_then_four():
    assert [len(WAN22.frames_of(j)) for j in range(4)] == [1, 4, 4, 4]


def test_latent_frame_count_equals_that_of_diffusers(tiny_vae22):
    import torch

    latents = tiny_vae22.encode(torch.zeros(1, 3, 9, 32, 64)).latent_dist.mode()
    assert tuple(latents.shape[2:]) == WAN22.latent_shape(Size(64, 32), 9)


@pytest.mark.parametrize(
    ("num_frames", "below", "above"), [(80, 77, 81), (82, 81, 85), (2, 1, 5), (0, 1, 5), (-3, 1, 5)]
)
def test_a_length_that_does_not_divide_names_its_neighbors(num_frames, below, above):
    with pytest.raises(
        InvalidInputError, match=rf"{num_frames} frames .* 4k\+1 frames, for instance {below} or {above}"
    ):
        WAN22.latent_frames(num_frames)


@pytest.mark.parametrize(
    ("size", "nearest"), [((2560, 1440), "2560x1440"), ((100, 100), "96x96"), ((16, 64), "32x64"), ((0, 0), "32x32")]
)
def test_a_size_that_does_not_divide_names_the_nearest(size, nearest):
    if Size(*size) == Size.parse(nearest):
        WAN22.check_size(Size(*size))
        return
    with pytest.raises(InvalidInputError, match=rf"multiple of 32 .* nearest is {nearest}$"):
        WAN22.check_size(Size(*size))


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 64))
def test_the_nearest_size_is_usable_and_near(width, height, multiple):
    nearest = nearest_size(Size(width, height), multiple)
    for side, wanted in zip(nearest, (width, height), strict=True):
        assert side >= multiple
        assert side % multiple == 0
        assert abs(side - wanted) <= max(multiple / 2, multiple - wanted)


@given(st.integers(1, 99999), st.integers(1, 99999))
def test_a_size_reads_back_as_it_is_written(width, height):
    assert Size.parse(str(Size(width, height))) == Size(width, height)


@pytest.mark.parametrize("text", ["1280x704", " 1280 X 704 ", "1280x704\n"])
def test_sizes_as_users_write_them(text):
    assert Size.parse(text) == Size(1280, 704)


@pytest.mark.parametrize("text", ["", "1280", "1280x", "1280*704", "-1x5", "1280x704x3", "axb", "1234567x2", "1.5x2"])
def test_what_is_no_size_is_an_error_that_shows_the_form(text):
    with pytest.raises(InvalidInputError, match="write for instance 1280x704"):
        Size.parse(text)
