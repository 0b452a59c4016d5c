"""Presets: they fit their card, more memory is never slower, and the sentence holds the plan's own numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from swifti2v.cli.main import app
from swifti2v.geometry import Size
from swifti2v.memory.networks import WAN22
from swifti2v.settings import GenerationSettings
from swifti2v.webapp.presets import CARDS, Card, preset_of, size_choices, summary
from swifti2v.webapp.studio import Form, Studio

if TYPE_CHECKING:
    from swifti2v.jobs.queue import JobQueue

DEFAULTS = GenerationSettings(Size(2560, 1408), 81, 16.0, "concat")


def numbers(text: str) -> dict[str, float]:
    memory = r"peak ([\d.]+) GiB of (\d+) GB, ([\d.]+) GiB of host memory"
    match = re.search(memory + r"\. Preview (?:about [\d,]+|under 1) s, video about ([\d,]+) s", text)
    assert match, text
    return {
        "peak": float(match[1]),
        "card": float(match[2]),
        "host": float(match[3]),
        "seconds": float(match[4].replace(",", "")),
    }


def test_the_numbers_are_those_that_plan_prints() -> None:
    arguments = "plan --model wan2.2 --size 2560x1408 --frames 81 --memory 24GB --gpu rtx4090 --json"
    printed = json.loads(CliRunner().invoke(app, arguments.split()).stdout)
    shown = numbers(preset_of("24 GB", WAN22, DEFAULTS).summary)
    assert shown["peak"] == pytest.approx(printed["peak_bytes"] / 2**30, abs=0.05)
    assert shown["host"] == pytest.approx(printed["host_bytes"] / 2**30, abs=0.05)
    assert shown["seconds"] == pytest.approx(printed["seconds"] - printed["loading_seconds"], abs=0.5)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.label)
def test_a_preset_fits_its_card(card: Card) -> None:
    preset = preset_of(card.label, WAN22, DEFAULTS)
    shown = numbers(preset.summary)
    assert shown["peak"] * 2**30 <= shown["card"] * 1e9
    assert str(preset.size) in preset.summary
    assert f"for {card.rates}, not measured" in preset.summary


def test_more_memory_is_never_slower_nor_smaller() -> None:
    presets = [preset_of(card.label, WAN22, DEFAULTS) for card in CARDS]
    areas = [preset.size.width * preset.size.height for preset in presets]
    assert areas == sorted(areas)
    same_card = [numbers(summary(card.label, WAN22, DEFAULTS))["seconds"] for card in CARDS[:3]]
    assert same_card == sorted(same_card, reverse=True)


def test_what_does_not_fit_is_said_with_what_would() -> None:
    whole_clip = replace(DEFAULTS, num_frames=157, segment_size=40)
    text = summary("12 GB", WAN22, whole_clip)
    assert text.startswith("Does not fit 12 GB: no plan fits")
    assert re.search(r"needs at least [\d.]+ GiB", text)


def test_sizes_keep_the_shape_and_the_multiple() -> None:
    sizes = size_choices(DEFAULTS)
    assert sizes[0] == DEFAULTS.size
    assert all(side % 32 == 0 for size in sizes for side in size)
    assert all(abs(size.width / size.height - 2560 / 1408) < 0.05 for size in sizes)


def test_a_longer_clip_costs_more_and_is_told_as_it_is_typed(queue: JobQueue) -> None:
    studio = Studio(queue, "mini", dimensions=WAN22)
    short = numbers(studio.plan("24 GB", Form(size="2560x1408", num_frames=41)))
    long = numbers(studio.plan("24 GB", Form(size="2560x1408", num_frames=161)))
    assert long["seconds"] > 3 * short["seconds"]
    assert long["peak"] == pytest.approx(short["peak"], rel=0.2)  # memory does not grow with length


def test_without_the_networks_there_is_no_plan(studio: Studio) -> None:
    assert studio.plan("24 GB", Form()).startswith("No plan")
    assert studio.preset("24 GB").size == studio.defaults.size
