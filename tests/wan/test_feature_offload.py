"""Offloaded tensors come back as they were, and take hardly more pinned memory than their size."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.full_size_networks import VAE22
from swifti2v.wan.feature_offload import SMALLEST_BYTES, SMALLEST_SHARE, features_on, piece_lengths
from swifti2v.wan.wan_chunked import ChunkedWanNetwork

CPU = torch.device("cpu")


def rounded_up(num_bytes: int) -> int:
    """Return what PyTorch's allocator of pinned memory takes for a block (``ATen/core/CachingHostAllocator.h``)."""
    return 1 << (num_bytes - 1).bit_length()


def test_tensors_of_any_layout_come_back_as_they_were() -> None:
    wide = torch.randn(1, 40, 3, 30, 50)
    cache = {
        "plain": wide.clone(),
        "channels last": wide.clone(memory_format=torch.channels_last_3d),
        "part of another": wide[:, 3:35, -2:, 1:-1, 1:-1],
        "one frame": wide[:, :, -1:].clone(memory_format=torch.channels_last_3d),
        "nothing": torch.empty(1, 0, 2),
    }
    expected = {name: tensor.clone() for name, tensor in cache.items()}
    strides = {name: cache[name].stride() for name in ("plain", "channels last")}
    with features_on(CPU, cache, offload=True):
        cache["made in it"] = torch.ones(3, dtype=torch.bfloat16)
    assert not any(isinstance(entry, torch.Tensor) for entry in cache.values())
    with features_on(CPU, cache, offload=True):
        for name, tensor in expected.items():
            assert torch.equal(cache[name], tensor), name
        assert torch.equal(cache["made in it"], torch.ones(3, dtype=torch.bfloat16))
        assert {name: cache[name].stride() for name in strides} == strides


def test_lists_keep_what_is_no_tensor() -> None:
    cache = [None, "Rep", torch.arange(5.0)]
    with features_on(CPU, cache, offload=True):
        pass
    with features_on(CPU, cache, offload=True):
        assert cache[:2] == [None, "Rep"]
        assert torch.equal(cache[2], torch.arange(5.0))  # type: ignore[arg-type]


@given(st.integers(0, 2**33), st.sampled_from([1, 2, 4]))
def test_pieces_are_powers_of_two_but_for_a_small_rest(count: int, element_bytes: int) -> None:
    lengths = piece_lengths(count, element_bytes)
    assert sum(lengths) == count
    *whole, last = [length * element_bytes for length in lengths] or [0]
    assert all(piece.bit_count() == 1 for piece in whole)
    assert last.bit_count() <= 1 or last <= max(count * element_bytes // SMALLEST_SHARE, SMALLEST_BYTES)


@pytest.mark.parametrize(
    "tile", [(2560, 1408), (1344, 1408), (1344, 768), (944, 560), (1280, 704), (704, 416)], ids=str
)
def test_the_features_of_a_codec_take_hardly_more_host_memory_than_their_size(
    tile: tuple[int, int], features_of_a_cell: list[float]
) -> None:
    cells = tile[0] * tile[1] // 256
    needed = [2 * round(elements * cells) for elements in features_of_a_cell]
    taken = [sum(rounded_up(2 * piece) for piece in piece_lengths(each // 2, 2)) for each in needed]
    assert sum(taken) <= 1.02 * sum(needed)


def test_uncut_they_would_take_half_as_much_again(features_of_a_cell: list[float]) -> None:
    needed = [2 * round(elements * 59 * 35) for elements in features_of_a_cell]
    assert sum(map(rounded_up, needed)) > 1.3 * sum(needed)


@pytest.fixture(scope="module")
def features_of_a_cell() -> list[float]:
    """Elements of each cached tensor of Wan2.2's codec for a latent cell."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(dim_mult=[1, 2, 4, 4], **VAE22).eval()
        network, cache = ChunkedWanNetwork(vae), {}
        with torch.no_grad():
            for index in range(2):
                network.decode(torch.empty(1, 48, 1, 4, 4), cache, first_chunk=index == 0)
                network.encode(torch.empty(1, 12, 4 if index else 1, 32, 32), cache)
    return [tensor.numel() / 16 for tensor in cache.values()]
