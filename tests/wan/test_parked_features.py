"""Parked tensors come back as they were, and take hardly more pinned memory than they are large."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import full_size_networks
from swifti2v.geometry import Size
from swifti2v.memory.ways import GRIDS, tile_size
from swifti2v.wan.lean_vae import LeanWanNetwork
from swifti2v.wan.parked_features import SMALLEST_BYTES, SMALLEST_SHARE, piece_lengths, visit

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
    with visit(cache, CPU, parked=True):
        cache["made in it"] = torch.ones(3, dtype=torch.bfloat16)
    assert not any(isinstance(entry, torch.Tensor) for entry in cache.values())
    with visit(cache, CPU, parked=True):
        for name, tensor in expected.items():
            assert torch.equal(cache[name], tensor), name
        assert torch.equal(cache["made in it"], torch.ones(3, dtype=torch.bfloat16))
        assert {name: cache[name].stride() for name in strides} == strides


def test_lists_keep_what_is_no_tensor() -> None:
    cache = [None, "Rep", torch.arange(5.0)]
    with visit(cache, CPU, parked=True):
        pass
    with visit(cache, CPU, parked=True):
        assert cache[:2] == [None, "Rep"]
        assert torch.equal(cache[2], torch.arange(5.0))  # type: ignore[arg-type]


@given(st.integers(0, 2**33), st.sampled_from([1, 2, 4]))
def test_pieces_are_powers_of_two_but_for_a_small_rest(count: int, element_bytes: int) -> None:
    lengths = piece_lengths(count, element_bytes)
    assert sum(lengths) == count
    *whole, last = [length * element_bytes for length in lengths] or [0]
    assert all(piece.bit_count() == 1 for piece in whole)
    assert last.bit_count() <= 1 or last <= max(count * element_bytes // SMALLEST_SHARE, SMALLEST_BYTES)


@pytest.mark.parametrize("size", [Size(2560, 1408), Size(1280, 704)], ids=str)
def test_the_features_of_a_codec_take_the_host_memory_that_they_are_planned_with(size: Size) -> None:
    with full_size_networks.built_on("meta"):
        vae = AutoencoderKLWan(**full_size_networks.VAE22).eval()
    network, caches = LeanWanNetwork(vae), [{}, {}]
    with torch.no_grad():
        for index, frames in enumerate((1, 4, 4)):
            network.encode(torch.empty(1, 12, frames, 16, 16, device="meta", dtype=torch.bfloat16), caches[0])
            latent = torch.empty(1, 48, 1, 2, 2, device="meta", dtype=torch.bfloat16)
            network.decode(latent, caches[1], first_chunk=index == 0)
    of_32_by_32 = [tensor.numel() for cache in caches for tensor in cache.values()]
    uncut = []
    for columns, rows in GRIDS:
        tile = tile_size(size, columns, rows, multiple=16)
        needed = [2 * elements * tile.width * tile.height // 32**2 for elements in of_32_by_32]
        taken = [sum(rounded_up(2 * piece) for piece in piece_lengths(each // 2, 2)) for each in needed]
        assert sum(taken) <= 1.02 * sum(needed)
        uncut.append(sum(map(rounded_up, needed)) / sum(needed))
    assert max(uncut) > 1.5  # why they are cut
