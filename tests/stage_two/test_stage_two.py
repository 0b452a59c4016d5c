"""Stage II against the network and the codec called by hand."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from swifti2v import stage_two as stage_two_module
from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.sampling.schedules import shifted_sigmas
from swifti2v.sampling.segmented import frame_noise
from swifti2v.settings import GenerationSettings
from swifti2v.stage_two import StageTwo
from swifti2v.wan.context_attention import KVCache
from swifti2v.wan.streaming import open_codec
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

SETTINGS = GenerationSettings(
    size=Size(64, 32), num_frames=13, fps=8, refiner="concat", seed=4, num_inference_steps=2, segment_size=1
)


@pytest.fixture
def concat(tiny_wan_dit: Callable[..., Any], tiny_vae22: Any) -> StageTwo:
    transformer = StageTwoTransformer.from_wan(tiny_wan_dit(), reference_channels=48)
    with torch.no_grad():
        transformer.patch_embedding.weight.normal_(std=0.1)
        transformer.proj_out.weight.normal_(std=0.1)
    return StageTwo(transformer.eval(), open_codec(tiny_vae22))


@pytest.fixture
def training_free(tiny_wan_dit: Callable[..., Any], tiny_vae22: Any) -> StageTwo:
    return StageTwo(StageTwoTransformer.from_wan(tiny_wan_dit()).eval(), open_codec(tiny_vae22))


def chunks(num_frames: int = 13) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1] + [4] * (num_frames // 4)
    return [torch.rand(1, 3, length, 32, 64, generator=generator) * 2 - 1 for length in lengths]


def text(seed: int = 2) -> Tensor:
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(seed))


def whole(stage_two: StageTwo, settings: GenerationSettings, **options: Any) -> Tensor:
    items = stage_two.refine(chunks(), settings, **({"prompt_embeds": text()} | options))
    return torch.cat([item.latents for item in items], dim=2)


def count_calls(stage_two: StageTwo) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    stage_two.transformer.register_forward_pre_hook(
        lambda _module, positional, named: calls.append(dict(named) | {"positional": positional}), with_kwargs=True
    )
    return calls


def test_one_segment_is_the_network_on_the_whole_clip(concat: StageTwo) -> None:
    """Euler written out, with the network called on [anchor, targets] and the reference beside them."""
    settings = replace(SETTINGS, segment_size=3, neighbors_before=0)
    reference = torch.cat(list(concat.codec.encode_stream(chunks())), dim=2)
    sigmas = shifted_sigmas(2, shift=5.0)
    noise = torch.cat([frame_noise(4, j, (1, 48, 1, 2, 4)) for j in (1, 2, 3)], dim=2)
    x = noise
    with torch.no_grad():
        for sigma, following in itertools.pairwise(sigmas):
            slots = torch.cat([reference[:, :, :1], x], dim=2)
            velocity = concat.transformer(
                torch.cat([slots, reference], dim=1),
                torch.tensor([[0.0] + [1000 * sigma] * 3]),
                text(),
                frame_positions=torch.arange(4),
                frame_kinds=torch.tensor([1, 0, 0, 0]),
            ).sample[:, :, 1:]
            x = x + (following - sigma) * velocity
    ours = whole(concat, settings)
    assert torch.equal(ours[:, :, :1], reference[:, :, :1])
    torch.testing.assert_close(ours[:, :, 1:], x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(x, noise, atol=0.1)


def test_training_free_starts_from_the_noised_reference(training_free: StageTwo) -> None:
    """With hardly any noise and no time to move, the result is the reference."""
    settings = replace(SETTINGS, refiner="training-free", sigma_start=1e-3)
    reference = torch.cat(list(training_free.codec.encode_stream(chunks())), dim=2)
    torch.testing.assert_close(whole(training_free, settings), reference, rtol=0, atol=0.05)
    assert not torch.allclose(whole(training_free, replace(settings, sigma_start=1.0)), reference, atol=0.5)


def test_segments_see_what_was_finished_before_them(concat: StageTwo) -> None:
    alone = whole(concat, replace(SETTINGS, neighbors_before=0))
    chained = whole(concat, SETTINGS)
    assert torch.equal(alone[:, :, :2], chained[:, :, :2])  # the first segment has nothing before it
    assert not torch.equal(alone[:, :, 2:], chained[:, :, 2:])


def given_frames(calls: list[dict[str, Any]]) -> list[int]:
    return [call["positional"][0].shape[2] for call in calls]


def test_context_is_kept_within_a_segment_and_for_each_text(concat: StageTwo) -> None:
    """The first step of a segment runs its window, the other ones the targets; guidance does both for its text."""
    settings = replace(SETTINGS, num_inference_steps=3, segment_size=2, guidance_scale=2.0, keep_context=True)
    calls = count_calls(concat)
    kept = whole(concat, settings, negative_prompt_embeds=text(7))
    # Segments of 2 and 1 targets, the first with the anchor, the second with a neighbor too; two texts a step.
    assert given_frames(calls) == [3, 3, 2, 2, 2, 2, 3, 3, 1, 1, 1, 1]
    exact = whole(concat, replace(settings, keep_context=False), negative_prompt_embeds=text(7))
    assert not torch.equal(kept, exact)
    torch.testing.assert_close(kept, exact, rtol=0, atol=0.2)


def test_kept_context_is_let_go_before_a_segment_is_handed_out(
    concat: StageTwo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gigabytes at full size, and whoever takes the segment decodes it on the same device."""
    made: list[weakref.ref[KVCache]] = []

    class Watched(KVCache):
        def __init__(self, num_blocks: int) -> None:
            super().__init__(num_blocks)
            made.append(weakref.ref(self))

    monkeypatch.setattr(stage_two_module, "KVCache", Watched)
    settings = replace(SETTINGS, keep_context=True)
    for item in concat.refine(iter(chunks()), settings, prompt_embeds=text()):
        assert not any(each() for each in made), item.segment
    assert len(made) == 3


def test_a_text_is_read_once_though_the_network_waits_elsewhere(concat: StageTwo) -> None:
    """It is known by its tensor, so that it must be one that the network can take as it is."""
    read = []
    concat.transformer.blocks[0].attn2.to_k.register_forward_hook(lambda *_: read.append(1))
    concat.transformer.to(torch.bfloat16)
    networks = PlacedNetworks(torch.device("cpu"))
    networks.place(concat.transformer, "loaded", group="refinement")
    list(concat.refine(iter(chunks()), SETTINGS, prompt_embeds=text()))
    networks.release()
    assert len(read) == 1


def test_context_is_not_kept_beside_a_cache_of_diffusers(concat: StageTwo) -> None:
    concat.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with pytest.raises(InvalidInputError, match=r"disable_cache\(\) first"):
        whole(concat, replace(SETTINGS, keep_context=True))


def test_frozen_context_is_kept_unasked_and_changes_nothing(tiny_wan_dit: Callable[..., Any], tiny_vae22: Any) -> None:
    transformer = StageTwoTransformer.from_wan(tiny_wan_dit(), reference_channels=48).eval()
    transformer.register_to_config(context_attention="frozen")
    stage_two = StageTwo(transformer, open_codec(tiny_vae22))
    calls = count_calls(stage_two)
    kept = whole(stage_two, SETTINGS)
    assert given_frames(calls) == [2, 1, 3, 1, 3, 1]

    def step_by_step(*_: Any, **__: Any) -> bool:
        return False

    stage_two.keeps_context = step_by_step  # type: ignore[method-assign]
    torch.testing.assert_close(whole(stage_two, SETTINGS), kept, rtol=0, atol=1e-5)
    assert len(calls) == 12
    assert given_frames(calls)[6:] == [2, 2, 3, 3, 3, 3]


def test_without_the_anchor_the_network_is_called_on_the_targets_alone(concat: StageTwo) -> None:
    """Each segment of one step by hand; frame 0 is still given back, and still none of ours."""
    settings = replace(SETTINGS, segment_size=2, neighbors_before=0, num_inference_steps=1, anchor=False)
    reference = torch.cat(list(concat.codec.encode_stream(chunks())), dim=2)
    expected = [reference[:, :, :1]]
    with torch.no_grad():
        for frames in ([1, 2], [3]):
            noise = torch.cat([frame_noise(4, j, (1, 48, 1, 2, 4)) for j in frames], dim=2)
            velocity = concat.transformer(
                torch.cat([noise, reference[:, :, frames]], dim=1),
                torch.full((1, len(frames)), 1000.0),
                text(),
                frame_positions=torch.tensor(frames),
                frame_kinds=torch.zeros(len(frames), dtype=torch.long),
            ).sample
            expected.append(noise - velocity)
    torch.testing.assert_close(whole(concat, settings), torch.cat(expected, dim=2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole(concat, replace(settings, anchor=True))[:, :, 1:], torch.cat(expected[1:], dim=2))


def test_guidance_weighs_two_predictions(concat: StageTwo) -> None:
    settings = replace(SETTINGS, num_inference_steps=1, neighbors_before=0)
    calls = count_calls(concat)
    plain = whole(concat, settings)
    assert len(calls) == 3
    negative = whole(concat, settings, prompt_embeds=text(3))
    guided = whole(concat, replace(settings, guidance_scale=3.0), negative_prompt_embeds=text(3))
    assert len(calls) == 3 + 3 + 6
    torch.testing.assert_close(guided, negative + 3.0 * (plain - negative), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, negative, atol=1e-4)


def test_text_is_asked_for_where_it_is_used(concat: StageTwo) -> None:
    with pytest.raises(InvalidInputError, match="pass prompt_embeds"):
        whole(concat, SETTINGS, prompt_embeds=None)
    with pytest.raises(InvalidInputError, match="negative ones for guidance"):
        whole(concat, replace(SETTINGS, guidance_scale=2.0))
    deaf = StageTwo(concat.transformer, concat.codec, uses_prompt=False)
    assert torch.equal(whole(deaf, SETTINGS, prompt_embeds=None), whole(deaf, SETTINGS))
    assert not torch.equal(whole(deaf, SETTINGS), whole(concat, SETTINGS))


def test_refiner_must_fit_the_network(concat: StageTwo, training_free: StageTwo) -> None:
    with pytest.raises(InvalidInputError, match=r"not trained with the reference.*use the refiner training-free"):
        whole(training_free, SETTINGS)
    with pytest.raises(InvalidInputError, match=r"needs the reference as channels; use the refiner concat"):
        whole(concat, replace(SETTINGS, refiner="training-free"))
    for stage_two in (concat, training_free):
        stage_two.check_refiner(replace(SETTINGS, refiner="none"))


def test_plan_covers_the_clip(concat: StageTwo) -> None:
    assert [list(segment.targets) for segment in concat.plan(replace(SETTINGS, segment_size=2))] == [[1, 2], [3]]
    assert concat.plan(replace(SETTINGS, num_frames=1)) == ()


def test_one_frame_is_the_anchor(concat: StageTwo) -> None:
    (item,) = concat.refine(chunks(1), replace(SETTINGS, num_frames=1), prompt_embeds=text())
    assert item.segment is None
    assert torch.equal(item.latents, next(concat.codec.encode_stream(chunks(1))))


def test_stored_segments_are_not_made_again(concat: StageTwo) -> None:
    full = whole(concat, SETTINGS)
    calls = count_calls(concat)
    steps: list[tuple[int, int]] = []
    resumed = whole(
        concat,
        SETTINGS,
        finished=lambda segment: full[:, :, segment.index + 1 : segment.index + 2] if segment.index < 2 else None,
        on_step=lambda segment, step, _total: steps.append((segment.index, step)),
    )
    assert torch.equal(resumed, full)
    assert len(calls) == 2
    assert steps == [(2, 0), (2, 1)]


def test_nothing_is_read_ahead_and_nothing_kept(concat: StageTwo) -> None:
    """One chunk for the anchor and one a segment; what was before is free again, however long the clip."""
    pixels: list[weakref.ref[Tensor]] = []
    latents: list[weakref.ref[Tensor]] = []

    def watched() -> Iterator[Tensor]:
        for length in [1] + [4] * 8:
            chunk = torch.zeros(1, 3, length, 32, 64)
            pixels.append(weakref.ref(chunk))
            yield chunk

    def alive(references: list[weakref.ref[Tensor]]) -> int:
        return sum(reference() is not None for reference in references)

    settings = replace(SETTINGS, num_frames=33, num_inference_steps=1)
    items = concat.refine(watched(), settings, prompt_embeds=text())
    for number in range(9):
        item = next(items)
        assert (item.segment is None) == (number == 0)
        assert len(pixels) == number + 1
        latents.append(weakref.ref(item.latents))
        del item
        assert alive(pixels) <= 1
        assert alive(latents) <= 2  # the anchor, which every segment sees, and the last result
    assert next(items, None) is None
