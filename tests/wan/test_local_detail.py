"""The local way around the tokens: nothing before training, then the 3x3 neighbourhood and no more."""

from __future__ import annotations

import torch

from swifti2v.wan.local_detail import LocalDetail
from swifti2v.wan.transformer import StageTwoTransformer

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 8,
    "reference_channels": 8,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}


def trained() -> LocalDetail:
    torch.manual_seed(0)
    module = LocalDetail(8, 8, 16)
    torch.nn.init.normal_(module.correct.weight)
    return module


def test_it_is_zero_before_training() -> None:
    assert LocalDetail(8, 8, 16)(torch.randn(1, 8, 3, 4, 6)).abs().max() == 0


@torch.no_grad()
def test_a_cell_sees_its_neighbours_in_its_own_frame_only() -> None:
    module = trained()
    reference = torch.randn(1, 8, 3, 6, 6)
    changed = reference.clone()
    changed[:, :, 1, 2, 2] += 1
    difference = (module(changed) - module(reference)).abs().amax(dim=(0, 1))
    assert (difference[1, 1:4, 1:4] > 0).all()
    difference[1, 1:4, 1:4] = 0
    assert difference.max() == 0


@torch.no_grad()
def test_the_network_adds_it_to_what_the_tokens_say() -> None:
    torch.manual_seed(0)
    network = StageTwoTransformer(**TINY, local_detail_width=16).eval()
    hidden, timestep, text = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 16)
    before = network(hidden, timestep, text).sample
    network.local_detail = trained()
    after = network(hidden, timestep, text).sample
    torch.testing.assert_close(after - before, network.local_detail(hidden[:, 8:]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_it_is_saved_with_the_network(tmp_path) -> None:
    network = StageTwoTransformer(**TINY, local_detail_width=16).eval()
    network.local_detail = trained()
    network.save_pretrained(tmp_path)
    loaded = StageTwoTransformer.from_pretrained(tmp_path)
    hidden, timestep, text = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 16)
    torch.testing.assert_close(loaded(hidden, timestep, text).sample, network(hidden, timestep, text).sample)
