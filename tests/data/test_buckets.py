"""Buckets: divisible, of one area, never larger than what is put into them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.data.buckets import BucketOptions, covers, make_buckets, nearest_bucket
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry, Size


@given(st.integers(1, 90), st.integers(1, 60), st.sampled_from([8, 16, 32]), st.floats(1, 4))
def test_every_bucket(columns: int, rows: int, multiple: int, max_aspect: float) -> None:
    target = Size(columns * multiple, rows * multiple)
    buckets = make_buckets(BucketOptions(target, multiple, max_aspect))
    assert target in buckets
    assert len(set(buckets)) == len(buckets)
    for bucket in buckets:
        assert bucket.width % multiple == 0 == bucket.height % multiple
        assert abs(bucket.width * bucket.height / (target.width * target.height) - 1) <= 0.08
        assert bucket == target or max(bucket) / min(bucket) <= max_aspect


def test_the_codec_takes_them_all() -> None:
    buckets = make_buckets(BucketOptions(Size(1280, 704)))
    for bucket in buckets:
        CodecGeometry().check_size(bucket)
    assert Size(1280, 704) in buckets
    assert Size(704, 1280) in buckets
    assert Size(960, 960) in buckets or Size(928, 960) in buckets or Size(960, 928) in buckets


def test_one_bucket_only() -> None:
    assert make_buckets(BucketOptions(Size(640, 352), max_aspect=1)) == (Size(640, 352),)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        (Size(1920, 1080), Size(1280, 704)),
        (Size(1080, 1920), Size(704, 1280)),
        (Size(4000, 1000), Size(1280, 704)),
        (Size(1000, 1010), Size(960, 960)),
    ],
)
def test_nearest_by_aspect(size: Size, bucket: Size) -> None:
    assert nearest_bucket(size, [Size(704, 1280), Size(960, 960), Size(1280, 704)]) == bucket


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_no_bucket_is_nearer(width: int, height: int) -> None:
    buckets = make_buckets(BucketOptions(Size(640, 352)))
    chosen = nearest_bucket(Size(width, height), buckets)
    distance = abs(math.log(chosen.width * height / chosen.height / width))
    assert all(abs(math.log(other.width * height / other.height / width)) >= distance - 1e-9 for other in buckets)


def test_nothing_is_enlarged() -> None:
    assert covers(Size(640, 352), Size(640, 352))
    assert not covers(Size(639, 2000), Size(640, 352))
    assert not covers(Size(2000, 351), Size(640, 352))


@pytest.mark.parametrize(
    "options", [(Size(1280, 720), 32), (Size(0, 0), 32), (Size(64, 64), 0), (Size(64, 64), 32, 0.5)]
)
def test_options_that_cannot_be_used(options: tuple[Size, int]) -> None:
    with pytest.raises(InvalidInputError):
        BucketOptions(*options)
