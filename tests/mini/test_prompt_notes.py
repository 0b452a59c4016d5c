"""What is said of a prompt before the work, and of the motion after it."""

from __future__ import annotations

import re

import pytest

from swifti2v.mini import words
from swifti2v.mini.prompt_notes import motions_of, notes_of_motion, notes_of_prompt


def names(text: str) -> list[str]:
    return [motion.name for motion in motions_of(text)]


@pytest.mark.parametrize("templates", [words.TEMPLATES, words.UNDIRECTED])
@pytest.mark.parametrize("adverb", ["", "slowly", "very quickly"])
def test_every_phrase_of_training_is_known_as_what_it_is(templates: dict[str, tuple[str, ...]], adverb: str) -> None:
    for name, phrases in templates.items():
        for phrase in phrases:
            text = re.sub(r"[*&]", "", re.sub(r"\*", f" {adverb} ", phrase, count=1))
            assert names(text) == [name.split()[0]], text


@pytest.mark.parametrize(
    "text",
    [
        "panda eats bamboo", "flowers bloom", "the movie star smiles", "a frying pan", "a still life", "rolling hills",
        "the company", "a man waves", "a woman turns her head to the left", "he looks up", "zoom lens", "a red truck",
    ],
)  # fmt: skip
def test_other_words_are_no_motion(text: str) -> None:
    assert names(text) == []
    assert any("knows no motion" in note for note in notes_of_prompt(text))


def test_what_is_ignored_is_named() -> None:
    (note,) = notes_of_prompt("zoom in while petals fall")
    assert "petals fall" in note
    assert "zoom" in note
    assert notes_of_prompt("pan left slowly over the lake") == ()
    assert notes_of_prompt("the camera zooms in, slowly, and the trees sway in the wind") == ()


@pytest.mark.parametrize("text", ["dolly zoom", "the camera orbits the statue", "crane shot of a house"])
def test_what_was_not_learned_is_declined(text: str) -> None:
    assert "has not learned" in notes_of_prompt(text)[0]
    assert names(text) == []


@pytest.mark.parametrize("text", ["カメラが左にパンする", "камера движется влево", "镜头拉近", "حرك الكاميرا"])
def test_a_prompt_in_another_script_is_answered(text: str) -> None:
    assert "English words only" in notes_of_prompt(text)[0]


def test_one_foreign_word_is_mentioned() -> None:
    (note,) = notes_of_prompt("zoom in 猫")
    assert "another script" in note


def test_a_missing_direction_is_mentioned() -> None:
    (note,) = notes_of_prompt("the camera pans")
    assert "right is taken" in note


def test_an_empty_prompt_is_left_to_the_caller() -> None:
    assert notes_of_prompt("  ") == ()


def test_motion_that_is_nearly_nothing_and_motion_that_is_slowed() -> None:
    assert "nearly nothing" in notes_of_motion(0.001, 1.0, 81)[0]
    assert "0.40" in notes_of_motion(0.3, 0.4, 321)[0]
    assert notes_of_motion(0.2, 1.0, 81) == ()
    assert notes_of_motion(0.0, 1.0, 1) == ()
