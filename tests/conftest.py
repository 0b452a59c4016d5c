"""Tiny real components: the classes of the full system at random weights, small enough for a unit test."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from benchmarks.full_size_networks import VAE21, VAE22, character_tokenizer
from swifti2v.memory import table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

# How long an example takes says something about the machine only.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

torch.set_num_threads(1)  # networks this small lose by a second thread, tenfold on a busy machine

TEXT_WIDTH = 32
WAN_DIT = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}

TINY_CODEC: dict[str, Any] = {
    "base_dim": 3,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
WAN21_CODEC = VAE21 | TINY_CODEC
WAN22_CODEC = VAE22 | TINY_CODEC | {"decoder_base_dim": None}

TINY_INDEX: dict[str, Any] = {
    "format": 1,
    "name": "tiny",
    "stage_one": {
        "source": "./stage_one",
        "window_frames": 9,
        "max_sequence_length": 16,
        "adapters": [
            {"source": "./adapters", "weight_name": "high.safetensors", "expert": "high", "scale": 0.5},
            {"source": "./adapters", "weight_name": "low.safetensors", "expert": "low"},
            {"source": "./adapters", "weight_name": "small.safetensors", "role": "low_res"},
        ],
    },
    "stage_two": {"source": "./stage_two"},
    "defaults": {"width": 64, "height": 64, "num_frames": 9, "fps": 8},
    "licence": "CC0-1.0",
    "attribution": "random numbers",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped for one reason only: there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def measured_costs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests measure is not kept for the user, nor taken from what was measured with other code."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    table.user_table_path = lambda: path
    os.environ["HF_ASSETS_CACHE"] = str(path.parent)  # for commands in processes of their own


@pytest.fixture
def loud_libraries() -> Iterator[None]:
    """Give the libraries back the voice that the commands take from them."""
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    kept = [library.get_verbosity() for library in libraries]
    yield
    for library, verbosity in zip(libraries, kept, strict=True):
        library.set_verbosity(verbosity)
        library.enable_progress_bar()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer with T5's special tokens."""
    return character_tokenizer()


@pytest.fixture
def tiny_text_encoder() -> UMT5EncoderModel:
    """UMT5 of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
    )
    return UMT5EncoderModel(config).eval()


@pytest.fixture
def tiny_vae21() -> AutoencoderKLWan:
    """Wan2.1's codec: 16 channels, 8x8x4."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**WAN21_CODEC).eval()


@pytest.fixture
def tiny_vae22() -> AutoencoderKLWan:
    """Wan2.2's codec: 48 channels, 16x16x4, patchified input."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    return AutoencoderKLWan(**WAN22_CODEC).eval()


@pytest.fixture
def tiny_wan_dit() -> Callable[..., WanTransformer3DModel]:
    """Factory of diffusers' own transformer: (36, 16) for an expert of Stage I, (48, 48) for TI2V-5B."""
    from diffusers import WanTransformer3DModel

    def make(in_channels: int = 48, out_channels: int = 48, **changes: Any) -> WanTransformer3DModel:
        torch.manual_seed(0)
        settings = WAN_DIT | {"in_channels": in_channels, "out_channels": out_channels} | changes
        return WanTransformer3DModel(**settings).eval()

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A whole checkpoint of both stages, written once by diffusers itself; tests that change it take a copy.

    ``stock/`` beside it holds TI2V-5B's own class, for an index that names it instead of ``stage_two/``.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanTransformer3DModel
    from safetensors.torch import save_file
    from transformers import UMT5Config, UMT5EncoderModel

    from swifti2v.wan.transformer import StageTwoTransformer

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("tiny")

    def network(**changes: Any) -> WanTransformer3DModel:
        settings: dict[str, Any] = {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 36,
            "out_channels": 16,
            "text_dim": 32,
            "freq_dim": 16,
            "ffn_dim": 32,
            "num_layers": 1,
            "rope_max_seq_len": 32,
        }
        return WanTransformer3DModel(**(settings | changes))

    text = UMT5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4, relative_attention_num_buckets=8
    )
    WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        vae=AutoencoderKLWan(**WAN21_CODEC),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=network(),
        transformer_2=network(),
        boundary_ratio=0.9,
    ).save_pretrained(root / "stage_one")
    stock = network(in_channels=48, out_channels=48)
    stock.save_pretrained(root / "stock" / "transformer")
    wide = StageTwoTransformer.from_wan(stock, reference_channels=48)
    with torch.no_grad():
        wide.patch_embedding.weight[:, 48:].normal_()
    wide.save_pretrained(root / "stage_two" / "transformer")
    AutoencoderKLWan(**WAN22_CODEC).save_pretrained(root / "stage_two" / "vae")
    shutil.copytree(root / "stage_two" / "vae", root / "stock" / "vae")
    (root / "adapters").mkdir()
    for seed, name in enumerate(("high", "low", "small")):
        generator = torch.Generator().manual_seed(seed)
        part = "diffusion_model.blocks.0.self_attn.q.lora_"
        down, up = torch.randn(2, 24, generator=generator), torch.randn(24, 2, generator=generator)
        save_file({f"{part}down.weight": down, f"{part}up.weight": up}, root / "adapters" / f"{name}.safetensors")
    (root / "swifti2v.json").write_text(json.dumps(TINY_INDEX))
    return root
