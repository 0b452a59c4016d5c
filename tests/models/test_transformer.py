"""StageTwoTransformer against diffusers' own class, and inside diffusers' machinery."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, attention_backend
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError
from swifti2v.models import transformer as transformer_module
from swifti2v.models import transformer_block
from swifti2v.models.transformer import StageTwoTransformer
from swifti2v.models.transformer_block import StageTwoBlock, gelu_tanh
from swifti2v.segments import FrameKind

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import WanTransformer3DModel

CHANNELS = 6
TOKENS_PER_FRAME = 6  # 4x6 latents in patches of 2x2
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def base(tiny_wan_dit: Any) -> WanTransformer3DModel:
    return tiny_wan_dit(CHANNELS, CHANNELS)


@pytest.fixture
def transformer(tiny_wan_dit: Any) -> StageTwoTransformer:
    """Same weights as `base`, in our class."""
    return StageTwoTransformer.from_wan(tiny_wan_dit(CHANNELS, CHANNELS))


def make_inputs(batch: int = 2, frames: int = 3, channels: int = CHANNELS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    timestep = torch.rand(batch, frames, generator=generator) * 1000
    timestep[:, 0] = 0
    return {
        "hidden_states": torch.randn(batch, channels, frames, 4, 6, generator=generator),
        "timestep": timestep,
        "encoder_hidden_states": torch.randn(batch, 5, 32, generator=generator),
    }


@torch.no_grad()
def run(network: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return network(**inputs, **more).sample


def test_only_the_frames_that_are_wanted(transformer: StageTwoTransformer) -> None:
    inputs = make_inputs(frames=4)
    whole = run(transformer, inputs)
    for wanted in (slice(1, 3), slice(3, 4), slice(0, 4)):
        torch.testing.assert_close(run(transformer, inputs, output_frames=wanted), whole[:, :, wanted], **TOLERANCE)
    same_level = inputs | {"timestep": inputs["timestep"][:, 1]}
    expected = run(transformer, same_level)[:, :, 2:]
    torch.testing.assert_close(run(transformer, same_level, output_frames=slice(2, 4)), expected, **TOLERANCE)


def test_the_last_block_runs_for_the_wanted_frames_only(transformer: StageTwoTransformer) -> None:
    """Of two blocks the second asks, reads the text and feeds forward for one of four frames; keys are of all four."""
    inputs = {name: tensor.to("meta") for name, tensor in make_inputs(batch=1, frames=4).items()}
    transformer.to("meta")  # where PyTorch counts attention too

    def flops(**more: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run(transformer, inputs, **more)
        return counter.get_total_flops()

    block, tokens, text = transformer.blocks[-1], 4 * TOKENS_PER_FRAME, inputs["encoder_hidden_states"].shape[1]
    width, hidden = block.attn1.to_q.in_features, block.ffn.net[2].in_features
    for_a_token = (
        4 * width**2 + 2 * width * hidden + 2 * (tokens + text) * width + width * transformer.proj_out.out_features
    )
    spared = 2 * 3 * TOKENS_PER_FRAME * for_a_token
    assert flops() - flops(output_frames=slice(1, 2)) == spared


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_of_the_wanted_frames(transformer: StageTwoTransformer, is_checkpointed: bool) -> None:
    """Those of the same frames out of a whole pass."""
    inputs = make_inputs(frames=4)
    transformer.train()
    (transformer.enable_gradient_checkpointing if is_checkpointed else transformer.disable_gradient_checkpointing)()

    def gradients(**more: Any) -> dict[str, torch.Tensor]:
        transformer.zero_grad()
        sample = transformer(**inputs, **more).sample
        (sample if more else sample[:, :, 1:3]).square().mean().backward()
        return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}

    whole, wanted = gradients(), gradients(output_frames=slice(1, 3))
    assert whole.keys() == wanted.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(wanted[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("wanted", [None, slice(1, 3)])
def test_long_windows_run_in_parts_with_the_same_result(
    transformer: StageTwoTransformer, monkeypatch: pytest.MonkeyPatch, wanted: slice | None
) -> None:
    """Parts of two frames of four, one timestep a frame or a sample; short windows, as here otherwise, run whole."""
    inputs = make_inputs(frames=4)
    each = (inputs, inputs | {"timestep": inputs["timestep"][:, 1]})
    whole = [run(transformer, some, output_frames=wanted) for some in each]
    in_parts = 0

    def watched(*arguments: Any) -> torch.Tensor:
        nonlocal in_parts
        in_parts += 1
        return by_frames(*arguments)

    by_frames = StageTwoBlock._forward_by_frames
    monkeypatch.setattr(StageTwoBlock, "_forward_by_frames", watched)
    for module in (transformer_block, transformer_module):
        monkeypatch.setattr(module, "PART_TOKENS", 2 * TOKENS_PER_FRAME)
    for some, expected in zip(each, whole, strict=True):
        torch.testing.assert_close(run(transformer, some, output_frames=wanted), expected, **TOLERANCE)
    assert in_parts == 2 * len(transformer.blocks)


def test_gelu_through_the_logistic_function(transformer: StageTwoTransformer) -> None:
    gate = torch.linspace(-30, 30, 10_001)
    exact = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    with torch.no_grad():
        made = gelu_tanh(gate)
        half = gelu_tanh(gate.bfloat16())
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(half, torch.nn.functional.gelu(gate.bfloat16(), approximate="tanh"))
    asking = gate.clone().requires_grad_()
    gelu_tanh(asking).sum().backward()
    assert asking.grad is not None
    # The block's own feed-forward net goes through it, and its copies' do.
    assert transformer.blocks[0].ffn.net[0].gelu is deepcopy(transformer).blocks[1].ffn.net[0].gelu is gelu_tanh


def per_token(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same request in the form that diffusers' class takes."""
    return inputs | {"timestep": inputs["timestep"].repeat_interleave(TOKENS_PER_FRAME, dim=1)}


class LargestTensor(TorchDispatchMode):
    """Watches which tensors are made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


class TestAgainstTheParentClass:
    def test_timesteps_per_frame(self, base: Any, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        expected = run(base, per_token(inputs))
        torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
        # The comparison would mean little if timesteps hardly mattered.
        other = inputs | {"timestep": inputs["timestep"].flip(1)}
        assert (run(transformer, other) - expected).abs().max() > 1e-2

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
    def test_one_timestep_a_sample(self, base: Any, transformer: StageTwoTransformer, dtype: torch.dtype) -> None:
        inputs = make_inputs() | {"timestep": torch.tensor([937, 20]).to(dtype)}
        torch.testing.assert_close(run(transformer, inputs), run(base, inputs), **TOLERANCE)

    def test_equal_timesteps_of_all_frames_are_one_timestep(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        one = run(transformer, inputs | {"timestep": torch.tensor([625.0, 40.0])})
        each = run(transformer, inputs | {"timestep": torch.tensor([[625.0] * 3, [40.0] * 3])})
        torch.testing.assert_close(each, one, **TOLERANCE)

    def test_batch_is_one_by_one(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        alone = [run(transformer, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(2)]
        torch.testing.assert_close(run(transformer, inputs), torch.cat(alone), **TOLERANCE)

    def test_image_embeddings_of_wan21(self, tiny_wan_dit: Any) -> None:
        layout = {"image_dim": 8, "added_kv_proj_dim": 24}
        base = tiny_wan_dit(CHANNELS, CHANNELS, **layout)
        transformer = StageTwoTransformer.from_wan(tiny_wan_dit(CHANNELS, CHANNELS, **layout))
        inputs = make_inputs() | {
            "encoder_hidden_states": torch.randn(2, 512, 32),
            "encoder_hidden_states_image": torch.randn(2, 4, 8),
        }
        torch.testing.assert_close(run(transformer, inputs), run(base, per_token(inputs)), **TOLERANCE)

    def test_bfloat16(self, base: Any, tmp_path: Path) -> None:
        base.save_pretrained(tmp_path)
        low = StageTwoTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        low_base = type(base).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        inputs = make_inputs()
        low_inputs = {name: value.bfloat16() if name != "timestep" else value for name, value in inputs.items()}
        output, exact = run(low, low_inputs), run(base, per_token(inputs))
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()
        assert (output - exact).abs().max() < 0.05 * exact.abs().max()
        # In the same precision the two classes round alike.
        assert (output - run(low_base, per_token(low_inputs))).abs().max() < 0.01 * exact.abs().max()

    def test_rotary_tables_may_be_narrow(self, transformer: StageTwoTransformer) -> None:
        """``network.to(torch.bfloat16)`` takes them along; loaders keep them in float32."""
        inputs = make_inputs()
        expected = run(transformer, inputs)
        narrow = {key: value.to(torch.bfloat16) for key, value in inputs.items()}
        made = run(transformer.to(torch.bfloat16), narrow | {"timestep": inputs["timestep"]})
        assert (made - expected).abs().max() < 0.1 * expected.abs().max()

    def test_never_holds_a_modulation_per_token(self, base: Any, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs(batch=1) | {"hidden_states": torch.randn(1, CHANNELS, 3, 16, 24)}
        tokens_per_frame = 8 * 12
        modulation = 3 * tokens_per_frame * 6 * base.config.num_attention_heads * base.config.attention_head_dim
        with LargestTensor() as largest:
            run(base, inputs | {"timestep": inputs["timestep"].repeat_interleave(tokens_per_frame, dim=1)})
        assert largest.elements >= modulation
        with LargestTensor() as largest:
            run(transformer, inputs)
        assert largest.elements < modulation / 2


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


class TestFramePositions:
    def test_default_is_counting_from_zero(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        named = run(transformer, inputs, frame_positions=torch.arange(3))
        torch.testing.assert_close(named, run(transformer, inputs), rtol=0, atol=0)

    def test_only_differences_matter(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        positions = torch.tensor([0, 4, 5])
        here = run(transformer, inputs, frame_positions=positions)
        there = run(transformer, inputs, frame_positions=positions + 50)
        torch.testing.assert_close(there, here, **TOLERANCE)
        compact = run(transformer, inputs, frame_positions=torch.arange(3))
        assert (compact - here).abs().max() > 1e-4

    def test_positions_are_rows_of_the_parents_table(self, base: Any, transformer: StageTwoTransformer) -> None:
        long = torch.zeros(1, CHANNELS, 9, 4, 6)
        expected_cos, expected_sin = base.rope(long)
        cos, sin, token_frames = transformer.rope(long[:, :, :3], torch.tensor([0, 7, 8]))
        kept = torch.tensor([0, 7, 8])
        for ours, parents in ((cos, expected_cos), (sin, expected_sin)):
            frames = parents.unflatten(1, (9, TOKENS_PER_FRAME))[:, kept].flatten(1, 2)
            torch.testing.assert_close(ours, frames, rtol=0, atol=0)
        assert token_frames.tolist() == [[0] * 6 + [1] * 6 + [2] * 6]

    def test_frames_with_their_positions_may_stand_in_any_order(self, transformer: StageTwoTransformer) -> None:
        """Full attention: a permutation of frames, positions, timesteps and kinds permutes the output."""
        torch.nn.init.normal_(transformer.frame_kind_table)
        inputs = make_inputs()
        order = torch.tensor([2, 0, 1])
        positions, kinds = torch.tensor([0, 6, 9]), torch.tensor([1, 2, 0])
        straight = run(transformer, inputs, frame_positions=positions, frame_kinds=kinds)
        mixed = inputs | {
            "hidden_states": inputs["hidden_states"][:, :, order],
            "timestep": inputs["timestep"][:, order],
        }
        output = run(transformer, mixed, frame_positions=positions[order], frame_kinds=kinds[order])
        torch.testing.assert_close(output, straight[:, :, order], **TOLERANCE)


class TestFrameKinds:
    def test_zero_table_has_no_effect(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        output = run(transformer, inputs, frame_kinds=torch.tensor([1, 2, 3]))
        torch.testing.assert_close(output, run(transformer, inputs), rtol=0, atol=0)

    def test_each_kind_is_told_apart(self, transformer: StageTwoTransformer) -> None:
        torch.nn.init.normal_(transformer.frame_kind_table)
        inputs = make_inputs()
        outputs = [run(transformer, inputs, frame_kinds=torch.tensor([1, 0, int(kind)])) for kind in FrameKind]
        for index, output in enumerate(outputs):
            for other in outputs[:index]:
                assert (output - other).abs().max() > 1e-3
        targets = run(transformer, inputs, frame_kinds=torch.full((3,), int(FrameKind.TARGET)))
        torch.testing.assert_close(run(transformer, inputs), targets, rtol=0, atol=0)

    def test_table_learns_from_zero(self, transformer: StageTwoTransformer) -> None:
        transformer(**make_inputs(), frame_kinds=torch.tensor([1, 0, 0])).sample.square().sum().backward()
        rows = transformer.frame_kind_table.grad.abs().sum(1)
        assert (rows > 0).tolist() == [True, True, False, False]


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"in_channels": 12}, "reference_channels"),
            ({"reference_channels": 2}, "reference_channels"),
            ({"in_channels": 4, "reference_channels": -2}, "reference_channels"),
            ({"patch_size": (2, 2, 2)}, "patch_size"),
            ({"prediction_type": "epsilon"}, "velocity, residual"),
        ],
    )
    def test_configuration(self, base: Any, changes: dict[str, Any], message: str) -> None:
        settings = {name: value for name, value in base.config.items() if not name.startswith("_")}
        with pytest.raises(ConfigurationError, match=message):
            StageTwoTransformer(**settings | changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_states": torch.zeros(2, CHANNELS + 1, 3, 4, 6)}, f"give \\[B, {CHANNELS}"),
            ({"hidden_states": torch.zeros(2, CHANNELS, 3, 5, 6)}, "divide into patches"),
            ({"hidden_states": torch.zeros(2, CHANNELS, 3, 4, 130)}, "RoPE table of 64"),
            ({"timestep": torch.zeros(2, 18)}, "one a frame"),
            ({"timestep": torch.zeros(3)}, "timestep"),
            ({"frame_positions": torch.tensor([-1, 0, 1])}, "frame_positions.*at least 0"),
            ({"frame_positions": torch.tensor([0, 1, 64])}, "less than 64"),
            ({"frame_positions": torch.tensor([0, 1])}, "3 integers"),
            ({"frame_positions": torch.tensor([0.0, 1.0, 2.0])}, "3 integers"),
            ({"frame_kinds": torch.tensor([0, 1, 4])}, "frame_kinds.*less than 4"),
        ],
    )
    def test_inputs(self, transformer: StageTwoTransformer, changes: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(InvalidInputError, match=message):
            run(transformer, make_inputs() | changes)


class TestInsideDiffusers:
    def test_gradient_checkpointing(self, transformer: StageTwoTransformer) -> None:
        def gradients() -> dict[str, torch.Tensor]:
            transformer.zero_grad()
            transformer(**make_inputs(), frame_kinds=torch.tensor([1, 2, 0])).sample.square().mean().backward()
            return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}

        plain = gradients()
        transformer.enable_gradient_checkpointing()
        checkpointed = gradients()
        assert plain.keys() == checkpointed.keys() == dict(transformer.named_parameters()).keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)

    def test_regional_compilation(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        compiled = 0

        def backend(graph: Any, example_inputs: Any) -> Any:
            nonlocal compiled
            compiled += 1
            return graph.forward

        torch._dynamo.reset()
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
        assert compiled == 1  # once for all blocks
        torch._dynamo.reset()

    def test_lora(self, transformer: StageTwoTransformer, base: Any, tmp_path: Path) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        targets = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=targets), "style")
        adapted = run(transformer, inputs)
        assert (adapted - expected).abs().max() > 1e-3
        scaled = run(transformer, inputs, attention_kwargs={"scale": 0.0})
        torch.testing.assert_close(scaled, expected, **TOLERANCE)
        transformer.save_lora_adapter(tmp_path, "style")
        again = StageTwoTransformer.from_wan(base)
        again.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
        again.set_adapters(["style"], [1.0])
        torch.testing.assert_close(run(again, inputs), adapted, **TOLERANCE)

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_group_offload(self, transformer: StageTwoTransformer, offload_type: str) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        cpu = torch.device("cpu")
        transformer.enable_group_offload(cpu, cpu, offload_type=offload_type, use_stream=False, **options)
        torch.testing.assert_close(run(transformer, inputs), expected, rtol=0, atol=0)

    def test_layerwise_casting_keeps_the_kinds(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        expected = run(transformer, inputs)
        transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
        assert transformer.frame_kind_table.dtype == torch.float32
        assert (run(transformer, inputs) - expected).abs().max() < 0.2 * expected.abs().max()

    def test_first_block_cache(self, transformer: StageTwoTransformer) -> None:
        inputs = make_inputs()
        other = inputs | {"hidden_states": inputs["hidden_states"] * 1.01}
        expected = run(transformer, inputs)
        calls = 0

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e3))
        transformer.blocks[1].attn1.to_q.register_forward_hook(count)
        with transformer.cache_context("segment"):
            torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
            run(transformer, other)
        assert calls == 1
        transformer.disable_cache()
        run(transformer, other)
        assert calls == 2

    def test_attention_goes_through_the_dispatcher(
        self, transformer: StageTwoTransformer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        attentions = [attention for block in transformer.blocks for attention in (block.attn1, block.attn2)]
        assert all(type(attention.processor) is WanAttnProcessor for attention in attentions)
        inputs = make_inputs()
        expected = run(transformer, inputs)
        backend = AttentionBackendName._NATIVE_MATH
        original, calls = _AttentionBackendRegistry._backends[backend], []
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends, backend, lambda **options: calls.append(1) or original(**options)
        )
        with attention_backend("_native_math"):
            torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
        assert len(calls) == len(attentions)

    def test_block_names_are_declared(self, transformer: StageTwoTransformer) -> None:
        """device_map and regional compilation find the blocks by the name of their class."""
        names = {type(block).__name__ for block in transformer.blocks}
        assert set(transformer._no_split_modules) == set(transformer._repeated_blocks) == names


CONTEXT_PARALLEL_CASES = [
    # Three frames on two ranks: the middle one is split between them.
    ({"ulysses_degree": 2}, 3),
    ({"ulysses_degree": 2}, 2),
]  # ring attention needs a backend that returns its log-sum-exp, and no CPU one does


def run_both_ways(transformer: Any, frames: int) -> list[torch.Tensor]:
    inputs = make_inputs(frames=frames)
    positions, kinds = torch.arange(frames) * 2, torch.arange(frames) % 4
    return [
        run(transformer, inputs, frame_positions=positions, frame_kinds=kinds),
        run(transformer, inputs | {"timestep": torch.tensor([500.0, 20.0])}),
    ]


def context_parallel_rank(rank: int, folder: str) -> None:
    import torch.distributed as dist
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    # diffusers numbers the devices of the accelerator, and a machine without one has none.
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda: torch.device("cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = []
    for degrees, frames in CONTEXT_PARALLEL_CASES:
        transformer = StageTwoTransformer.from_pretrained(folder)
        lengths: list[int] = []
        for block in transformer.blocks:
            block.register_forward_hook(lambda _module, _inputs, output, kept=lengths: kept.append(output.shape[1]))
        transformer.enable_parallelism(config=ContextParallelConfig(**degrees))
        results.append((run_both_ways(transformer, frames), lengths))
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_context_parallel_of_two_processes(transformer: StageTwoTransformer, tmp_path: Path) -> None:
    torch.nn.init.normal_(transformer.frame_kind_table)
    transformer.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(context_parallel_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"rank{rank}.pt")
        for (degrees, frames), (outputs, lengths) in zip(CONTEXT_PARALLEL_CASES, results, strict=True):
            assert lengths == [frames * TOKENS_PER_FRAME // 2] * 4, (degrees, frames)
            for output, expected in zip(outputs, run_both_ways(transformer, frames), strict=True):
                torch.testing.assert_close(output, expected, **TOLERANCE)
