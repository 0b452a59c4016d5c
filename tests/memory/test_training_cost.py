"""The account of training against PyTorch's FLOP counter, the tensors that autograd saves, and live bytes at a peak."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from swifti2v.errors import InvalidInputError
from swifti2v.memory.training_cost import (
    TrainingSetup,
    TrainingWork,
    gpu_hours,
    saved_bytes_per_token,
    training_memory,
)
from swifti2v.memory.transformer_cost import STAGE_TWO_5B, WAN22_I2V_A14B_EXPERT, TransformerDimensions

TEXT_TOKENS, RANK = 7, 4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
SIZES = [(3, 16, 160), (2, 12, 32), (4, 16, 100)]
"""Heads, their width, feed-forward width."""


def network(heads: int, width: int, ffn: int, *, num_layers: int, text_dim: int = 32) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        in_channels=36,
        out_channels=16,
        text_dim=text_dim,
        freq_dim=256,
        ffn_dim=ffn,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    ).train()


def with_lora(transformer: WanTransformer3DModel, rank: int = RANK) -> WanTransformer3DModel:
    """Frozen in bfloat16 but for the parts that diffusers keeps in float32, with a float32 LoRA."""
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(False)
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return transformer


def work_of(transformer: WanTransformer3DModel, *, trains_all: bool, rank: int = RANK) -> TrainingWork:
    return TrainingWork(TransformerDimensions.from_config(transformer.config), trains_all, 0 if trains_all else rank)


def inputs(transformer: WanTransformer3DModel, shape: tuple[int, ...], text_tokens: int = TEXT_TOKENS) -> tuple:
    dtype = transformer.patch_embedding.weight.dtype
    text = torch.randn(1, text_tokens, transformer.config.text_dim).to(dtype)
    return torch.randn(1, 36, *shape).to(dtype), torch.tensor([500.0]), text


@pytest.mark.parametrize("trains_all", [False, True])
def test_flops_are_those_that_pytorch_counts(trains_all) -> None:
    # The counter knows no fused attention on CPUs; that of the matrices is counted exactly.
    transformer = network(3, 16, 160, num_layers=2)
    if not trains_all:
        transformer.requires_grad_(False)
        transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    counter = FlopCounterMode(display=False)
    with counter:
        transformer(*inputs(transformer, (3, 8, 8))).sample.sum().backward()
    counted = counter.get_total_flops()
    work = work_of(transformer, trains_all=trains_all)
    assert work.linear_tflop(48, text_tokens=TEXT_TOKENS) * 1e12 == pytest.approx(counted, rel=1e-9)
    if not trains_all:
        trained = sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)
        assert work.num_lora_parameters == trained


def saved_bytes(transformer: WanTransformer3DModel, shape: tuple[int, ...]) -> int:
    """Bytes of the storages that a forward pass keeps for the backward one, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*transformer.parameters(), *transformer.buffers())}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        transformer(*inputs(transformer, shape))
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("trains_all", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_bytes_for_each_token_are_those_that_autograd_saves(sizes, trains_all, checkpointed) -> None:
    def measured(num_layers: int, shape: tuple[int, ...]) -> int:
        transformer = network(*sizes, num_layers=num_layers)
        if not trains_all:
            with_lora(transformer)
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        return saved_bytes(transformer, shape)

    few, many = (3, 8, 8), (5, 8, 10)  # 48 and 100 tokens
    one = measured(1, many) - measured(1, few)
    three = measured(3, many) - measured(3, few)
    expected = saved_bytes_per_token(work_of(network(*sizes, num_layers=1), trains_all=trains_all))
    assert (three - one) / 2 / 52 == (2 * sizes[0] * sizes[1] if checkpointed else expected)


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations have made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._live:
                    self._add(storage)
        return made

    def _add(self, storage) -> None:
        place, size = storage._cdata, storage.nbytes()

        def drop(_reference) -> None:
            self._live.pop(place, None)
            self.now -= size

        self._live[place] = weakref.ref(storage, drop)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_peak_at_full_size_is_within_five_percent(checkpointed) -> None:
    # Two blocks of A14B at 640x352x81, without memory: tensors that have shapes only.
    with torch.device("meta"):
        transformer = with_lora(network(40, 128, 13824, num_layers=2, text_dim=4096), rank=32)
    if checkpointed:
        transformer.enable_gradient_checkpointing()
    with FakeTensorMode():
        for module in transformer.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        given = inputs(transformer, (21, 44, 80), text_tokens=512)
        with LiveBytes() as live:
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                velocity = transformer(*given).sample
            velocity.float().square().mean().backward()
    work = work_of(transformer, trains_all=False, rank=32)
    memory = training_memory(TrainingSetup(work, 18480, gradient_checkpointing=checkpointed))
    assert memory.activation_bytes + memory.gradient_bytes == pytest.approx(live.peak, rel=0.05)


def test_parameters_of_a_lora_and_of_everything() -> None:
    expert = TrainingSetup(TrainingWork(WAN22_I2V_A14B_EXPERT, trains_all=False, lora_rank=32), 18480)
    # 40 blocks: 8 projections of 5120 to 5120 and 2 between 5120 and 13824.
    assert expert.num_trained == 40 * 32 * (8 * 10240 + 2 * 18944)
    memory = training_memory(expert)
    frozen = 2 * WAN22_I2V_A14B_EXPERT.num_parameters
    assert memory.weight_bytes == frozen + 4 * expert.num_trained
    assert memory.optimizer_bytes == 8 * expert.num_trained
    everything = training_memory(TrainingSetup(TrainingWork(STAGE_TWO_5B, trains_all=True), 17600))
    held = everything.weight_bytes + everything.gradient_bytes + everything.optimizer_bytes + everything.average_bytes
    assert held == 20 * STAGE_TWO_5B.num_parameters


def test_sharding_divides_what_is_held_and_gathers_blocks() -> None:
    work = TrainingWork(STAGE_TWO_5B, trains_all=True)
    one, eight = (training_memory(TrainingSetup(work, 17600, num_devices=count)) for count in (1, 8))
    for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes", "average_bytes"):
        assert getattr(eight, name) == pytest.approx(getattr(one, name) / 8)
    assert eight.activation_bytes == one.activation_bytes
    assert eight.gathered_bytes > one.gathered_bytes
    assert eight.peak_bytes < one.peak_bytes / 3


def test_options_save_what_they_should() -> None:
    work = TrainingWork(STAGE_TWO_5B, trains_all=True)
    full = training_memory(TrainingSetup(work, 17600))
    small = training_memory(TrainingSetup(work, 17600, optimizer="adamw8bit", averages=False))
    assert small.optimizer_bytes < 0.26 * full.optimizer_bytes
    assert small.average_bytes == 0
    plain = training_memory(TrainingSetup(work, 17600, gradient_checkpointing=False))
    assert plain.activation_bytes > 8 * full.activation_bytes
    assert training_memory(TrainingSetup(work, 17600, batch_size=2)).activation_bytes == 2 * full.activation_bytes


def test_hours_follow_from_samples_and_rate() -> None:
    work = TrainingWork(WAN22_I2V_A14B_EXPERT, trains_all=False, lora_rank=32)
    step = work.step_tflop(18480)
    forward = WAN22_I2V_A14B_EXPERT.forward_cost(18480).tflop
    assert 3 * forward < step < 4 * forward
    assert work.step_tflop(18480, gradient_checkpointing=False) == pytest.approx(step - forward)
    hours = gpu_hours(work, num_tokens=18480, num_samples=1000, tflop_per_second=400.0)
    assert hours == pytest.approx(1000 * step / 400 / 3600)


def test_impossible_setups_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        TrainingSetup(TrainingWork(STAGE_TWO_5B, trains_all=True), 17600, num_devices=0)
    with pytest.raises(InvalidInputError, match="rank of the LoRA is 0"):
        TrainingSetup(TrainingWork(STAGE_TWO_5B, trains_all=False), 17600)
