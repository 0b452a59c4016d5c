"""From a checkpoint on disk, as diffusers writes it, to the parts of a pipeline."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import pytest
import torch

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.runner import loading
from swifti2v.runner.loading import load_parts, open_device, settings_of
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.schedulers import FixedSigmaScheduler
from swifti2v.wan.checkpoint_files import write_checksums
from swifti2v.wan.checkpoint_index import WAN_NEGATIVE_PROMPT

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def edited(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the checkpoint whose index has other entries."""

    def edit(**sections: dict[str, Any]) -> Path:
        root = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy", dirs_exist_ok=True))
        data = json.loads((root / "swifti2v.json").read_text())
        for section, changes in sections.items():
            data[section].update(changes)
        (root / "swifti2v.json").write_text(json.dumps(data))
        return root

    return edit


def test_concat_checkpoint(tiny_checkpoint: Path) -> None:
    parts = load_parts(tiny_checkpoint, device="cpu")
    assert parts.name == "tiny"
    assert parts.stage_one.window_frames == 9
    assert parts.stage_one.max_sequence_length == 16
    assert parts.stage_two.transformer.config.reference_channels == 48
    assert parts.stage_two.geometry.size_multiple == 32
    assert not parts.stage_two.transformer.training
    settings = parts.defaults
    assert (settings.size, settings.num_frames, settings.fps) == (Size(64, 64), 9, 8)
    assert (settings.refiner, settings.few_step, settings.stage_one_steps) == ("concat", True, 4)
    assert settings.stage_one_guidance_scale == 1


def test_stock_network_is_run_training_free(edited: Callable[..., Path]) -> None:
    root = edited(stage_two={"source": "./stock", "refiner": "training-free", "sigma_start": 0.5, "segment_size": 2})
    parts = load_parts(root, device="cpu")
    assert parts.stage_two.transformer.config.reference_channels == 0
    assert (parts.defaults.refiner, parts.defaults.sigma_start, parts.defaults.segment_size) == (
        "training-free",
        0.5,
        2,
    )


@pytest.mark.parametrize(("source", "channels"), [("./stage_two", 48), ("./stock", 0)])
def test_index_that_runs_no_refiner_loads_either_network(
    edited: Callable[..., Path], source: str, channels: int
) -> None:
    parts = load_parts(edited(stage_two={"source": source, "refiner": "none"}), device="cpu")
    assert parts.defaults.refiner == "none"
    assert parts.stage_two.transformer.config.reference_channels == channels


def test_index_that_names_the_wrong_refiner(edited: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"0 reference channels.*use training-free"):
        load_parts(edited(stage_two={"source": "./stock"}), device="cpu")


def test_many_step_way_leaves_the_few_step_adapters_out(tiny_checkpoint: Path) -> None:
    few, many = (load_parts(tiny_checkpoint, device="cpu", few_step=way) for way in (True, False))
    query = "blocks.0.attn1.to_q"
    weights = [parts.stage_one.pipeline.transformer.get_submodule(query).weight for parts in (few, many)]
    assert not torch.equal(*weights)
    assert many.defaults.few_step is False
    assert (many.defaults.stage_one_steps, many.defaults.stage_one_guidance_scale) == (40, 3.5)
    assert (few.few_step_ways, many.few_step_ways) == ((True,), (False,))
    few.check(few.defaults)
    many.check(many.defaults)
    with pytest.raises(InvalidInputError, match="are part of the loaded weights; load with few_step=False"):
        few.check(many.defaults)
    with pytest.raises(InvalidInputError, match="left out of the loaded weights; load with few_step=True"):
        many.check(few.defaults)


def test_checkpoint_without_few_step_adapters_samples_both_ways(edited: Callable[..., Path]) -> None:
    parts = load_parts(edited(stage_one={"adapters": []}), device="cpu")
    for way in (True, False):
        parts.check(parts.defaults_of(way))


@pytest.mark.parametrize("own", [False, True], ids=["checkpoint with UniPC", "checkpoint with its own"])
def test_few_step_schedule_is_that_of_the_index(edited: Callable[..., Path], own: bool) -> None:
    root = edited(stage_one={"few_step_sigmas": [1.0, 0.75, 0.5], "flow_shift": 7.0})
    if own:
        FixedSigmaScheduler(shift=3.0).save_pretrained(root / "stage_one" / "scheduler")
        path = root / "stage_one" / "model_index.json"
        scheduler = {"scheduler": ["swifti2v.schedulers", "FixedSigmaScheduler"]}
        path.write_text(json.dumps(json.loads(path.read_text()) | scheduler))
    parts = load_parts(root, device="cpu")
    scheduler = parts.stage_one.pipeline.scheduler
    scheduler.set_timesteps(parts.defaults.stage_one_steps)
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.0]
    assert scheduler.config.shift == (3.0 if own else 5.0)
    assert parts.defaults_of(False).stage_one_flow_shift == 7.0


def test_negative_prompt_is_that_of_the_index(edited: Callable[..., Path]) -> None:
    assert settings_of("wan2.2", few_step=False).negative_prompt == WAN_NEGATIVE_PROMPT
    assert settings_of("mini", few_step=False).negative_prompt == ""  # as its training
    assert settings_of(edited(), few_step=False).negative_prompt == WAN_NEGATIVE_PROMPT
    assert settings_of(edited(stage_one={"negative_prompt": "blurry"})).negative_prompt == "blurry"


def test_wans_negative_prompt_is_wans() -> None:
    """Digest of `sample_neg_prompt` in `wan/configs/shared_config.py` of Wan-Video/Wan2.2 at 42bf4cf, in UTF-8."""
    digest = hashlib.sha256(WAN_NEGATIVE_PROMPT.encode()).hexdigest()
    assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"


def test_who_asks_for_the_other_way_is_given_its_defaults(edited: Callable[..., Path]) -> None:
    root = edited(stage_one={"adapters": []})
    few, many = (load_parts(root, device="cpu", few_step=way) for way in (True, False))
    assert few.defaults_of(None) == few.defaults_of(True) == many.defaults_of(True) == few.defaults
    assert many.defaults_of(None) == many.defaults_of(False) == few.defaults_of(False) == many.defaults
    image = PIL.Image.new("RGB", (64, 64))
    settings = TwoStagePipeline(few).request(image, few_step=False, stage_one_steps=6).settings
    assert settings == replace(many.defaults, stage_one_steps=6)
    assert settings_of(root, {"few_step": False}) == many.defaults


def test_an_option_for_an_expert_that_there_is_not_is_refused_before_work(edited: Callable[..., Path]) -> None:
    parts = load_parts(edited(), device="cpu", few_step=False)
    pipe, image = TwoStagePipeline(parts), PIL.Image.new("RGB", (64, 64))
    assert pipe.request(image, stage_one_guidance_scale_2=2.0).settings.stage_one_guidance_scale_2 == 2.0
    parts.stage_one.pipeline.register_to_config(boundary_ratio=None)
    with pytest.raises(InvalidInputError, match="for the second expert, and this checkpoint has one expert"):
        pipe.request(image, stage_one_guidance_scale_2=2.0)


def test_motion_size(edited: Callable[..., Path]) -> None:
    parts = load_parts(edited(), device="cpu")
    assert parts.motion_size(Size(2560, 1408)) == Size(640, 352)
    assert parts.motion_size(Size(64, 32)) == Size(16, 16)
    bounded = load_parts(edited(stage_one={"max_area": 320 * 176}), device="cpu")
    assert bounded.motion_size(Size(2560, 1408)) == Size(320, 176)
    assert bounded.motion_size(Size(640, 352)) == Size(160, 96)  # a fourth, to the multiple of 16


def test_dtype_reaches_the_networks(tiny_checkpoint: Path) -> None:
    parts = load_parts(tiny_checkpoint, device="cpu", dtype=torch.bfloat16)
    assert parts.stage_two.transformer.dtype == torch.bfloat16
    assert parts.stage_one.pipeline.transformer.dtype == torch.bfloat16
    assert parts.stage_one.pipeline.vae.dtype == torch.float32


def test_a_run_in_bfloat16_is_that_in_float32_but_for_rounding(tiny_checkpoint: Path) -> None:
    """CUDA's default. `mini`'s codec is a linear transform and stays in float32, its transformer does not."""
    image = PIL.Image.linear_gradient("L").convert("RGB").resize((96, 64))
    for name, options, least in (
        ("mini", {"size": Size(128, 64), "refiner": "concat"}, 40.0),
        (str(tiny_checkpoint), {"size": Size(96, 64)}, 15.0),
    ):
        exact, rounded = (
            TwoStagePipeline.from_pretrained(name, device="cpu", dtype=dtype)(
                image, "pan left", num_frames=9, seed=3, **options
            ).frames
            for dtype in (torch.float32, torch.bfloat16)
        )
        error = (exact.double() - rounded.double()).square().mean()
        assert 20 * math.log10(255) - 10 * math.log10(error) > least, name


@pytest.mark.parametrize("device", ["cdua", "cuda:99", "meta", "mps"])
def test_devices_that_cannot_be_used(device: str) -> None:
    with pytest.raises(InvalidInputError, match="use cpu, or cuda") as caught:
        open_device(device)
    assert "\n" not in str(caught.value)


def test_the_card_that_is_asked_for_becomes_the_one_of_the_thread(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams are made for the thread's own card; another one's would not run beside the work on this one."""
    chosen: list[torch.device] = []

    def choose(device: torch.device) -> None:
        chosen.append(device)
        raise InterruptedError

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    load_parts(tiny_checkpoint, device="cpu")
    monkeypatch.setattr(loading, "open_device", torch.device)
    with pytest.raises(InterruptedError):
        load_parts(tiny_checkpoint, device="cuda:1")
    assert chosen == [torch.device("cuda", 1)]


def test_checksums_tell_states_of_one_name_apart(edited: Callable[..., Path]) -> None:
    root = edited()
    write_checksums(root)
    first = load_parts(root, device="cpu").name
    (root / "adapters" / "note.txt").write_text("another state")
    write_checksums(root)
    second = load_parts(root, device="cpu").name
    assert first != second
    assert first.startswith("tiny ")
    assert load_parts(root, device="cpu").name == second


def test_settings_are_known_before_anything_is_loaded(edited: Callable[..., Path]) -> None:
    root = edited(defaults={"num_frames": 13})
    parts = load_parts(root, device="cpu")
    shutil.rmtree(root / "stage_one")
    shutil.rmtree(root / "stage_two")
    assert settings_of(root) == parts.defaults
    options = {"size": Size(96, 64), "seed": 7}
    assert settings_of(root, options) == parts.defaults.settled(options)
    assert settings_of(root, few_step=False).stage_one_steps == 40
    with pytest.raises(InvalidInputError, match="4k\\+1"):
        settings_of(root, {"num_frames": 12})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        settings_of(root / "nowhere")


def test_bad_weights_are_found_in_the_smaller_stage_first(
    edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage I is 28 billion parameters: what is wrong with Stage II must not be said after loading them."""
    root = edited()
    weights = root / "stage_two" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])

    def not_yet(*_arguments: object, **_options: object) -> None:
        raise AssertionError("Stage I was loaded first")

    monkeypatch.setattr(loading, "load_stage_one_pipeline", not_yet)
    with pytest.raises(CheckpointError, match=r"stage_two/transformer.*cut short"):
        load_parts(root, device="cpu")
