"""Stage I against diffusers' pipeline driven by hand: same bits, and the pipeline comes back as it was."""

from __future__ import annotations

import inspect
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanImageToVideoPipeline
from peft import LoraConfig

from swifti2v.errors import GenerationCancelled, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.schedulers import FixedSigmaScheduler
from swifti2v.stage_one import PromptEmbeds, StageOne
from swifti2v.wan.checkpoint_index import WAN_NEGATIVE_PROMPT
from tests.stage_one.short_runs import SIZE, TEXT_LENGTH, make, make_image, many_steps, pieces, watched


def by_hand(pipeline, image, *, scheduler, **settings) -> torch.Tensor:
    """Call diffusers' pipeline directly, with text and not with embeddings."""
    own = WanImageToVideoPipeline(**{**pipeline.components, "scheduler": scheduler}, boundary_ratio=0.9)
    own.set_progress_bar_config(disable=True)
    video = own(
        image=image,
        prompt="pan left",
        height=SIZE.height,
        width=SIZE.width,
        num_frames=9,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=TEXT_LENGTH,
        output_type="pt",
        **settings,
    ).frames
    return (video[0] * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


class WanLevels(UniPCMultistepScheduler):
    """Diffusers' own scheduler given Wan's levels, worked out anew."""

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        highest = float(np.float32(0.999))
        levels = [highest * (num_inference_steps - step) / num_inference_steps for step in range(num_inference_steps)]
        super().set_timesteps(sigmas=np.array(levels), device=device)


class ListScheduler(FlowMatchEulerDiscreteScheduler):
    """Diffusers' own scheduler with the published list written out: an oracle that shares no code with ours."""

    def set_timesteps(self, num_inference_steps=None, device=None, **_):
        super().set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], device=device)


def test_few_steps_equal_the_pipeline_driven_by_hand(stage_one, pipeline, image):
    ours = make(stage_one, image, num_frames=9)
    for scheduler in (FixedSigmaScheduler(), ListScheduler(shift=5.0)):
        theirs = by_hand(pipeline, image, scheduler=scheduler, num_inference_steps=4, guidance_scale=1.0)
        assert torch.equal(ours, theirs)
    assert ours.shape == (9, 16, 32, 3)
    assert ours.dtype == torch.uint8
    assert ours.float().std() > 1


def test_many_steps_with_guidance_equal_the_pipeline_driven_by_hand(stage_one, pipeline, image):
    settings = many_steps(5, negative_prompt="blurry", stage_one_guidance_scale_2=2.0)
    scheduler = WanLevels(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    theirs = by_hand(
        pipeline,
        image,
        scheduler=scheduler,
        num_inference_steps=5,
        guidance_scale=3.5,
        guidance_scale_2=2.0,
        negative_prompt="blurry",
    )
    assert torch.equal(make(stage_one, image, num_frames=9, **settings), theirs)


def test_each_expert_runs_twice_at_its_own_timesteps(stage_one, pipeline, image):
    with watched(pipeline.transformer, pipeline.transformer_2) as (high, low):
        make(stage_one, image)
    assert torch.equal(torch.cat(high), torch.tensor([1000.0, 937.5]))
    assert torch.equal(torch.cat(low), torch.tensor([5000 / 6, 625.0]))
    assert all(timestep.dtype == torch.float32 for timestep in high + low)


@pytest.mark.parametrize(("guidance_scale", "calls"), [(1.0, 1), (3.5, 2)])
def test_guidance_doubles_the_calls(stage_one, pipeline, image, guidance_scale, calls):
    with watched(pipeline.transformer, pipeline.transformer_2) as (high, low):
        make(stage_one, image, stage_one_guidance_scale=guidance_scale)
    assert (len(high), len(low)) == (2 * calls, 2 * calls)


@pytest.mark.parametrize(
    ("settings", "negatives"),
    [
        ({"negative_prompt": "blurry"}, []),
        (many_steps(2, stage_one_guidance_scale=1.0), []),
        (many_steps(2), [WAN_NEGATIVE_PROMPT]),
        (many_steps(2, negative_prompt=""), [""]),
    ],
    ids=["few steps", "many without guidance", "many", "many, led away from an empty prompt"],
)
def test_a_negative_prompt_is_encoded_where_guidance_is_on(
    stage_one, pipeline, image, monkeypatch, settings, negatives
):
    encoded = []
    embeddings = pipeline._get_t5_prompt_embeds

    def watching(prompt, *arguments, **others):
        encoded.extend([prompt] if isinstance(prompt, str) else prompt)
        return embeddings(prompt, *arguments, **others)

    monkeypatch.setattr(pipeline, "_get_t5_prompt_embeds", watching)
    make(stage_one, image, **settings)
    assert encoded == ["pan left", *negatives]


def test_the_checkpoints_own_fixed_schedule_is_kept(stage_one, pipeline, image):
    pipeline.scheduler = FixedSigmaScheduler(fixed_sigmas=(1.0, 0.5))
    with watched(pipeline.transformer, pipeline.transformer_2) as (high, low):
        make(stage_one, image, stage_one_steps=2)
    assert (torch.cat(high).tolist(), torch.cat(low).tolist()) == ([1000.0], [500.0])


def test_seed_image_and_prompt_matter(stage_one, image):
    base = make(stage_one, image, num_frames=9)
    assert torch.equal(base, make(stage_one, image, num_frames=9))
    assert not torch.equal(base, make(stage_one, image, num_frames=9, seed=4))
    assert not torch.equal(base, make(stage_one, make_image(1), num_frames=9))
    assert not torch.equal(base, make(stage_one, image, num_frames=9, prompt="zoom in"))


# The prompt


def test_embeddings_are_those_of_the_pipeline(stage_one, pipeline, image):
    embeds = stage_one.encode_prompt("pan left", "blurry")
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt("pan left", "blurry", max_sequence_length=TEXT_LENGTH)
    assert torch.equal(embeds.prompt, prompt)
    assert torch.equal(embeds.negative, negative)
    assert embeds.prompt.shape == (1, TEXT_LENGTH, 32)
    assert not embeds.prompt[:, len("pan left") + 1 :].any()
    assert not embeds.prompt.requires_grad
    assert torch.equal(make(stage_one, image), make(stage_one, image, prompt=embeds))


def test_an_empty_prompt_is_allowed(stage_one, image):
    embeds = stage_one.encode_prompt("")
    assert embeds.negative is None
    assert len(make(stage_one, image, prompt="")) == 1


def test_a_prompt_beyond_the_encoder_is_cut_and_said(stage_one, recwarn):
    assert stage_one.cut_note("prompt", "a" * (TEXT_LENGTH - 1)) is None
    note = stage_one.cut_note("prompt", "a" * 10_000)
    assert note == f"the prompt was cut: the text encoder reads {TEXT_LENGTH} of its 10001 tokens"
    cut = stage_one.encode_prompt("a" * 10_000, "b" * 20)
    assert cut.prompt.shape == (1, TEXT_LENGTH, 32)
    assert not recwarn.list


# The pipeline is borrowed


def state(pipeline) -> dict:
    networks = (pipeline.transformer, pipeline.transformer_2)
    return {
        "scheduler": id(pipeline.scheduler),
        "config": dict(pipeline.config),
        "progress": dict(pipeline._progress_bar_config),
        "adapters": [network.active_adapters() if hasattr(network, "peft_config") else None for network in networks],
        "trainable": [[p.requires_grad for p in network.parameters()] for network in networks],
    }


class Stop(Exception):  # noqa: N818 - not an error
    pass


@pytest.mark.parametrize("kind", [GenerationCancelled, KeyboardInterrupt, Stop])
def test_an_exception_in_on_step_stops_at_once_and_leaves_the_pipeline_usable(stage_one, pipeline, image, kind):
    before, expected = state(pipeline), make(stage_one, image)

    def cancel(step, num_steps):
        if step == 1:
            raise kind

    with watched(pipeline.transformer, pipeline.transformer_2) as (high, low), pytest.raises(kind):
        make(stage_one, image, on_step=cancel)
    assert (len(high), len(low)) == (2, 0)
    assert state(pipeline) == before
    assert torch.equal(make(stage_one, image), expected)


def test_a_cancelled_run_frees_the_hooks_of_offloading(stage_one, pipeline, image, monkeypatch):
    freed = []
    monkeypatch.setattr(pipeline, "maybe_free_model_hooks", lambda: freed.append(True))
    embeds = stage_one.encode_prompt("pan left")
    freed.clear()

    def cancel(step, num_steps):
        raise Stop

    with pytest.raises(Stop):
        make(stage_one, image, prompt=embeds, on_step=cancel)
    assert freed == [True]


def add_adapter(network, name: str, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # PEFT says so for a second adapter
        network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"]), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if f".{name}." in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def with_adapters(pipeline) -> WanImageToVideoPipeline:
    for index, network in enumerate((pipeline.transformer, pipeline.transformer_2)):
        add_adapter(network, "few_step", 10 + index)
        add_adapter(network, "low_res", 20 + index)
        network.set_adapters(["few_step", "low_res"], [0.5, 0.7])
        network.requires_grad_(False)
    return pipeline


def test_many_steps_run_without_the_few_step_adapters(stage_one, with_adapters, image):
    many = many_steps(3, stage_one_guidance_scale=1.0)
    before = state(with_adapters)
    few, ours = make(stage_one, image), make(stage_one, image, **many)
    assert state(with_adapters) == before
    assert torch.equal(make(stage_one, image), few)

    for network in (with_adapters.transformer, with_adapters.transformer_2):
        network.set_adapters(["low_res"], [0.7])
    assert torch.equal(make(stage_one, image, **many), ours)
    # Few-step mode turns them on again, at the scale they were left with.
    assert torch.equal(make(stage_one, image), few)
    for network in (with_adapters.transformer, with_adapters.transformer_2):
        network.delete_adapters("few_step")
    assert torch.equal(make(stage_one, image, **many), ours)
    assert not torch.equal(make(stage_one, image), few)


def test_a_network_whose_only_adapter_is_few_step_runs_as_the_base_network(stage_one, pipeline, image):
    many = many_steps(3, stage_one_guidance_scale=1.0)
    base = make(stage_one, image, **many)
    few = make(stage_one, image)
    for network in (pipeline.transformer, pipeline.transformer_2):
        add_adapter(network, "few_step_high", 5)
    assert torch.equal(make(stage_one, image, **many), base)
    assert not torch.equal(make(stage_one, image), few)


def test_an_exception_restores_the_adapters(stage_one, with_adapters, image):
    before = state(with_adapters)

    def cancel(step, num_steps):
        raise Stop

    with pytest.raises(Stop):
        make(stage_one, image, **many_steps(3), on_step=cancel)
    assert state(with_adapters) == before


# Bad arguments


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"num_frames": 10}, "9 or 13"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": PromptEmbeds(torch.zeros(1, 16, 32)), "stage_one_guidance_scale": 3.5}, "negative_prompt"),
    ],
)
def test_bad_arguments_are_errors_at_the_call(stage_one, image, changes, fix):
    with pytest.raises(InvalidInputError, match=fix):
        pieces(stage_one, image, **({"num_frames": 9} | changes))


def test_an_image_of_another_form_is_an_error_and_a_larger_one_is_reduced(stage_one, image):
    with pytest.raises(InvalidInputError):
        pieces(stage_one, image.convert("RGBA"))
    with pytest.raises(InvalidInputError):
        pieces(stage_one, image, size=Size(40, 16))
    large = image.resize((64, 32))
    assert torch.equal(make(stage_one, large), make(stage_one, large.resize(SIZE, PIL.Image.Resampling.LANCZOS)))


def test_the_second_guidance_scale_needs_a_second_expert(pipeline, image):
    pipeline.register_to_config(boundary_ratio=None)
    stage_one = StageOne(pipeline, window_frames=9, max_sequence_length=TEXT_LENGTH)
    with pytest.raises(InvalidInputError, match="second expert"):
        pieces(stage_one, image, stage_one_guidance_scale=3.5, stage_one_guidance_scale_2=2.0)


def test_defaults_are_the_published_ones():
    defaults = inspect.signature(StageOne.__init__).parameters
    assert defaults["window_frames"].default == 81
    assert defaults["max_sequence_length"].default == 512


@pytest.mark.parametrize(("window", "overlap"), [(10, 5), (9, 4), (9, 9)])
def test_windows_of_another_form_are_errors(pipeline, window, overlap):
    with pytest.raises(InvalidInputError):
        StageOne(pipeline, window_frames=window, overlap_frames=overlap)
