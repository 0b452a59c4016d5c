"""Both schedules of Stage I, as an unmodified diffusers pipeline sees them."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from swifti2v.errors import InvalidInputError
from swifti2v.schedulers import FixedSigmaScheduler, WanUniPCScheduler


def run(scheduler, sample: torch.Tensor, velocity) -> torch.Tensor:
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, timestep), timestep, sample, return_dict=False)[0]
    return sample


def test_four_steps_are_exactly_the_fixed_sigmas():
    scheduler = FixedSigmaScheduler()
    scheduler.set_timesteps(4, device="cpu")
    assert scheduler.sigmas.dtype == scheduler.timesteps.dtype == torch.float32
    assert torch.equal(scheduler.sigmas, torch.tensor([1.0, 0.9375, 5 / 6, 0.625, 0.0]))
    assert torch.equal(scheduler.timesteps, torch.tensor([1000.0, 937.5, 5000 / 6, 625.0]))
    assert scheduler.num_inference_steps == 4


def test_it_is_bit_equal_to_the_parent_given_the_shifted_list_by_hand():
    parent = FlowMatchEulerDiscreteScheduler(shift=5.0)
    parent.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    fixed = FixedSigmaScheduler()
    fixed.set_timesteps(4)
    assert torch.equal(fixed.sigmas, parent.sigmas)
    assert torch.equal(fixed.timesteps, parent.timesteps)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    results = [run(scheduler, noise, lambda x, t: torch.tanh(x) * t / 1000) for scheduler in (parent, fixed)]
    assert torch.equal(*results)


@pytest.mark.parametrize("num_steps", [1, 2, 8, 40])
def test_other_numbers_of_steps_lie_on_the_same_curve(num_steps):
    scheduler = FixedSigmaScheduler()
    scheduler.set_timesteps(num_steps)
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    expected = 5 * even / (1 + 4 * even)
    torch.testing.assert_close(scheduler.sigmas.double(), expected, atol=1e-6, rtol=0)
    assert len(scheduler.timesteps) == num_steps


def test_no_number_means_the_fixed_schedule():
    scheduler = FixedSigmaScheduler(fixed_sigmas=(1.0, 0.5))
    scheduler.set_timesteps()
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steps_are_float32_whatever_the_network_returns(dtype):
    scheduler = FixedSigmaScheduler()
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(256, generator=generator)
    velocity = torch.randn(256, generator=generator).to(dtype)
    result = scheduler.step(velocity, scheduler.timesteps[0], sample, return_dict=False)[0]
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, sample - 0.0625 * velocity.float(), atol=1e-7, rtol=1e-6)


def test_a_second_run_starts_anew():
    scheduler = FixedSigmaScheduler()
    noise = torch.randn(8, generator=torch.Generator().manual_seed(0))
    results = []
    for _ in range(2):
        scheduler.set_timesteps(4)
        results.append(run(scheduler, noise, lambda x, t: x * 0.5))
    assert torch.equal(*results)


def test_the_configuration_round_trips(tmp_path, caplog):
    scheduler = FixedSigmaScheduler(shift=3.0, fixed_sigmas=(1.0, 0.7, 0.3))
    scheduler.save_pretrained(tmp_path)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        loaded = FixedSigmaScheduler.from_pretrained(tmp_path)
        copied = FixedSigmaScheduler.from_config(scheduler.config)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
    for other in (loaded, copied):
        other.set_timesteps(3)
        assert other.sigmas.tolist() == pytest.approx([1.0, 0.7, 0.3, 0.0], abs=1e-7)
        other.set_timesteps(2)
        assert other.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.0], abs=1e-6)


def test_a_pipeline_that_holds_it_round_trips(tmp_path, tiny_vae21, tiny_text_encoder, tiny_tokenizer, tiny_wan_dit):
    from diffusers import WanImageToVideoPipeline

    pipeline = WanImageToVideoPipeline(
        tokenizer=tiny_tokenizer,
        text_encoder=tiny_text_encoder,
        vae=tiny_vae21,
        scheduler=FixedSigmaScheduler(fixed_sigmas=(1.0, 0.4)),
        transformer=tiny_wan_dit(36, 16),
    )
    pipeline.save_pretrained(tmp_path)
    loaded = WanImageToVideoPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(loaded.scheduler) is FixedSigmaScheduler
    assert tuple(loaded.scheduler.config.fixed_sigmas) == (1.0, 0.4)


def test_sigmas_given_by_hand_mean_what_they_mean_to_the_parent():
    parent, fixed = FlowMatchEulerDiscreteScheduler(shift=5.0), FixedSigmaScheduler()
    for scheduler in (parent, fixed):
        scheduler.set_timesteps(sigmas=[1.0, 0.3])
    assert torch.equal(fixed.sigmas, parent.sigmas)


@pytest.mark.parametrize("bad", [(), (0.5, 0.9), (1.0, 1.0), (1.5, 0.5), (1.0, 0.0), (1.0, float("nan"))])
def test_a_list_that_is_no_schedule_is_an_error(bad):
    with pytest.raises(InvalidInputError, match="leave the final 0 out"):
        FixedSigmaScheduler(fixed_sigmas=bad)


# Many steps


def wan_unipc(flow_shift: float = 5.0) -> WanUniPCScheduler:
    return WanUniPCScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 5, 20, 40, 50])
def test_many_steps_are_wans_levels(num_steps, flow_shift):
    """From 0.999 in equal parts towards 0, shifted once; timesteps are the whole parts of 1000 sigma."""
    scheduler = wan_unipc(flow_shift)
    scheduler.set_timesteps(num_steps, device="cpu")
    even = [float(np.float32(0.999)) * (num_steps - step) / num_steps for step in range(num_steps)]
    expected = [flow_shift * level / (1 + (flow_shift - 1) * level) for level in even]
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor([*expected, 0.0]).double(), atol=1e-7, rtol=0)
    assert scheduler.timesteps.tolist() == [int(1000 * sigma) for sigma in expected]
    assert (scheduler.sigmas.dtype, scheduler.timesteps.dtype) == (torch.float32, torch.int64)
    assert scheduler.num_inference_steps == num_steps


def test_many_steps_are_the_parents_given_wans_levels():
    """Nothing but the levels differs: the same steps, and no second shift."""
    parent = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parent.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, 13)[:-1])
    ours = wan_unipc()
    ours.set_timesteps(12)
    assert torch.equal(ours.sigmas, parent.sigmas)
    assert torch.equal(ours.timesteps, parent.timesteps)
    noise = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    results = [run(scheduler, noise, lambda x, t: torch.tanh(x) * t / 1000) for scheduler in (parent, ours)]
    assert torch.equal(*results)
    parent.set_timesteps(12)
    assert (ours.sigmas - parent.sigmas).abs().max() > 1e-3


def test_every_step_is_taken_where_levels_share_a_timestep():
    """At 600 steps the first two are timestep 999; looked up by it, the run would begin with the second and fail."""
    scheduler = wan_unipc()
    scheduler.set_timesteps(600)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    target = torch.tensor([[0.25, -2.0]])
    index = iter(range(600))
    sample = run(scheduler, torch.randn(1, 2), lambda x, _t: (x - target) / scheduler.sigmas[next(index)])
    torch.testing.assert_close(sample, target, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_velocity_is_not_rounded_again(dtype):
    velocity = torch.randn(1, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    sample = torch.randn(1, 256, generator=torch.Generator().manual_seed(1))
    steps = []
    for given in (velocity, velocity.float()):
        scheduler = wan_unipc()
        scheduler.set_timesteps(4)
        steps.append(scheduler.step(given, scheduler.timesteps[0], sample, return_dict=False)[0])
    assert torch.equal(*steps)
    parent = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parent.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, 5)[:-1])
    assert not torch.equal(parent.step(velocity, parent.timesteps[0], sample, return_dict=False)[0], steps[0])


def test_a_number_of_steps_is_needed():
    with pytest.raises(InvalidInputError, match="give the number of steps"):
        wan_unipc().set_timesteps()
