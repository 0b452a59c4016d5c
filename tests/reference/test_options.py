from __future__ import annotations

import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.reference.options import ReferenceOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "copy"},
        {"flow_scale": 0.0},
        {"flow_scale": 1.5},
        {"flow_scale": float("nan")},
        {"confidence_width": 0.0},
        {"mismatch_width": -1.0},
        {"band_sigma": -0.1},
        {"num_workers": -1},
    ],
)
def test_refuses_values_out_of_range_naming_the_option(wrong: dict) -> None:
    with pytest.raises(InvalidInputError, match="mode" if "mode" in wrong else next(iter(wrong))):
        ReferenceOptions(**wrong)
