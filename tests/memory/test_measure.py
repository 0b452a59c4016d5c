"""Measured costs against the formulas that they replace, for the networks of Wan2.2 at 2560x1408."""

from __future__ import annotations

from typing import Any

import pytest

from swifti2v.geometry import Size
from swifti2v.memory.budget import WAN22 as FORMULAS
from swifti2v.memory.budget import stored_bytes
from swifti2v.memory.costs import Decoding, Encoding, Forward, Weights
from swifti2v.memory.lean_cost import lean_decode_bytes, lean_encode_bytes
from swifti2v.memory.measure import measure
from swifti2v.memory.networks import WAN22

TILE = Size(1344, 768)


@pytest.mark.parametrize("storage", ["bfloat16", "float8", "nf4"])
@pytest.mark.parametrize("name", ["text_encoder", "stage_one", "stage_two"])
def test_weights(name: str, storage: Any) -> None:
    cost, formula = measure(Weights(getattr(WAN22, name), "bfloat16", storage)), getattr(FORMULAS, name)
    # The formulas left out the table of the kinds of frames, and the embeddings of time that stay in float32.
    assert cost.num_parameters - formula.num_parameters in {0, 4 * 3072}
    assert cost.num_bytes == pytest.approx(stored_bytes(formula, storage), rel=0.01)
    assert cost.num_bytes >= stored_bytes(formula, storage)


def test_forwards() -> None:
    two = measure(Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, 96, 5, 88, 160))
    assert two.work.tflop == pytest.approx(FORMULAS.stage_two.forward_cost(17_600, num_timesteps=5).tflop, rel=1e-9)
    assert two.work.tflop == pytest.approx(271.0, abs=0.05)
    assert 1.26 < two.working_bytes / 2**30 < 1.28
    later = measure(Forward(WAN22.stage_two, "bfloat16", "bfloat16", "none", 512, 96, 3, 88, 160, 2))
    formula = FORMULAS.stage_two.forward_cost(3 * 3520, num_timesteps=3, kept_tokens=2 * 3520)
    assert later.work.tflop == pytest.approx(formula.tflop, rel=1e-9)
    assert later.kept_context_bytes == FORMULAS.stage_two.kept_bytes(2 * 3520)
    one = measure(Forward(WAN22.stage_one, "bfloat16", "bfloat16", "none", 512, 36, 21, 44, 80))
    assert one.work.tflop == pytest.approx(FORMULAS.stage_one.forward_cost(18_480).tflop, rel=1e-9)
    assert one.working_bytes == pytest.approx(FORMULAS.stage_one.activation_bytes(18_480), rel=0.01)
    text = measure(Forward(WAN22.text_encoder, "bfloat16", "bfloat16", "none", 512))
    assert text.work.tflop == pytest.approx(FORMULAS.text_encoder.forward_cost(512).tflop, rel=1e-9)


def test_the_codec_of_stage_two() -> None:
    codec, formula = WAN22.stage_two_codec, FORMULAS.stage_two_codec
    encode, decode = measure(Encoding(codec, "bfloat16", *TILE)), measure(Decoding(codec, "bfloat16", *TILE))
    assert encode.work(21).tflop == pytest.approx(formula.encode_tflop(TILE, 81), rel=1e-9)
    assert decode.work(21).tflop == pytest.approx(formula.decode_tflop(TILE, 81), rel=1e-9)
    assert encode.cache_bytes == pytest.approx(formula.encode_cache_bytes(TILE), rel=0.001)
    assert decode.cache_bytes == pytest.approx(formula.decode_cache_bytes(TILE), rel=0.001)
    assert encode.peak_bytes == pytest.approx(lean_encode_bytes(formula, TILE), rel=0.1)
    assert decode.peak_bytes == pytest.approx(lean_decode_bytes(formula, TILE), rel=0.06)
