"""Stage I's LoRA on tiny Wan networks: it learns, only it changes, and each expert sees its own noise levels."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.low_res.lora import ExpertNoise, LoraOptions, LowResLoraObjective, add_lora

LOOP = LoopOptions(
    num_steps=60, learning_rate=2e-2, warmup_steps=1, log_every=1, checkpoint_every=100, final_rate_share=1.0,
    bfloat16=False,
)  # fmt: skip


@dataclass
class Sample:
    tensors: dict[str, torch.Tensor]


class OneOf:
    """Samples and their batches: `size` at a time."""

    def __init__(self, count: int, size: int = 1) -> None:
        generator = torch.Generator().manual_seed(3)
        self.samples = [
            Sample(
                {
                    "latents": torch.randn(16, 3, 4, 6, generator=generator).half(),
                    "condition": torch.randn(20, 3, 4, 6, generator=generator).half(),
                    "prompt_embeds": torch.randn(5, 32, generator=generator).half(),
                }
            )
            for _ in range(count)
        ]
        self.size = size

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def batch_of(self, step: int) -> list[int]:
        return [(step * self.size + place) % len(self.samples) for place in range(self.size)]


@pytest.fixture
def objective(tiny_wan_dit):
    def make(expert="high", **settings):
        transformer = tiny_wan_dit(36, 16, **settings.pop("network", {}))
        torch.manual_seed(1)
        add_lora(transformer, LoraOptions(rank=settings.pop("rank", 4), alpha=8.0))
        data = OneOf(settings.pop("count", 1), settings.pop("size", 1))
        return LowResLoraObjective(transformer, expert=expert, samples=data, batches=data, **settings)

    return make


def test_it_learns_one_sample_by_heart_and_changes_nothing_but_the_lora(objective, tmp_path) -> None:
    # Wide enough that the frozen last layer can say what it has learned.
    network = {"num_attention_heads": 6, "num_layers": 1}
    trained = objective(noise=ExpertNoise(weighting="uniform"), network=network, rank=16)
    before = copy.deepcopy(trained.module.state_dict())
    errors = []
    TrainingLoop(trained, tmp_path, LOOP).run(on_step=lambda report: errors.append(report.numbers["error"]))
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])
    after = trained.module.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert all(".lora_A." in name or ".lora_B." in name for name in changed)
    assert set(torch.load(tmp_path / "checkpoint.pt")["module"]) >= changed


def test_an_untrained_lora_changes_nothing(tiny_wan_dit) -> None:
    transformer = tiny_wan_dit(36, 16)
    arguments = torch.randn(1, 36, 2, 4, 4), torch.tensor([900.0]), torch.randn(1, 5, 32)
    before = transformer(*arguments).sample
    add_lora(transformer, LoraOptions(rank=4))
    assert torch.equal(transformer(*arguments).sample, before)


def test_the_loss_is_the_error_of_the_velocity_by_hand(objective) -> None:
    made = objective(noise=ExpertNoise(weighting="uniform"), size=2, count=2)
    seen = {}
    made.module.register_forward_pre_hook(lambda _net, _args, named: seen.update(named), with_kwargs=True)
    loss, numbers = made.loss(3)
    clean = torch.stack([sample.tensors["latents"] for sample in made._samples.samples]).float()
    sigma = seen["timestep"] / 1000
    assert seen["timestep"].dtype == torch.float32
    noisy = seen["hidden_states"][:, :16]
    condition = torch.stack([sample.tensors["condition"] for sample in made._samples.samples]).float()
    assert torch.equal(seen["hidden_states"][:, 16:], condition)
    # x = (1 - s) x0 + s n  =>  n = (x - (1 - s) x0) / s, and the velocity is n - x0 = (x - x0) / s.
    velocity = (noisy - clean) / sigma.view(-1, 1, 1, 1, 1)
    (predicted,) = made.module(**seen)
    torch.testing.assert_close(loss, (predicted - velocity).square().mean(), rtol=1e-4, atol=1e-5)
    assert (numbers["samples"], numbers["tokens"]) == (2.0, 2.0 * 3 * 2 * 3)


@pytest.mark.parametrize(("expert", "low", "high"), [("high", 900.0, 1000.0), ("low", 0.0, 900.0)])
def test_an_expert_sees_its_own_timesteps_only(objective, expert, low, high) -> None:
    made = objective(expert)
    seen = []
    made.module.register_forward_pre_hook(
        lambda _net, _args, named: seen.extend(named["timestep"].tolist()), with_kwargs=True
    )
    with torch.no_grad():
        for step in range(60):
            made.loss(step)
    assert min(seen) >= low
    assert max(seen) <= high
    assert max(seen) - min(seen) > 0.7 * (high - low)


def test_levels_are_those_of_the_shifted_schedule() -> None:
    # Uniform indices into diffusers' own shifted list of 1000 levels, cut at 900 as DiffSynth cuts them (0.358 of it).
    from diffusers import FlowMatchEulerDiscreteScheduler

    sigmas = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0).sigmas
    listed = {"high": sigmas[sigmas >= 0.9], "low": sigmas[sigmas < 0.9]}
    assert len(listed["high"]) == pytest.approx(358, abs=1)
    for expert, expected in listed.items():
        levels = ExpertNoise().levels(expert, (torch.arange(len(expected)) + 0.5) / len(expected))
        torch.testing.assert_close(levels.sort().values, expected.sort().values, atol=3e-3, rtol=0)


def test_the_bell_is_highest_in_the_middle_and_its_mean_is_one() -> None:
    noise, uniform = ExpertNoise(), torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for expert in ("high", "low"):
        assert noise.weights(expert, noise.levels(expert, uniform)).mean() == pytest.approx(1.0, abs=0.01)
    weights = noise.weights("low", torch.tensor([0.1, 0.5, 0.9]))
    assert weights.argmax() == 1
    assert weights[0] == pytest.approx(weights[2])
    assert weights[0] / weights[1] == pytest.approx(2.718281828 ** (-2 * 0.16))


def test_a_batch_follows_from_its_number(objective) -> None:
    made = objective(count=3, size=2)
    assert made.loss(4)[0] == made.loss(4)[0]
    assert made.loss(4)[0] != made.loss(5)[0]


def test_checkpointed_gradients_are_the_same(objective) -> None:
    plain, checkpointed = objective(), objective()
    checkpointed.module.enable_gradient_checkpointing()
    for made in (plain, checkpointed):
        made.module.train()
        made.loss(0)[0].backward()
    gradients = [
        torch.cat([p.grad.flatten() for p in made.module.parameters() if p.requires_grad])
        for made in (plain, checkpointed)
    ]
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_frozen_weights_may_be_bfloat16(tiny_wan_dit) -> None:
    transformer = tiny_wan_dit(36, 16)
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.to(torch.bfloat16)
    add_lora(transformer, LoraOptions(rank=4))
    data = OneOf(1)
    made = LowResLoraObjective(transformer, expert="low", samples=data, batches=data)
    loss, _ = made.loss(0)
    loss.backward()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)


def test_a_target_that_does_not_exist_is_named(tiny_wan_dit) -> None:
    with pytest.raises(ConfigurationError, match=r"'to_queries' is no module of WanTransformer3DModel"):
        add_lora(tiny_wan_dit(36, 16), LoraOptions(targets=("to_q", "to_queries")))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (LoraOptions, {"rank": 0}),
        (LoraOptions, {"alpha": 0.0}),
        (ExpertNoise, {"boundary": 1.0}),
        (ExpertNoise, {"flow_shift": 0.0}),
    ],
)
def test_numbers_out_of_range_are_refused(kind, values) -> None:
    with pytest.raises(ConfigurationError):
        kind(**values)
