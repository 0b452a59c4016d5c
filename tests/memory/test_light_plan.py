"""A plan with the light decoder: less work, less memory, tiles for the encoder only."""

from __future__ import annotations

from dataclasses import replace

import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.budget import WAN22, plan_run
from swifti2v.memory.devices import device_rates
from swifti2v.memory.light_cost import LightDecoderDimensions, with_light_decoder
from swifti2v.memory.plan import plan_memory
from swifti2v.memory.run_settings import RunSettings
from swifti2v.memory.transform_cost import BlockTransformDimensions

GIB = 2**30
SETTINGS = RunSettings(Size(2560, 1408))
LIGHT = with_light_decoder(WAN22)
H200 = device_rates("h200")


def test_only_the_decode_differs() -> None:
    exact, light = (plan_run(dimensions, SETTINGS) for dimensions in (WAN22, LIGHT))
    assert light.phases[:-1] == exact.phases[:-1]
    before, after = exact.phases[-1], light.phases[-1]
    # TAEHV's own layers are 26.6 TFLOP; enlarging behind the 1x1 convolutions saves 0.8.
    assert after.tflop == pytest.approx(25.8, abs=0.05)
    assert before.tflop / after.tflop == pytest.approx(209, abs=1)
    assert after.weight_bytes == pytest.approx(2 * 9.92e6, rel=0.01)
    assert after.activation_bytes < before.activation_bytes / 20
    assert light.weight_bytes - exact.weight_bytes == after.weight_bytes


def test_layouts() -> None:
    assert LIGHT.light_decoder == LightDecoderDimensions(48, patch_size=2)
    older = with_light_decoder(replace(WAN22, stage_two_codec=WAN22.stage_one_codec))
    assert older.light_decoder == LightDecoderDimensions(16, patch_size=1)
    assert older.light_decoder.spatial_factor == 8
    mini = replace(WAN22, stage_two_codec=BlockTransformDimensions((80, 43, 37, 32)))
    with pytest.raises(InvalidInputError, match="use decoder exact"):
        with_light_decoder(mini)


@pytest.mark.parametrize("budget_gib", [8, 12, 16, 24, None])
def test_a_light_decoder_never_costs_time_or_memory(budget_gib: int | None) -> None:
    budget = None if budget_gib is None else budget_gib * GIB
    exact, light = (plan_memory(each, SETTINGS, H200, budget_bytes=budget) for each in (WAN22, LIGHT))
    # The codec is a third of the run, the decode four fifths of that.
    assert exact.seconds - light.seconds > 0.95 * (5403 - 26) / 650
    assert light.host_bytes <= exact.host_bytes + 2 * 10e6
    assert budget is None or light.peak_bytes <= budget


def test_memory_does_not_grow_with_the_length() -> None:
    peaks = {
        plan_memory(LIGHT, replace(SETTINGS, num_frames=count), H200, budget_bytes=16 * GIB).peak_bytes
        for count in (81, 161, 641)
    }
    assert len(peaks) == 1
