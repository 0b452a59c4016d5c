"""Tiles cover the frame, fade into each other with weights that add up to one, and refuse what does not fit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.wan.tiling import TileGrid, Tiling, fade_weights, tile_spans

axis = st.tuples(st.integers(1, 200), st.integers(1, 64), st.integers(0, 63)).filter(lambda case: case[2] < case[1])


@given(axis)
@settings(max_examples=300, deadline=None)
def test_spans_cover_the_axis_with_equal_tiles_that_overlap_enough(case: tuple[int, int, int]) -> None:
    length, tile, overlap = case
    spans = tile_spans(length, tile=tile, overlap=overlap)
    assert spans[0].start == 0
    assert spans[-1].stop == length
    sizes = {span.stop - span.start for span in spans}
    assert len(sizes) == 1
    assert max(sizes) <= tile
    for before, after in itertools.pairwise(spans):
        assert before.start < after.start
        assert before.stop - after.start >= overlap


@given(axis)
@settings(max_examples=300, deadline=None)
def test_spans_are_as_few_and_as_small_as_possible(case: tuple[int, int, int]) -> None:
    length, tile, overlap = case
    spans = tile_spans(length, tile=tile, overlap=overlap)

    def reach(count: int, size: int) -> int:
        return size + (count - 1) * (size - overlap)

    assert len(spans) == 1 or reach(len(spans) - 1, tile) < length
    size = spans[0].stop - spans[0].start
    assert len(spans) == 1 or reach(len(spans), size - 1) < length


@given(axis, st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_weights_add_up_to_one_and_fade_at_inner_borders_only(case: tuple[int, int, int], scale: int) -> None:
    length, tile, overlap = case
    spans = tile_spans(length, tile=tile, overlap=overlap)
    weights = fade_weights(spans, scale=scale)
    total = torch.zeros(length * scale)
    cover = torch.zeros(length * scale)
    for span, weight in zip(spans, weights, strict=True):
        assert weight.shape == ((span.stop - span.start) * scale,)
        assert weight.min() > 0
        total[span.scaled(scale)] += weight
        cover[span.scaled(scale)] += 1
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
    for span, weight in zip(spans, weights, strict=True):
        alone = cover[span.scaled(scale)] == 1
        assert torch.equal(weight[alone], torch.ones(int(alone.sum())))


def test_the_fade_between_two_tiles_is_linear() -> None:
    before, after = fade_weights(tile_spans(12, tile=8, overlap=4))
    expected = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(after[:4], expected)
    assert torch.equal(before[-4:], 1 - expected)


@pytest.mark.parametrize("overlap_pixels", [0, 16, 48])
def test_cutting_and_blending_gives_the_frame_back(overlap_pixels: int) -> None:
    torch.manual_seed(0)
    tiling = Tiling(Size(80, 64), overlap_pixels)
    grid = TileGrid.plan(9, 13, tiling=tiling, spatial_factor=16)
    frame = torch.randn(1, 3, 2, 9 * 4, 13 * 4)
    tiles = list(grid.cut(frame, scale=4))
    assert len(tiles) == len(grid) > 1
    assert all(tile.shape[-2] <= 4 * 4 and tile.shape[-1] <= 5 * 4 for tile in tiles)
    torch.testing.assert_close(grid.blend(tiles, scale=4), frame, atol=1e-6, rtol=0)


def test_one_tile_is_returned_exactly() -> None:
    frame = torch.randn(1, 3, 2, 6, 10, dtype=torch.bfloat16)
    grid = TileGrid.plan(6, 10, tiling=Tiling(Size(160, 96), 32), spatial_factor=16)
    assert len(grid) == 1
    blended = grid.blend(grid.cut(frame))
    assert blended.dtype == torch.float32
    assert torch.equal(blended, frame.float())


def test_tiles_are_taken_one_by_one() -> None:
    grid = TileGrid.plan(4, 8, tiling=Tiling(Size(4, 4), 1), spatial_factor=1)
    computed = 0

    def compute() -> torch.Tensor:
        nonlocal computed
        computed += 1
        if computed == 2:
            raise InterruptedError
        return torch.zeros(1, 1, 1, 4, 4)

    with pytest.raises(InterruptedError):
        grid.blend(compute() for _ in range(len(grid)))
    assert computed == 2 < len(grid)


def test_the_sizes_of_the_paper_need_four_tiles_of_at_most_a_quarter_and_the_overlap() -> None:
    grid = TileGrid.plan(1408 // 16, 2560 // 16, tiling=Tiling(Size(1344, 768), 128), spatial_factor=16)
    assert len(grid) == 4
    tile = (grid.rows[0].stop - grid.rows[0].start, grid.columns[0].stop - grid.columns[0].start)
    assert tile == (768 // 16, 1344 // 16)
    assert math.prod(tile) * len(grid) / (88 * 160) < 1.15


@pytest.mark.parametrize(
    ("size", "overlap"), [((0, 64), 0), ((64, -16), 0), ((64, 64), 64), ((128, 64), 80), ((64, 64), -16)]
)
def test_impossible_tiles_are_refused(size: tuple[int, int], overlap: int) -> None:
    with pytest.raises(InvalidInputError, match=r"give two positive sides|; use 0 to"):
        Tiling(Size(*size), overlap)


@pytest.mark.parametrize(
    ("tiling", "match"),
    [
        (Tiling(Size(72, 64), 16), "tile width of 72 pixels is not a multiple of the codec's 16; use 64 or 80"),
        (Tiling(Size(64, 72), 16), "tile height of 72 pixels"),
        (Tiling(Size(64, 64), 24), "overlap of 24 pixels"),
    ],
)
def test_tiles_that_split_a_latent_cell_are_refused(tiling: Tiling, match: str) -> None:
    tiling.check(8)
    with pytest.raises(InvalidInputError, match=match):
        tiling.check(16)
