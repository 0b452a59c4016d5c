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

    from torch import Tensor

# ---- against the parent class


def test_timesteps_per_frame(base: Any, transformer: StageTwoTransformer) -> None:
    inputs = make_inputs()
    expected = run(base, per_token(inputs))
    torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
    # The comparison would mean little if timesteps hardly mattered.
    other = inputs | {"timestep": inputs["timestep"].flip(1)}
    assert (run(transformer, other) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_one_timestep_a_sample(base: Any, transformer: StageTwoTransformer, dtype: torch.dtype) -> None:
    inputs = make_inputs() | {"timestep": torch.tensor([937, 20]).to(dtype)}
    expected = run(base, inputs)
    torch.testing.assert_close(run(transformer, inputs), expected, **TOLERANCE)
    each = inputs | {"timestep": torch.tensor([[937.0] * 3, [20.0] * 3])}
    torch.testing.assert_close(run(transformer, each), expected, **TOLERANCE)
    alone = [run(transformer, {name: value[i : i + 1] for name, value in inputs.items()}) for i in range(2)]
    torch.testing.assert_close(torch.cat(alone), expected, **TOLERANCE)


def test_image_embeddings_of_wan21(tiny_wan_dit: Any) -> None:
    base = tiny_wan_dit(CHANNELS, CHANNELS, image_dim=8, added_kv_proj_dim=24)
    transformer = StageTwoTransformer.from_wan(deepcopy(base))
    inputs = make_inputs() | {
        "encoder_hidden_states": torch.randn(2, 512, 32),
        "encoder_hidden_states_image": torch.randn(2, 4, 8),
    }
    torch.testing.assert_close(run(transformer, inputs), run(base, per_token(inputs)), **TOLERANCE)


def test_bfloat16(base: Any, transformer: StageTwoTransformer, tmp_path: Path) -> None:
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
    # ``to(torch.bfloat16)`` makes the rotary tables narrow too; loaders keep them in float32.
    assert (run(transformer.to(torch.bfloat16), low_inputs) - exact).abs().max() < 0.1 * exact.abs().max()


class LargestTensor(TorchDispatchMode):
    """Watches which tensors are made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_never_holds_a_modulation_per_token(base: Any, transformer: StageTwoTransformer) -> None:
    inputs = make_inputs(batch=1) | {"hidden_states": torch.randn(1, CHANNELS, 3, 16, 24)}
    tokens_per_frame = 8 * 12
    modulation = 3 * tokens_per_frame * 6 * base.config.num_attention_heads * base.config.attention_head_dim
    with LargestTensor() as largest:
        run(base, inputs | {"timestep": inputs["timestep"].repeat_interleave(tokens_per_frame, dim=1)})
    assert largest.elements >= modulation
    with LargestTensor() as largest:
        run(transformer, inputs)
    assert largest.elements < modulation / 2


def test_gelu_through_the_logistic_function(transformer: StageTwoTransformer) -> None:
    gate = torch.linspace(-30, 30, 10_001)
    exact = torch.nn.functional.gelu(gate.double(), approximate="tanh")
    with torch.no_grad():
        made = gelu_tanh(gate)
        half = gelu_tanh(gate.bfloat16())
    torch.testing.assert_close(made.double(), exact, rtol=1e-5, atol=1e-6)
    assert torch.equal(half, torch.nn.functional.gelu(gate.bfloat16(), approximate="tanh"))
    leaf = gate.clone().requires_grad_()
    gelu_tanh(leaf).sum().backward()
    assert leaf.grad is not None
    # The block's own feed-forward net goes through it, and its copies' do.
    assert transformer.blocks[0].ffn.net[0].gelu is deepcopy(transformer).blocks[1].ffn.net[0].gelu is gelu_tanh


# ---- wanted frames, and windows in parts


def test_only_the_frames_that_are_wanted(transformer: StageTwoTransformer) -> None:
    inputs = make_inputs(frames=4)
    whole = run(transformer, inputs)
    for wanted in (slice(1, 3), slice(3, 4), slice(0, 4)):
        torch.testing.assert_close(run(transformer, inputs, output_frames=wanted), whole[:, :, wanted], **TOLERANCE)
    same_level = inputs | {"timestep": inputs["timestep"][:, 1]}
    expected = run(transformer, same_level)[:, :, 2:]
    torch.testing.assert_close(run(transformer, same_level, output_frames=slice(2, 4)), expected, **TOLERANCE)


def test_the_last_block_runs_for_the_wanted_frames_only(transformer: StageTwoTransformer) -> None:
    """Of two blocks the second has queries, text and feed-forward for one of four frames; keys are of all four."""
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
    assert flops() - flops(output_frames=slice(1, 2)) == 2 * 3 * TOKENS_PER_FRAME * for_a_token


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_of_the_wanted_frames(transformer: StageTwoTransformer, is_checkpointed: bool) -> None:
    """Those of the same frames out of a whole pass."""
    inputs = make_inputs(frames=4)
    transformer.train()
    (transformer.enable_gradient_checkpointing if is_checkpointed else transformer.disable_gradient_checkpointing)()

    def gradients(**more: Any) -> dict[str, Tensor]:
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
    calls: list[int] = []
    by_frames = StageTwoBlock._forward_by_frames
    monkeypatch.setattr(StageTwoBlock, "_forward_by_frames", lambda *given: calls.append(1) or by_frames(*given))
    for module in (transformer_block, transformer_module):
        monkeypatch.setattr(module, "PART_TOKENS", 2 * TOKENS_PER_FRAME)
    for some, expected in zip(each, whole, strict=True):
        torch.testing.assert_close(run(transformer, some, output_frames=wanted), expected, **TOLERANCE)
    assert len(calls) == 2 * len(transformer.blocks)


# ---- positions and kinds


def test_only_differences_of_positions_matter(transformer: StageTwoTransformer) -> None:
    inputs, positions = make_inputs(), torch.tensor([0, 4, 5])
    compact = run(transformer, inputs)
    assert torch.equal(run(transformer, inputs, frame_positions=torch.arange(3)), compact)
    here = run(transformer, inputs, frame_positions=positions)
    torch.testing.assert_close(run(transformer, inputs, frame_positions=positions + 50), here, **TOLERANCE)
    assert (compact - here).abs().max() > 1e-4


def test_positions_are_rows_of_the_parents_table(base: Any, transformer: StageTwoTransformer) -> None:
    long = torch.zeros(1, CHANNELS, 9, 4, 6)
    kept = torch.tensor([0, 7, 8])
    cos, sin, token_frames = transformer.rope(long[:, :, :3], kept)
    for ours, parents in zip((cos, sin), base.rope(long), strict=True):
        assert torch.equal(ours, parents.unflatten(1, (9, TOKENS_PER_FRAME))[:, kept].flatten(1, 2))
    assert token_frames.tolist() == [[0] * 6 + [1] * 6 + [2] * 6]


def test_frames_with_their_positions_may_stand_in_any_order(transformer: StageTwoTransformer) -> None:
    """Full attention: a permutation of frames, positions, timesteps and kinds permutes the output."""
    torch.nn.init.normal_(transformer.frame_kind_table)
    inputs, order = make_inputs(), torch.tensor([2, 0, 1])
    positions, kinds = torch.tensor([0, 6, 9]), torch.tensor([1, 2, 0])
    straight = run(transformer, inputs, frame_positions=positions, frame_kinds=kinds)
    mixed = inputs | {
        "hidden_states": inputs["hidden_states"][:, :, order],
        "timestep": inputs["timestep"][:, order],
    }
    output = run(transformer, mixed, frame_positions=positions[order], frame_kinds=kinds[order])
    torch.testing.assert_close(output, straight[:, :, order], **TOLERANCE)


def test_each_kind_is_told_apart_once_the_table_is_trained(transformer: StageTwoTransformer) -> None:
    inputs = make_inputs()
    plain = run(transformer, inputs)
    assert torch.equal(run(transformer, inputs, frame_kinds=torch.tensor([1, 2, 3])), plain)
    transformer(**inputs, frame_kinds=torch.tensor([1, 0, 0])).sample.square().sum().backward()
    assert (transformer.frame_kind_table.grad.abs().sum(1) > 0).tolist() == [True, True, False, False]
    torch.nn.init.normal_(transformer.frame_kind_table)
    outputs = [run(transformer, inputs, frame_kinds=torch.tensor([1, 0, int(kind)])) for kind in FrameKind]
    for index, output in enumerate(outputs):
        for other in outputs[:index]:
            assert (output - other).abs().max() > 1e-3
    targets = run(transformer, inputs, frame_kinds=torch.full((3,), int(FrameKind.TARGET)))
    assert torch.equal(run(transformer, inputs), targets)


# ---- what is refused


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
def test_configurations_that_contradict_themselves(base: Any, changes: dict[str, Any]) -> None:
    settings = {name: value for name, value in base.config.items() if not name.startswith("_")}
    with pytest.raises(ConfigurationError):
        StageTwoTransformer(**settings | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_states": torch.zeros(2, CHANNELS + 1, 3, 4, 6)},
        {"hidden_states": torch.zeros(2, CHANNELS, 3, 5, 6)},
        {"hidden_states": torch.zeros(2, CHANNELS, 3, 4, 130)},
        {"timestep": torch.zeros(2, 18)},
        {"timestep": torch.zeros(3)},
        {"frame_positions": torch.tensor([-1, 0, 1])},
        {"frame_positions": torch.tensor([0, 1, 64])},
        {"frame_positions": torch.tensor([0, 1])},
        {"frame_positions": torch.tensor([0.0, 1.0, 2.0])},
        {"frame_kinds": torch.tensor([0, 1, 4])},
    ],
)
def test_inputs_that_do_not_fit(transformer: StageTwoTransformer, changes: dict[str, Tensor]) -> None:
    with pytest.raises(InvalidInputError):
        run(transformer, make_inputs() | changes)
