"""Kept keys and values of the text: the same output, computed once for a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from swifti2v.wan.text_attention import NUM_TEXTS, TextCache, keeps_text
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@pytest.fixture
def network(tiny_wan_dit: Callable[..., Any]) -> StageTwoTransformer:
    return StageTwoTransformer.from_wan(tiny_wan_dit()).eval()


class Calls:
    """Counts how often the layers that read only the text are run."""

    def __init__(self, network: StageTwoTransformer) -> None:
        self.count = 0
        for block in network.blocks:
            block.attn2.to_k.register_forward_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


def output(network: StageTwoTransformer, text: Tensor, *, frames: int = 3, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    latents = torch.randn(1, 48, frames, 4, 6, generator=generator)
    timestep = torch.tensor([[0.0] + [500.0] * (frames - 1)])
    return network(latents, timestep, text, **options).sample


def test_the_output_is_equal_in_every_pass_and_the_text_is_read_once(network: StageTwoTransformer) -> None:
    torch.manual_seed(2)
    one, other = torch.randn(1, 5, 32), torch.randn(1, 9, 32)
    with torch.no_grad():
        expected = {name: output(network, text) for name, text in (("one", one), ("other", other))}
        longer = output(network, one, frames=5)
        calls = Calls(network)
        with network.text_kept():
            for _ in range(3):
                assert torch.equal(output(network, one), expected["one"])
                assert torch.equal(output(network, other), expected["other"])
            assert torch.equal(output(network, one, frames=5), longer)
        assert calls.count == 2 * len(network.blocks)
        assert torch.equal(output(network, one), expected["one"])
        assert calls.count == 3 * len(network.blocks)


def test_text_that_was_written_to_is_read_again(network: StageTwoTransformer) -> None:
    text = torch.randn(1, 5, 32)
    with torch.no_grad(), network.text_kept():
        before = output(network, text)
        text.mul_(-1)
        after = output(network, text)
        fresh = output(network, text.clone())
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


def test_gradients_are_those_without(network: StageTwoTransformer) -> None:
    text = torch.randn(1, 5, 32)
    found = []
    for _ in range(2):
        network.zero_grad()
        with network.text_kept():
            output(network, text).square().mean().backward()
        found.append(network.blocks[0].attn2.to_k.weight.grad.clone())
    assert float(found[0].abs().max()) > 0
    assert torch.equal(*found)


def test_no_more_texts_are_held_than_guidance_needs() -> None:
    cache, texts = TextCache(1), [torch.ones(1), torch.ones(1), torch.ones(1)]
    places = [cache.of(text) for text in texts]
    assert len(cache.kept) == NUM_TEXTS
    assert cache.of(texts[2]) is places[2]
    assert cache.of(texts[1]) is places[1]
    assert cache.of(texts[0]) is not places[0]


def test_attention_of_another_form_is_left_alone(network: StageTwoTransformer) -> None:
    attention = network.blocks[0].attn2
    assert keeps_text(attention)
    text = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = output(network, text)
        for block in network.blocks:
            block.attn2.fuse_projections()
        assert not keeps_text(attention)
        with network.text_kept():
            torch.testing.assert_close(output(network, text), expected)


def test_streamed_blocks_keep_the_text_too(network: StageTwoTransformer) -> None:
    from swifti2v.memory.placement import PlacedNetworks

    text = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected = output(network, text)
        networks = PlacedNetworks(torch.device("cpu"))
        networks.place(network, "streamed", group="one")
        calls = Calls(network)
        with network.text_kept():
            assert torch.equal(output(network, text), expected)
            assert torch.equal(output(network, text), expected)
        assert calls.count == len(network.blocks)
        networks.release()
