"""A run within limits gives the frames of a run without; one that overflows goes on where it was."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import MemoryBudgetError
from swifti2v.memory import plan as plan_module
from swifti2v.models.vae import WanStreamingCodec
from swifti2v.pipelines.fitting import MemoryLimits, place, plan_for
from swifti2v.pipelines.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.memory.ways import Way

LIMITLESS = MemoryLimits()


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a driver holds is more than these networks have altogether."""
    monkeypatch.setattr(plan_module, "CONTEXT_BYTES", 0)


def opened(checkpoint: Path, memory: MemoryLimits | None) -> TwoStagePipeline:
    return TwoStagePipeline.from_pretrained(checkpoint, device="cpu", memory=memory)


def frames_of(pipeline: TwoStagePipeline) -> torch.Tensor:
    image = PIL.Image.linear_gradient("L").convert("RGB").resize((64, 64))
    return pipeline(image, "a wave").frames


def least_bytes(checkpoint: Path) -> int:
    pipeline = opened(checkpoint, LIMITLESS)
    low, high = 1, plan_for(pipeline.parts, pipeline.defaults, LIMITLESS).peak_bytes
    while high - low > 4096:
        middle = (low + high) // 2
        try:
            high = plan_for(pipeline.parts, pipeline.defaults, MemoryLimits(middle)).peak_bytes
        except MemoryBudgetError:
            low = middle
    return high


def _untiled(ways: tuple[Way, ...]) -> tuple[Way, ...]:
    return tuple(
        replace(way, codec=replace(way.codec, columns=1, rows=1, parks_features=True)) if way.codec else way
        for way in ways
    )


def test_a_tight_run_equals_a_run_without_limits(tiny_checkpoint: Path) -> None:
    expected = frames_of(opened(tiny_checkpoint, None))
    limits = MemoryLimits(least_bytes(tiny_checkpoint))
    tight = opened(tiny_checkpoint, limits)
    plan = plan_for(tight.parts, tight.defaults, limits)
    assert "resident" not in {way.placement for way in plan.ways}
    actual = frames_of(tight)
    assert actual.shape == expected.shape
    if plan.codec.columns * plan.codec.rows == 1:  # tiles change the picture, placement does not
        assert int((actual.int() - expected.int()).abs().max()) <= 1
    streamed = replace(plan, ways=tuple(replace(way, placement="streamed") for way in plan.ways))
    parts, networks = place(opened(tiny_checkpoint, LIMITLESS).parts, replace(streamed, ways=_untiled(streamed.ways)))
    assert int((frames_of(TwoStagePipeline(replace(parts, memory=None))).int() - expected.int()).abs().max()) <= 1
    networks.release()
    roomy = frames_of(opened(tiny_checkpoint, LIMITLESS))
    assert int((roomy.int() - expected.int()).abs().max()) <= 1


def test_an_overflow_goes_on_with_a_tighter_plan_and_keeps_finished_segments(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = frames_of(opened(tiny_checkpoint, None))
    pipeline = opened(tiny_checkpoint, LIMITLESS)
    decode, calls = WanStreamingCodec._decode_group, []
    forwards = []
    pipeline.parts.stage_two.transformer.register_forward_hook(lambda *_: forwards.append(1))

    def full_once(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, *arguments)

    monkeypatch.setattr(WanStreamingCodec, "_decode_group", full_once)
    with caplog.at_level(logging.WARNING, logger="swifti2v"):
        actual = frames_of(pipeline)
    assert "ran out of memory; going on with a plan of" in caplog.text
    assert actual.shape == expected.shape  # no frame is lost, and none comes twice
    assert torch.equal(actual[0], expected[0])  # handed out before the overflow
    settings = pipeline.defaults
    segments = len(pipeline.parts.stage_two.plan(settings))
    assert len(forwards) == segments * settings.num_inference_steps  # the finished segment was not made again


def test_the_end_of_all_plans_is_one_clear_error(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanStreamingCodec, "_decode_group", full)
    with pytest.raises(MemoryBudgetError, match="ran out of memory with the smallest plan"):
        frames_of(opened(tiny_checkpoint, LIMITLESS))
    monkeypatch.undo()
    with pytest.raises(MemoryBudgetError, match="needs"):
        frames_of(opened(tiny_checkpoint, MemoryLimits(1000)))


def test_without_limits_an_overflow_is_the_callers(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: WanStreamingCodec, *arguments: Any) -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanStreamingCodec, "_decode_group", full)
    with pytest.raises(torch.OutOfMemoryError):
        frames_of(opened(tiny_checkpoint, None))


def test_limits_are_read_from_words() -> None:
    assert MemoryLimits.parse("24GiB", "64GiB") == MemoryLimits(24 * 2**30, 64 * 2**30)
    if not torch.cuda.is_available():
        assert MemoryLimits.parse("auto") == LIMITLESS
