"""What numbers mean: complete, in order, the flow by its name."""

from __future__ import annotations

import pytest

from swifti2v.evaluation.registry import FLOW, METRICS, metrics_of


def test_names_and_labels_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)


def test_every_metric_is_explained() -> None:
    for metric in METRICS:
        assert len(metric.formula) > 20
        assert metric.source
        assert metric.value_range.startswith((">= ", "<= ", "0 .. ", "-1 .. ", "2 .. "))


@pytest.mark.parametrize("name", ["warping_error", "flow_magnitude", "seam_luma", "detail_retention", "still_share"])
def test_metrics_that_rest_on_flow_name_it(name: str) -> None:
    (metric,) = metrics_of([name])
    assert FLOW == "OpenCV DIS"
    assert FLOW in metric.formula


def test_metrics_come_in_the_order_of_tables() -> None:
    assert [metric.name for metric in metrics_of(["flicker", "psnr", "flicker", "first_psnr"])] == [
        "first_psnr",
        "psnr",
        "flicker",
    ]


def test_a_number_without_a_meaning_is_refused() -> None:
    with pytest.raises(KeyError, match="beauty"):
        metrics_of(["psnr", "beauty"])
