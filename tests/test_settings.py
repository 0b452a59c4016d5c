"""What a caller may choose: ranges, what None means, and which choices decide which stage."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from pydantic import TypeAdapter

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.settings import (
    DESCRIPTIONS,
    MAX_PROMPT_CHARACTERS,
    MAX_SIDE,
    OPTIONS,
    GenerationSettings,
    check_prompt,
    checked_choices,
    plain_choices,
)

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
    assert SETTINGS.settled(None) == SETTINGS.settled({}) == SETTINGS
    for field in fields(GenerationSettings):
        base = replace(SETTINGS, **MANY_STEPS) if field.name in OF_MANY_STEPS else SETTINGS
        settled = base.settled({field.name: OTHERS[field.name]})
        assert settled == replace(base, **{field.name: OTHERS[field.name]})
        assert settled != base


def test_zero_and_empty_are_choices() -> None:
    base = replace(SETTINGS, seed=5, neighbors_before=2, negative_prompt="blurry")
    settled = base.settled({"seed": 0, "neighbors_before": 0, "negative_prompt": "", "anchor": False})
    assert (settled.seed, settled.neighbors_before, settled.negative_prompt, settled.anchor) == (0, 0, "", False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("num_frame", "did you mean num_frames"),
        ("height", r"give size=Size\(width"),
        ("zzz", "they are size, num_frames"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words) as caught:
        checked_choices({name: 1})
    assert (caught.value.param, caught.value.value) == (name, 1)


@pytest.mark.parametrize("size", [Size(1280, 704), (1280, 704), [1280, 704], "1280x704", " 1280 X 704 "])
def test_a_size_may_be_written_in_any_form(size: object) -> None:
    checked = checked_choices({"size": size})["size"]
    assert checked == Size(1280, 704)
    assert isinstance(checked, Size)
    assert replace(SETTINGS, size=size).size == checked  # type: ignore[arg-type]


def test_plain_choices_go_through_json() -> None:
    choices = checked_choices(OTHERS)
    assert checked_choices(json.loads(json.dumps(plain_choices(OTHERS)))) == choices
    assert plain_choices({"size": None, "fps": None}) == {}


def test_every_setting_says_what_it_is() -> None:
    """The same text stands in --help, in the service's document and in the app."""
    assert OPTIONS.keys() == DESCRIPTIONS.keys() == OTHERS.keys()
    properties = TypeAdapter(GenerationSettings).json_schema()["properties"]
    for name, description in DESCRIPTIONS.items():
        assert description.endswith(".")
        assert properties[name]["description"] == description
    flags = [option.flag for option in OPTIONS.values() if option.flag is not None]
    assert len(set(flags)) == len(flags)


def test_settings_need_no_network_library() -> None:
    code = "import sys, swifti2v.settings; sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603 - our own code


def test_a_long_prompt_is_refused() -> None:
    check_prompt("x" * MAX_PROMPT_CHARACTERS)
    with pytest.raises(InvalidInputError) as caught:
        check_prompt("x" * (MAX_PROMPT_CHARACTERS + 1))
    assert caught.value.param == "prompt"


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


def test_work_directories_stay_what_they_were() -> None:
    """These are written into every work directory: a run that was begun with an earlier version goes on."""
    few = {
        "size": "1280x704",
        "num_frames": "81",
        "seed": "0",
        "few_step": "True",
        "stage_one_steps": "4",
        "stage_one_guidance_scale": "1.0",
        "negative_prompt": "",
    }
    second = {
        "refiner": "concat",
        "reference": "transport",
        "flow_scale": "0.5",
        "num_inference_steps": "4",
        "sigma_start": "1.0",
        "flow_shift": "5.0",
        "guidance_scale": "1.0",
        "negative_prompt": "",
        "solver": "euler",
        "segment_size": "3",
        "neighbors_before": "1",
        "neighbors_after": "0",
        "anchor": "True",
        "keep_context": "False",
        "positions": "absolute",
    }
    assert SETTINGS.stage_one_identity() == few
    assert SETTINGS.stage_two_identity() == second
    many = replace(
        SETTINGS,
        few_step=False,
        stage_one_guidance_scale=5,
        stage_one_guidance_scale_2=2.0,
        negative_prompt="blurry",
        guidance_scale=3,
        reference="replace",
    )
    assert many.stage_one_identity() == few | {
        "few_step": "False",
        "stage_one_guidance_scale": "5",  # as it was given
        "stage_one_guidance_scale_2": "2.0",
        "stage_one_flow_shift": "5.0",
        "negative_prompt": "blurry",
    }
    assert many.stage_two_identity() == second | {
        "reference": "replace",
        "flow_scale": "",
        "guidance_scale": "3",
        "negative_prompt": "blurry",
    }


def test_a_negative_prompt_without_guidance_is_said_with_its_fix() -> None:
    asked = {"negative_prompt": "blurry"}
    recommended = replace(SETTINGS, negative_prompt="recommended")
    (note,) = recommended.settled(asked).notes(asked)
    assert note.startswith(
        "the negative prompt has no effect: neither stage has guidance; set stage_one_guidance_scale"
    )
    assert "--stage-one-guidance" in note
    assert recommended.notes({}) == ()  # nobody asked for it
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
        SETTINGS.settled(choices)
    many = replace(SETTINGS, **MANY_STEPS)
    assert many.settled(choices) == replace(many, **choices)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("size", [Size(1280, 720), Size(0, 0), Size(MAX_SIDE + 32, 32), Size(32, MAX_SIDE + 32), "1280", 7, (1.0, 2)]),
        ("num_frames", [80, 0, -3, 81.0, "81", True]),
        ("fps", [0.0, 241, float("nan"), float("inf"), "16"]),
        ("refiner", ["magic", ""]),
        ("reference", ["magic"]),
        ("solver", ["magic"]),
        ("positions", ["magic"]),
        ("seed", [-1, 2**63, 0.5]),
        ("flow_scale", [0.0, 1.5]),
        ("num_inference_steps", [0, 1001]),
        ("sigma_start", [0.0, 1.1]),
        ("flow_shift", [0.0]),
        ("guidance_scale", [0.5, 101]),
        ("negative_prompt", ["x" * (MAX_PROMPT_CHARACTERS + 1), 3]),
        ("segment_size", [0]),
        ("neighbors_before", [-1]),
        ("neighbors_after", [-1]),
        ("anchor", [1, "yes"]),
        ("keep_context", [0]),
        ("few_step", [1]),
        ("stage_one_steps", [0]),
        ("stage_one_guidance_scale", [0.0]),
        ("stage_one_guidance_scale_2", [0.5]),
        ("stage_one_flow_shift", [0.0]),
    ],
)
def test_values_that_cannot_be_used_are_refused(name: str, values: list[object]) -> None:
    for value in values:
        for make in (SETTINGS.settled, lambda choices: replace(SETTINGS, **choices)):
            with pytest.raises(InvalidInputError) as caught:
                make({name: value})
            assert caught.value.param == name
            assert caught.value.value is value
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 200


def test_messages_name_the_fix() -> None:
    for choices, words in (
        ({"size": "1280x720"}, "1280x720 is not a multiple of 32.*nearest is 1280x704"),
        ({"num_frames": 80}, r"4k\+1 frames, for instance 77 or 81"),
        ({"refiner": "magic"}, "refiner is 'magic'; it should be 'concat', 'training-free', 'light' or 'none'"),
        ({"fps": 0.0}, "fps is 0.0; it should be greater than or equal to 1"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            SETTINGS.settled(choices)
