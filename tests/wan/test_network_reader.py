"""Networks read tensor by tensor are those that diffusers and transformers load, and are never whole on the way."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from swifti2v.errors import CheckpointError
from swifti2v.memory.live_bytes import LiveBytes
from swifti2v.wan.checkpoints import load_stage_one_pipeline, load_stage_two_transformer, resolve
from swifti2v.wan.network_reader import NetworkReader
from swifti2v.wan.quantized_linear import WeightDtype, store_weights
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from torch import nn


AS_LOADED = NetworkReader()


def narrow(dtype: WeightDtype, compute_dtype: torch.dtype) -> NetworkReader:
    return NetworkReader(partial(store_weights, dtype=dtype, compute_dtype=compute_dtype))


def assert_equal(network: nn.Module, expected: nn.Module) -> None:
    tensors, others = (dict(each.state_dict()) for each in (network, expected))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor.float(), others[name].float()), name
    for name, buffer in network.named_buffers():  # those that are not saved, too
        assert torch.equal(buffer.float(), dict(expected.named_buffers())[name].float()), name
    assert not network.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        (WanTransformer3DModel, "stage_one/transformer"),
        (StageTwoTransformer, "stage_two/transformer"),
        (StageTwoTransformer, "stock/transformer"),
        (UMT5EncoderModel, "stage_one/text_encoder"),
        (AutoencoderKLWan, "stage_two/vae"),
    ],
)
def test_a_network_is_the_one_that_its_library_loads(
    tiny_checkpoint: Path, kind: Any, folder: str, dtype: torch.dtype
) -> None:
    expected = kind.from_pretrained(tiny_checkpoint / folder, dtype=dtype).eval()
    network = AS_LOADED.read(kind, tiny_checkpoint / folder, dtype)
    assert_equal(network, expected)
    assert network.dtype == expected.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float8", "nf4"])
def test_what_is_stored_is_what_a_loaded_network_would_store(
    tiny_checkpoint: Path, stored: WeightDtype, dtype: torch.dtype
) -> None:
    """LoRAs included: they are in the weights before these are rounded."""
    resolved = resolve(tiny_checkpoint)
    expected = load_stage_one_pipeline(resolved, dtype=dtype)
    pipeline = load_stage_one_pipeline(resolved, dtype=dtype, reader=narrow(stored, dtype))
    for name in ("text_encoder", "transformer", "transformer_2"):
        store_weights(getattr(expected, name), stored, compute_dtype=dtype)
        assert_equal(getattr(pipeline, name), getattr(expected, name))
    second = load_stage_two_transformer(resolved, dtype=dtype)
    store_weights(second, stored, compute_dtype=dtype)
    assert_equal(load_stage_two_transformer(resolved, dtype=dtype, reader=narrow(stored, dtype)), second)


def test_the_whole_network_is_never_there_as_it_was_saved(tmp_path: Path) -> None:
    """Counted while it is read: what is kept, and a few tensors of the size of the largest beside it."""
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=64,
        ffn_dim=1024,
        num_layers=12,
        text_dim=32,
        freq_dim=16,
        rope_max_seq_len=32,
    )
    network.save_pretrained(tmp_path, max_shard_size="20MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = 2 * network.num_parameters()
    del network
    reader = narrow("nf4", torch.bfloat16)
    made = reader.build(WanTransformer3DModel, tmp_path, torch.bfloat16)
    with LiveBytes() as live:  # counts tensors on the meta device too: those of layers that are packed later
        reader.fill(made, tmp_path)
    kept = sum(tensor.nbytes for tensor in (*made.parameters(), *made.buffers()))
    largest = 256 * 1024
    assert kept < 0.4 * whole
    # bfloat16, and what packing makes: float32 and its scaled copy, codes in int32, and bytes.
    assert live.peak_bytes < kept + 24 * largest
    assert live.peak_bytes < 0.75 * whole


def edited(root: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    copy = Path(shutil.copytree(folder, root / "copy"))
    file = next(copy.glob("*.safetensors"))
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"blocks.0.attn1.to_q.weight": None},
            r"[12] missing, 0 without a place, for instance blocks\.0\.attn1\.to_q\.",
        ),
        ({"proj_out.bias": None}, "1 missing"),
        ({"blocks.0.extra": torch.zeros(2)}, "0 missing, 1 without a place, for instance blocks.0.extra"),
        ({"blocks.0.attn1.to_q.weight": torch.zeros(24, 8)}, r"to_q.weight in .* is \[24, 8\] and not \[24, 24\]; get"),
    ],
)
@pytest.mark.parametrize("stored", ["bfloat16", "float8", "nf4"])
def test_weights_that_do_not_belong(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str, stored: WeightDtype
) -> None:
    folder = edited(tmp_path, tiny_checkpoint / "stage_one" / "transformer", **changes)
    with pytest.raises(CheckpointError, match=message):
        narrow(stored, torch.bfloat16).read(WanTransformer3DModel, folder, torch.bfloat16)
