"""What numbers mean: complete, in order, the flow by its name."""

from __future__ import annotations

import pytest

from swifti2v.evaluation.evenness import EVENNESS
from swifti2v.evaluation.registry import FLOW, METRICS, metrics_of


def test_every_metric_is_explained_once() -> None:
    assert len({metric.name for metric in METRICS}) == len({metric.label for metric in METRICS}) == len(METRICS)
    assert all(len(metric.meaning) > 20 for metric in METRICS)
    assert {metric.name for metric in METRICS} >= set(EVENNESS)


@pytest.mark.parametrize("name", ["warping_error", "flow_magnitude", "seam_luma", "detail_retention", "judder"])
def test_metrics_that_rest_on_flow_name_it(name: str) -> None:
    (metric,) = metrics_of([name])
    assert FLOW in metric.meaning


def test_metrics_come_in_the_order_of_tables_and_an_unknown_one_is_refused() -> None:
    found = [metric.name for metric in metrics_of(["flicker", "psnr", "flicker", "first_psnr"])]
    assert found == ["first_psnr", "psnr", "flicker"]
    with pytest.raises(KeyError, match="beauty"):
        metrics_of(["psnr", "beauty"])
