"""Context that is frozen or cached: which tokens see which, and what equals a whole pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.memory.live_bytes import accounted
from swifti2v.segments import Segment
from swifti2v.wan.condition import predict_targets
from swifti2v.wan.context_attention import KVCache, WindowAttention
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CHANNELS = 6
TOKENS_PER_FRAME = 6  # 4x6 latents in patches of 2x2
TOLERANCE = {"rtol": 0, "atol": 2e-6}
SEGMENTS = {
    "anchor and neighbor before": Segment(1, range(4, 7), range(3, 4), range(0)),
    "neighbors on both sides": Segment(1, range(4, 6), range(2, 4), range(6, 8)),
    "neighbor behind only": Segment(1, range(4, 5), range(0), range(5, 6), anchor=False),
    "no context": Segment(0, range(1, 4), range(0), range(0), anchor=False),
}


@pytest.fixture(params=["bidirectional", "frozen"])
def network(request: pytest.FixtureRequest, make_network: Callable[[str], StageTwoTransformer]) -> StageTwoTransformer:
    return make_network(request.param)


@pytest.fixture
def make_network() -> Callable[[str], StageTwoTransformer]:
    def make(context_attention: str) -> StageTwoTransformer:
        torch.manual_seed(0)
        made = StageTwoTransformer(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=2 * CHANNELS,
            out_channels=CHANNELS,
            reference_channels=CHANNELS,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            context_attention=context_attention,
        )
        torch.nn.init.normal_(made.frame_kind_table, std=0.3)
        return made.eval()

    return make


def predicted(network: StageTwoTransformer, segment: Segment, *, sigma: float = 0.5, **more: Any) -> Tensor:
    """x0 of the targets; the noisy targets depend on `sigma`, the context does not."""
    window, targets = len(segment.window), len(segment.targets)
    generator = torch.Generator().manual_seed(3)
    slots, reference = torch.randn(2, 1, CHANNELS, window, 4, 6, generator=generator)
    noisy = torch.randn(1, CHANNELS, targets, 4, 6, generator=generator) * (1 + sigma)
    return predict_targets(
        network,
        segment=segment,
        slots=slots,
        reference=reference,
        targets=noisy,
        sigma=sigma,
        prompt_embeds=torch.randn(1, 4, 8, generator=generator),
        **more,
    )


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@torch.no_grad()
def test_the_first_pass_with_a_cache_is_the_pass_without(network: StageTwoTransformer, segment: Segment) -> None:
    cache = KVCache(len(network.blocks))
    torch.testing.assert_close(predicted(network, segment, kv_cache=cache), predicted(network, segment))
    assert cache.is_filled == (len(segment.window) > len(segment.targets))


@pytest.mark.parametrize("segment", SEGMENTS.values(), ids=SEGMENTS)
@torch.no_grad()
def test_later_passes_are_exact_where_the_context_is_frozen(
    make_network: Callable[[str], StageTwoTransformer], segment: Segment
) -> None:
    network, cache = make_network("frozen"), KVCache(3)
    for sigma in (1.0, 0.7, 0.2):
        kept = predicted(network, segment, sigma=sigma, kv_cache=cache)
        torch.testing.assert_close(kept, predicted(network, segment, sigma=sigma), **TOLERANCE)


@torch.no_grad()
def test_later_passes_differ_where_the_context_saw_the_targets(
    make_network: Callable[[str], StageTwoTransformer],
) -> None:
    network, cache = make_network("bidirectional"), KVCache(3)
    segment = SEGMENTS["anchor and neighbor before"]
    predicted(network, segment, sigma=1.0, kv_cache=cache)
    same = predicted(network, segment, sigma=1.0, kv_cache=cache)
    torch.testing.assert_close(same, predicted(network, segment, sigma=1.0), **TOLERANCE)
    kept = predicted(network, segment, sigma=0.2, kv_cache=cache)
    difference = (kept - predicted(network, segment, sigma=0.2)).abs().max()
    assert 1e-4 < float(difference) < 0.5


@pytest.mark.parametrize(("context_attention", "sees"), [("bidirectional", True), ("frozen", False)])
@torch.no_grad()
def test_only_bidirectional_context_sees_the_targets(
    make_network: Callable[[str], StageTwoTransformer], context_attention: str, *, sees: bool
) -> None:
    """The output of the context's own frames, read past `predict_targets`, moves with the targets or does not."""
    network = make_network(context_attention)
    window = torch.randn(1, 2 * CHANNELS, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    changed = window.clone()
    changed[:, :, 2] += 1
    kinds = torch.tensor([1, 2, 0, 3])

    def output(latents: Tensor) -> Tensor:
        return network(latents, torch.tensor([[0.0, 0.0, 500.0, 0.0]]), torch.ones(1, 2, 8), frame_kinds=kinds).sample

    before, after = output(window), output(changed)
    context = [0, 1, 3]
    assert torch.equal(before[:, :, context], after[:, :, context]) is not sees
    assert not torch.equal(before[:, :, 2], after[:, :, 2])
    changed = window.clone()
    changed[:, :, 3] += 1
    assert not torch.equal(before[:, :, 2], output(changed)[:, :, 2]), "the targets see the context"


@torch.no_grad()
def test_frozen_is_diffusers_attention_under_a_mask(
    make_network: Callable[[str], StageTwoTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the parent's processor over the whole window, a mask forbidding context to look at targets."""
    network, segment = make_network("frozen"), SEGMENTS["neighbors on both sides"]
    made = predicted(network, segment)

    is_target = torch.tensor([kind == 0 for kind in segment.kinds]).repeat_interleave(TOKENS_PER_FRAME)
    allowed = is_target[:, None] | ~is_target[None, :]

    def masked(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        is_self = key.shape[1] == len(is_target)
        return dispatch_attention_fn(query, key, value, **options | {"attn_mask": allowed if is_self else None})

    class Processor(WanAttnProcessor):
        """Not diffusers' own class, so that it is called instead of ours."""

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", masked)
    plain = make_network("bidirectional")
    plain.load_state_dict(network.state_dict())
    plain.set_attn_processor(Processor())
    torch.testing.assert_close(made, predicted(plain, segment), **TOLERANCE)


def test_gradients_are_those_of_the_checkpointed_pass(network: StageTwoTransformer) -> None:
    segment = SEGMENTS["anchor and neighbor before"]
    gradients = []
    for is_checkpointed in (False, True):
        network.train().zero_grad()
        (network.enable_gradient_checkpointing if is_checkpointed else network.disable_gradient_checkpointing)()
        predicted(network, segment).square().mean().backward()
        gradients.append(
            {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **TOLERANCE)


def test_the_kind_of_attention_is_saved_and_checked(network: StageTwoTransformer, tmp_path: Any) -> None:
    network.save_pretrained(tmp_path)
    loaded = StageTwoTransformer.from_pretrained(tmp_path)
    assert loaded.config.context_attention == network.config.context_attention
    with pytest.raises(ConfigurationError):
        StageTwoTransformer(num_layers=1, context_attention="causal")


@torch.no_grad()
def test_context_is_not_given_twice_and_targets_are_consecutive(network: StageTwoTransformer) -> None:
    cache = KVCache(len(network.blocks))

    def run(*kinds: int) -> None:
        latents, times = torch.randn(1, 2 * CHANNELS, len(kinds), 4, 6), torch.zeros(1, len(kinds))
        network(latents, times, torch.ones(1, 2, 8), frame_kinds=torch.tensor(kinds), kv_cache=cache)

    with pytest.raises(InvalidInputError):
        run(0, 1, 0)
    run(1, 0)
    with pytest.raises(InvalidInputError):
        run(1, 0)


def test_no_more_is_alive_than_in_diffusers_own_processor() -> None:
    """In bfloat16, where queries and keys are turned in float32: normed and turned as a pair, it was a tensor more."""
    num_tokens, width = 2048, 256
    with torch.device("meta"):
        attention = transformer_wan.WanAttention(width, 2, width // 2, processor=WanAttnProcessor()).bfloat16()
        tokens = torch.empty(1, num_tokens, width, dtype=torch.bfloat16)
        rotary = (torch.empty(1, num_tokens, 1, width // 2),) * 2
    peaks = []
    for run in (
        lambda: WindowAttention(slice(0, num_tokens)).attend(attention, tokens, rotary),
        lambda: attention(tokens, None, None, rotary),
    ):
        with torch.no_grad(), accounted() as account:
            run()
        peaks.append(account.peak_bytes / tokens.nbytes)
    assert peaks[0] <= peaks[1] + 0.1
