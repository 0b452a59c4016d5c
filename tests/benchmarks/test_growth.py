"""The curves are those of the account: what is known of it by hand, at both ends."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks import growth
from swifti2v.memory.devices import device_rates

H200 = device_rates("h200")


def test_segments_are_linear_in_time_and_flat_in_memory() -> None:
    rows = [growth.growth_row(num_frames, H200) for num_frames in (161, 321, 641)]
    for before, after in pairwise(rows):
        assert after.stage_two_seconds / before.stage_two_seconds == pytest.approx(2, rel=0.03)
        assert after.whole_stage_two_seconds / before.whole_stage_two_seconds > 3
        assert after.capped_gib == before.capped_gib < 24
        assert after.whole_stage_two_gib > 1.4 * before.whole_stage_two_gib
        assert 0 < after.light_seconds < after.seconds


def test_phases_of_a_clip() -> None:
    rows = {row.name: row for row in growth.phase_rows(H200, 989.0)}
    # 5,403 TFLOP at 650 a second; 24 + 4 windows of Stage II, 10 GB each; T5 once.
    assert rows["decode"].seconds == pytest.approx(5403 / 650, rel=1e-3)
    assert rows["decode"].roofline_share == pytest.approx(650 / 989, rel=1e-6)
    assert rows["stage two"].weight_gb == pytest.approx(28 * 10.0, rel=0.01)
    assert rows["light decode"].tflop < rows["decode"].tflop / 150
    assert 550 / 989 < rows["stage two"].roofline_share < 700 / 989
    assert rows.keys() == {"text encoding", "stage one", "reference encode", "stage two", "decode", "light decode"}


def test_the_picture_is_drawn(tmp_path) -> None:  # type: ignore[no-untyped-def]
    growth.draw(
        [growth.growth_row(num_frames, H200) for num_frames in (81, 161)], "H200", tmp_path / "a" / "growth.png"
    )
    assert (tmp_path / "a" / "growth.png").read_bytes()[:4] == b"\x89PNG"
