"""StageTwoTransformer's weights: the keys of diffusers' own class, loaded, saved and widened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from swifti2v.errors import CheckpointError, ConfigurationError
from swifti2v.segments import FrameKind
from swifti2v.wan.transformer import StageTwoTransformer
from tests.wan.stage_two_inputs import CHANNELS, TOLERANCE, make_inputs, per_token, run

if TYPE_CHECKING:
    from pathlib import Path


class TestWeights:
    def test_keys_are_the_parents(self, base: Any, transformer: StageTwoTransformer) -> None:
        assert transformer.state_dict().keys() - base.state_dict().keys() == {"frame_kind_table"}
        fresh = StageTwoTransformer(**{k: v for k, v in base.config.items() if not k.startswith("_")}).eval()
        missing, unexpected = fresh.load_state_dict(base.state_dict(), strict=False)
        assert (missing, unexpected) == (["frame_kind_table"], [])
        inputs = make_inputs()
        torch.testing.assert_close(run(fresh, inputs), run(transformer, inputs), rtol=0, atol=0)
        base.load_state_dict({k: v for k, v in fresh.state_dict().items() if k != "frame_kind_table"})

    @pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
    def test_folder_of_the_stock_class(
        self, base: Any, tmp_path: Path, shard_size: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        base.save_pretrained(tmp_path, max_shard_size=shard_size)
        transformer, report = StageTwoTransformer.from_pretrained(tmp_path, output_loading_info=True)
        assert report["missing_keys"] == report["unexpected_keys"] == []
        assert "newly initialized" not in caplog.text
        assert not any(parameter.is_meta for parameter in transformer.parameters())
        assert transformer.frame_kind_table.count_nonzero() == 0
        assert (transformer.config.reference_channels, transformer.config.prediction_type) == (0, "velocity")
        assert transformer.config.num_layers == len(transformer.blocks) == 2
        inputs = make_inputs()
        kinds = torch.tensor([1, 2, 0])
        torch.testing.assert_close(
            run(transformer, inputs, frame_kinds=kinds), run(base, per_token(inputs)), **TOLERANCE
        )

    def test_single_file(self, base: Any, tmp_path: Path) -> None:
        base.save_pretrained(tmp_path)
        transformer = StageTwoTransformer.from_single_file(
            str(tmp_path / "diffusion_pytorch_model.safetensors"), config=str(tmp_path)
        )
        assert transformer.frame_kind_table.count_nonzero() == 0
        inputs = make_inputs()
        torch.testing.assert_close(run(transformer, inputs), run(base, per_token(inputs)), **TOLERANCE)

    def test_round_trip(self, base: Any, tmp_path: Path) -> None:
        transformer = StageTwoTransformer.from_wan(base, reference_channels=4, prediction_type="residual")
        torch.nn.init.normal_(transformer.frame_kind_table)
        torch.nn.init.normal_(transformer.patch_embedding.weight)
        transformer.save_pretrained(tmp_path)
        loaded = StageTwoTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        assert loaded.frame_kind_table.dtype == torch.float32
        loaded = StageTwoTransformer.from_pretrained(tmp_path)
        assert loaded.config.prediction_type == "residual"
        assert (loaded.config.in_channels, loaded.config.reference_channels) == (CHANNELS + 4, 4)
        inputs = make_inputs(channels=CHANNELS + 4)
        kinds = torch.tensor([FrameKind.ANCHOR, FrameKind.TARGET, FrameKind.UNREFINED])
        expected = run(transformer, inputs, frame_kinds=kinds)
        torch.testing.assert_close(run(loaded, inputs, frame_kinds=kinds), expected, rtol=0, atol=0)

    def test_component_of_a_saved_pipeline(self, transformer: StageTwoTransformer, tmp_path: Path) -> None:
        class OnePart(DiffusionPipeline):
            def __init__(self, transformer: Any) -> None:
                super().__init__()
                self.register_modules(transformer=transformer)

        OnePart(transformer).save_pretrained(tmp_path)
        assert isinstance(OnePart.from_pretrained(tmp_path).transformer, StageTwoTransformer)

    @pytest.mark.parametrize("reference_channels", [0, 1, CHANNELS])
    def test_widening_leaves_the_output(self, base: Any, reference_channels: int) -> None:
        inputs = make_inputs()
        before = run(base, per_token(inputs))
        wide = StageTwoTransformer.from_wan(base, reference_channels=reference_channels)
        assert wide.patch_embedding.in_channels == wide.config.in_channels == CHANNELS + reference_channels
        reference = torch.randn(2, reference_channels, 3, 4, 6)
        joined = inputs | {"hidden_states": torch.cat([inputs["hidden_states"], reference], dim=1)}
        torch.testing.assert_close(run(wide, joined), before, **TOLERANCE)
        # Taken over, not copied.
        assert wide.proj_out.weight.data_ptr() == base.proj_out.weight.data_ptr()

    def test_widening_our_own_keeps_its_kinds(self, transformer: StageTwoTransformer) -> None:
        torch.nn.init.normal_(transformer.frame_kind_table)
        wide = StageTwoTransformer.from_wan(transformer, reference_channels=2)
        torch.testing.assert_close(wide.frame_kind_table, transformer.frame_kind_table)
        with pytest.raises(ConfigurationError, match="reference_channels"):
            StageTwoTransformer.from_wan(wide, reference_channels=2)

    def test_widening_refuses_adapters(self, base: Any) -> None:
        base.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(CheckpointError, match="unload adapters"):
            StageTwoTransformer.from_wan(base)

    @pytest.mark.parametrize("damage", ["missing", "unexpected"])
    def test_incomplete_checkpoint_is_an_error(self, base: Any, tmp_path: Path, damage: str) -> None:
        base.save_pretrained(tmp_path)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        weight = state["blocks.1.attn1.to_q.weight"].clone()
        if damage == "missing":
            del state["blocks.1.attn1.to_q.weight"]
        else:
            state["blocks.7.attn1.to_q.weight"] = weight
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"1 {damage}.*attn1\.to_q"):
            StageTwoTransformer.from_pretrained(tmp_path)

    def test_mismatched_sizes_are_an_error_even_when_ignored(self, base: Any, tmp_path: Path) -> None:
        base.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="from_wan"):
            StageTwoTransformer.from_pretrained(
                tmp_path, in_channels=2 * CHANNELS, reference_channels=CHANNELS, ignore_mismatched_sizes=True
            )
