"""What a caller may choose: ranges, what None means, and which choices decide which stage."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.runner.options import MAX_SIDE, GenerationOptions, GenerationSettings

SETTINGS = GenerationSettings(size=Size(1280, 704), num_frames=81, fps=16.0, refiner="concat")

# Another value of every setting, as a run could be given.
OTHERS = {
    "size": Size(640, 352),
    "num_frames": 17,
    "fps": 24.0,
    "refiner": "none",
    "reference": "replace",
    "seed": 1,
    "flow_scale": 0.25,
    "num_inference_steps": 2,
    "sigma_start": 0.5,
    "flow_shift": 3.0,
    "guidance_scale": 2.0,
    "negative_prompt": "blurry",
    "solver": "renoise",
    "segment_size": 2,
    "neighbors_before": 2,
    "neighbors_after": 1,
    "anchor": False,
    "keep_context": True,
    "positions": "compact",
    "few_step": False,
    "stage_one_steps": 8,
    "stage_one_guidance_scale": 3.5,
    "stage_one_guidance_scale_2": 2.0,
    "stage_one_flow_shift": 3.0,
}
OF_STAGE_ONE = {
    "size",
    "num_frames",
    "seed",
    "few_step",
    "stage_one_steps",
    "stage_one_guidance_scale",
    "stage_one_guidance_scale_2",
    "stage_one_flow_shift",
}
# With which the others have an effect.
MANY_STEPS = {"few_step": False, "stage_one_guidance_scale": 5.0}
OF_MANY_STEPS = {"stage_one_guidance_scale_2", "stage_one_flow_shift"}


def test_every_setting_is_tried() -> None:
    assert OTHERS.keys() == {field.name for field in fields(GenerationSettings)}


def test_none_leaves_a_choice_to_the_checkpoint() -> None:
    assert SETTINGS.settled(None) == SETTINGS.settled(GenerationOptions()) == SETTINGS
    for field in fields(GenerationOptions):
        base = replace(SETTINGS, **MANY_STEPS) if field.name in OF_MANY_STEPS else SETTINGS
        settled = base.settled(GenerationOptions(**{field.name: OTHERS[field.name]}))
        assert settled == replace(base, **{field.name: OTHERS[field.name]})
        assert settled != base


def test_zero_and_empty_are_choices() -> None:
    base = replace(SETTINGS, seed=5, neighbors_before=2, negative_prompt="blurry")
    settled = base.settled(GenerationOptions(seed=0, neighbors_before=0, negative_prompt="", anchor=False))
    assert (settled.seed, settled.neighbors_before, settled.negative_prompt, settled.anchor) == (0, 0, "", False)


def test_single_choices_stand_over_options() -> None:
    options = GenerationOptions(num_frames=17, seed=1)
    assert options.with_choices({"seed": 2}) == GenerationOptions(num_frames=17, seed=2)
    for name, words in (
        ("num_frame", "did you mean num_frames"),
        ("height", r"give size=Size\(width, height\)"),
        ("zzz", "they are size, num_frames"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            options.with_choices({name: 1})


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_setting_decides_the_stage_that_it_belongs_to(name: str) -> None:
    """A work directory is continued where these are equal, so a setting that is left out of both mixes two runs."""
    guided = replace(SETTINGS, guidance_scale=3.0, **(MANY_STEPS if name in OF_MANY_STEPS else {}))
    changed = replace(guided, **{name: OTHERS[name]})
    first = changed.stage_one_identity() != guided.stage_one_identity()
    second = changed.stage_two_identity() != guided.stage_two_identity()
    assert first == (name in OF_STAGE_ONE)
    assert second == (name not in OF_STAGE_ONE and name != "fps")


def test_what_has_no_effect_decides_nothing() -> None:
    blurry = replace(SETTINGS, negative_prompt="blurry")
    assert blurry.stage_one_identity() == SETTINGS.stage_one_identity()
    assert blurry.stage_two_identity() == SETTINGS.stage_two_identity()
    guided = replace(SETTINGS, stage_one_guidance_scale=3.5)
    assert replace(guided, negative_prompt="blurry").stage_one_identity() != guided.stage_one_identity()
    assert replace(SETTINGS, stage_one_flow_shift=3.0).stage_one_identity() == SETTINGS.stage_one_identity()
    replaced = replace(SETTINGS, reference="replace")
    assert replace(replaced, flow_scale=0.25).stage_two_identity() == replaced.stage_two_identity()


def test_work_directories_of_few_steps_stay_what_they_were() -> None:
    """A run that was begun before Stage I had more options goes on: they are named where they have an effect."""
    names = {"size", "num_frames", "seed", "few_step", "stage_one_steps", "stage_one_guidance_scale"}
    assert SETTINGS.stage_one_identity().keys() == names | {"negative_prompt"}
    many = replace(SETTINGS, **MANY_STEPS, stage_one_guidance_scale_2=2.0)
    assert many.stage_one_identity().keys() == OF_STAGE_ONE | {"negative_prompt"}


def test_a_negative_prompt_without_guidance_is_said_with_its_fix() -> None:
    asked = GenerationOptions(negative_prompt="blurry")
    recommended = replace(SETTINGS, negative_prompt="recommended")
    (note,) = recommended.settled(asked).notes(asked)
    assert note.startswith(
        "the negative prompt has no effect: neither stage has guidance; set stage_one_guidance_scale"
    )
    assert "--stage-one-guidance" in note
    assert recommended.notes(GenerationOptions()) == ()  # nobody asked for it
    for guided in ({"guidance_scale": 2.0}, {"stage_one_guidance_scale": 2.0}):
        assert replace(recommended, **guided).notes(asked) == ()
    assert replace(recommended, guidance_scale=2.0, refiner="none").notes(asked) == (note,)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"stage_one_flow_shift": 3.0}, "has no effect with few steps; ask for many: few_step=False, --many-step"),
        (
            {"stage_one_guidance_scale_2": 2.0},
            r"no effect without guidance in Stage I; set stage_one_guidance_scale above 1 \(--stage-one-guidance\)",
        ),
    ],
)
def test_choices_of_many_steps_without_them_are_refused(choices: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        SETTINGS.settled(GenerationOptions(**choices))
    many = replace(SETTINGS, **MANY_STEPS)
    assert many.settled(GenerationOptions(**choices)) == replace(many, **choices)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": Size(1280, 720)}, "1280x720 is not a multiple of 32.*nearest is 1280x704"),
        ({"size": Size(0, 0)}, "multiple of 32"),
        ({"size": (1280, 704)}, r"size is \(1280, 704\); give Size\(width, height\)"),
        ({"size": "1280x704"}, r"give Size\(width, height\)"),
        ({"size": Size(MAX_SIDE + 32, 32)}, "width is 16416"),
        ({"size": Size(32, MAX_SIDE + 32)}, "height is 16416"),
        ({"num_frames": 80}, "4k\\+1 frames, for instance 77 or 81"),
        ({"num_frames": 0}, "4k\\+1"),
        ({"num_frames": -3}, "4k\\+1"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"refiner": "magic"}, "concat, training-free, none"),
        ({"reference": "magic"}, "replace, transport"),
        ({"solver": "magic"}, "euler, renoise"),
        ({"positions": "magic"}, "absolute, compact"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "it must be from 0 to 9223372036854775807"),
        ({"flow_scale": 0.0}, "flow_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"sigma_start": 1.5}, "sigma_start is 1.5"),
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"segment_size": 0}, "segment_size is 0"),
        ({"neighbors_before": -1}, "neighbors_before is -1"),
        ({"neighbors_after": -1}, "neighbors_after is -1"),
        ({"stage_one_steps": 0}, "stage_one_steps is 0"),
        ({"stage_one_guidance_scale": 0.0}, "stage_one_guidance_scale"),
        ({"stage_one_guidance_scale_2": 0.5}, "stage_one_guidance_scale_2 is 0.5"),
        ({"stage_one_flow_shift": 0.0}, "stage_one_flow_shift is 0"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as caught:
        SETTINGS.settled(GenerationOptions(**change))
    assert "\n" not in str(caught.value)
