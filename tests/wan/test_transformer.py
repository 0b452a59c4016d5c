"""StageTwoTransformer against diffusers' own class: its outputs, positions, kinds, and what it refuses."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.errors import ConfigurationError, InvalidInputError
from swifti2v.segments import FrameKind
from swifti2v.wan import transformer as transformer_module
from swifti2v.wan import transformer_block
from swifti2v.wan.transformer import StageTwoTransformer
from swifti2v.wan.transformer_block import StageTwoBlock, gelu_tanh
from tests.wan.stage_two_inputs import CHANNELS, TOKENS_PER_FRAME, TOLERANCE, make_inputs, per_token, run

if TYPE_CHECKING:
    from pathlib import Path


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
        "changes",
        [
            {"in_channels": 12},
            {"reference_channels": 2},
            {"in_channels": 4, "reference_channels": -2},
            {"patch_size": (2, 2, 2)},
            {"prediction_type": "epsilon"},
        ],
    )
    def test_configuration(self, base: Any, changes: dict[str, Any]) -> None:
        settings = {name: value for name, value in base.config.items() if not name.startswith("_")}
        with pytest.raises(ConfigurationError):
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
