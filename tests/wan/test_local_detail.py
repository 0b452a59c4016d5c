"""The local correction beside the tokens: nothing before training, then the 3x3 neighborhood and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swifti2v.wan.local_detail import LocalDetail
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path


def trained() -> LocalDetail:
    torch.manual_seed(0)
    module = LocalDetail(8, 8, 16)
    torch.nn.init.normal_(module.correct.weight)
    return module


@torch.no_grad()
def test_a_cell_sees_its_neighbors_in_its_own_frame_only() -> None:
    reference = torch.randn(1, 8, 3, 6, 6)
    assert LocalDetail(8, 8, 16)(reference).abs().max() == 0
    changed = reference.clone()
    changed[:, :, 1, 2, 2] += 1
    difference = (trained()(changed) - trained()(reference)).abs().amax(dim=(0, 1))
    assert (difference[1, 1:4, 1:4] > 0).all()
    difference[1, 1:4, 1:4] = 0
    assert difference.max() == 0


@torch.no_grad()
def test_the_network_adds_it_to_the_output_of_the_tokens_and_saves_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 32, "ffn_dim": 32}
    channels = {"in_channels": 16, "out_channels": 8, "reference_channels": 8}
    network = StageTwoTransformer(**sizes, **channels, num_layers=1, local_detail_width=16).eval()
    inputs = torch.randn(1, 16, 3, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 16)
    before = network(*inputs).sample
    network.local_detail = trained()
    after = network(*inputs).sample
    torch.testing.assert_close(after - before, network.local_detail(inputs[0][:, 8:]), atol=1e-5, rtol=1e-4)
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(StageTwoTransformer.from_pretrained(tmp_path)(*inputs).sample, after)
