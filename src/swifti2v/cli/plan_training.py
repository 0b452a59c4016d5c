"""`swifti2v plan --train RECIPE`: where a training fits and what it costs, printed without loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import typer
import yaml

from swifti2v.config import load_yaml
from swifti2v.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from swifti2v.geometry import Size
    from swifti2v.training.recipe_cost import EncodingCost, Machine, TrainingCost

CAPTION = "GiB on each card, 1 more is reserved; GPU-hours at an assumed 40% of an H100's peak"
NUM_CLIPS = 1000


def print_training_plan(recipe: Path, *, size: Size, num_frames: int, as_json: bool) -> None:
    """Print what a recipe needs on each machine, as a table or as JSON.

    Args:
        recipe: of `swifti2v train`.
        size: of the clips that Stage II is trained on; Stage I is trained at the size of its motion reference.
        num_frames: of the clips. Recipes of caches say both themselves.
        as_json: print one JSON object.

    Raises:
        ConfigurationError: the recipe cannot be read, or trains the embedded model from the start.
        CheckpointError: the recipe's checkpoint is a folder that cannot be read.
        InvalidInputError: size or length do not divide.
    """
    from swifti2v.training.recipe_cost import MACHINES, EncodingCost

    cost = cost_of_file(recipe, size=size, num_frames=num_frames)
    if isinstance(cost, EncodingCost):
        plan = {"peak_bytes": cost.peak_bytes} | asdict(cost)
        plan["machines"] = [_encoding_on(machine, cost) for machine in MACHINES]
    else:
        plan = {
            "longest_sample_tokens": cost.setup.num_tokens,
            "tflop_per_sample": cost.tflop_per_sample,
            "machines": [_training_on(machine, cost) for machine in MACHINES],
        }
    if as_json:
        typer.echo(json.dumps({"recipe": str(recipe)} | plan, indent=2))
    elif isinstance(cost, EncodingCost):
        _print_encoding(recipe, plan)
    else:
        _print_training(recipe, plan)


def cost_of_file(recipe: Path, *, size: Size, num_frames: int) -> TrainingCost | EncodingCost:
    """Measure a recipe file; see `print_training_plan` for arguments and errors."""
    from swifti2v.memory.models import planned_model
    from swifti2v.training.recipe_cost import cost_of_recipe

    run = load_yaml(_kind_of(recipe), recipe)
    if not hasattr(run, "checkpoint"):
        msg = f"{recipe} trains the embedded model from the start, on a laptop; give a recipe that has a checkpoint"
        raise ConfigurationError(msg, param="train", value=str(recipe))
    return cost_of_recipe(run, planned_model(run.checkpoint).networks, size=size, num_frames=num_frames)


def _training_on(machine: Machine, cost: TrainingCost) -> dict[str, Any]:
    held, cards = cost.setup.device_bytes(machine.num_cards), machine.num_cards
    fits = machine.holds(held.peak)
    return {
        "name": machine.name,
        "num_cards": cards,
        "memory": asdict(held) | {"peak": held.peak},
        "fits": fits,
        "changes": () if fits else cost.setup.ways_to_fit(machine),
        "min_cards": None if fits else cost.setup.min_cards(machine),
        "num_samples": cost.num_samples(cards),
        "gpu_hours": machine.gpu_hours(cost.tflop(cards)),
    }


def _encoding_on(machine: Machine, cost: EncodingCost) -> dict[str, Any]:
    hours = machine.gpu_hours(NUM_CLIPS * cost.tflop_per_clip)
    return {"name": machine.name, "fits": machine.holds(cost.peak_bytes), "gpu_hours_of_1000_clips": hours}


def _kind_of(recipe: Path) -> type[Any]:
    """Return the kind of recipe that has most of the keys of a file; it need not have all of them."""
    from swifti2v.mini.recipes import StageOneRun, StageTwoRun
    from swifti2v.training.low_res.run import LowResCacheRun, LowResLoraRun
    from swifti2v.training.refiner.run import DistillationRun, RefinerRun, TransitionRun

    kinds = (RefinerRun, DistillationRun, LowResLoraRun, TransitionRun, LowResCacheRun, StageTwoRun, StageOneRun)
    try:
        data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return RefinerRun  # reading it as one says what is wrong with the file
    keys = set(data) if isinstance(data, dict) else set()

    def likeness(kind: type[Any]) -> tuple[int, int]:
        known = {field.name for field in fields(kind)}
        return len(keys & known), -len(known)

    return max(kinds, key=likeness)


def _print_training(recipe: Path, plan: dict[str, Any]) -> None:
    parts = ("weights", "gradients", "optimizer", "average", "gathered", "activations", "peak")
    rows = [
        (
            found["name"],
            "yes" if found["fits"] else "no",
            *(_gibibytes(found["memory"][part]) for part in parts),
            f"{found['num_samples']:,}",
            f"{found['gpu_hours']:,.1f}",
        )
        for found in plan["machines"]
    ]
    title = (
        f"{recipe.name}: {plan['tflop_per_sample']:,.0f} TFLOP a sample, up to {plan['longest_sample_tokens']:,} tokens"
    )
    names = ("fits", "weights", "grads", "optim.", "avg.", "gather", "activ.", "peak", "samples", "GPU-h")
    _print_table(title, names, rows)
    for found in plan["machines"]:
        if not found["fits"]:
            typer.echo(f"{found['name']} would do {_remedy(found)}")


def _print_encoding(recipe: Path, plan: dict[str, Any]) -> None:
    sizes = (plan["weight_bytes"], plan["working_bytes"], plan["peak_bytes"])
    rows = [
        (
            found["name"],
            "yes" if found["fits"] else "no",
            *map(_gibibytes, sizes),
            f"{plan['tflop_per_clip']:,.0f}",
            f"{found['gpu_hours_of_1000_clips']:,.1f}",
        )
        for found in plan["machines"]
    ]
    names = ("fits", "weights", "work", "peak", "TFLOP a clip", "GPU-hours")
    _print_table(f"{recipe.name}: a cache of {NUM_CLIPS:,} clips", names, rows)


def _print_table(title: str, names: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    table.add_column("machine", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _gibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f}"


def _remedy(found: dict[str, Any]) -> str:
    ways = [f"with {' and '.join(names)}" for names in found["changes"]]
    if found["min_cards"] is not None:
        ways.append(f"unchanged on {found['min_cards']} such cards, sharded")
    return ", or ".join(ways) if ways else "with nothing that a recipe can set: take larger cards"
