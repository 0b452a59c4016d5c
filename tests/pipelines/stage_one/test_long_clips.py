"""Clips longer than a window of Stage I: windows that go on from each other, in linear time, made when asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pipelines.stage_one.short_runs import make, watched
from tests.pipelines.stage_one.short_runs import pieces as begun


@pytest.mark.parametrize("num_frames", [1, 5, 9, 13, 29])
def test_pieces_add_up_to_the_clip(stage_one, image, num_frames):
    pieces = list(begun(stage_one, image, num_frames=num_frames))
    assert sum(len(piece) for piece in pieces) == num_frames
    assert len(pieces) == len(stage_one.plan(num_frames))
    assert all(piece.shape[1:] == (16, 32, 3) and piece.dtype == torch.uint8 for piece in pieces)
    assert all(len(piece) <= stage_one.window_frames for piece in pieces)


def test_time_is_linear_in_the_length(stage_one, pipeline, image):
    def work(num_frames):
        sizes = []
        handle = pipeline.transformer.register_forward_pre_hook(
            lambda _module, _args, kwargs: sizes.append(kwargs["hidden_states"].shape[2]), with_kwargs=True
        )
        make(stage_one, image, num_frames=num_frames)
        handle.remove()
        assert max(sizes) <= 3  # latent frames of a window of 9: attention never sees more
        return len(sizes)

    # windows of 9 that share 5 advance by 4 frames each, and the high-noise expert runs twice a window
    assert [work(n) for n in (9, 13, 25)] == [2, 4, 10]


def test_windows_are_made_only_when_asked_for(stage_one, pipeline, image):
    with watched(pipeline.transformer) as (high,):
        pieces = begun(stage_one, image, num_frames=41)
        assert len(high) == 0
        next(pieces)
        assert len(high) == 2
        pieces.close()
    assert make(stage_one, image).shape[0] == 1


def test_the_first_window_is_the_short_clip(stage_one, image):
    # 13 frames are two windows of 9; the first yields what the second does not touch
    long, short = make(stage_one, image, num_frames=13), make(stage_one, image, num_frames=9)
    assert torch.equal(long[:5], short[:5])
    assert not torch.equal(long[5:9], short[5:9])


def test_a_window_continues_from_the_frame_that_was_made(stage_one, pipeline, image, monkeypatch):
    images = []
    original = pipeline.video_processor.preprocess
    monkeypatch.setattr(
        pipeline.video_processor,
        "preprocess",
        lambda picture, **settings: images.append(np.asarray(picture)) or original(picture, **settings),
    )
    clip = make(stage_one, image, num_frames=17)
    starts = [window.start for window in stage_one.plan(17)]
    assert starts == [0, 4, 8]
    assert np.array_equal(images[0], np.asarray(image))
    for start, picture in zip(starts[1:], images[1:], strict=True):
        assert np.array_equal(picture, clip[start].numpy())


def test_windows_do_not_repeat_each_others_noise(stage_one, pipeline, image):
    noises = []
    original = pipeline.prepare_latents

    def prepare(*arguments, **keywords):
        result = original(*arguments, **keywords)
        noises.append(result[0].clone())
        return result

    pipeline.prepare_latents = prepare
    make(stage_one, image, num_frames=17)
    assert len(noises) == 3
    assert not torch.equal(noises[0], noises[1])
    assert not torch.equal(noises[1], noises[2])
    first = torch.randn(noises[0].shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noises[0], first)


def test_the_prompt_is_encoded_once_for_all_windows(stage_one, pipeline, image):
    calls = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    make(stage_one, image, num_frames=13)
    assert len(calls) == 1


def test_steps_are_counted_over_all_windows(stage_one, image):
    steps = []
    make(stage_one, image, num_frames=13, on_step=lambda *step: steps.append(step))
    assert steps == [(step, 8) for step in range(8)]
