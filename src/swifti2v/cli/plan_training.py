"""`swifti2v plan --train RECIPE`: where a training fits and what it costs, printed without loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from swifti2v.config import load_yaml
from swifti2v.errors import ConfigurationError
from swifti2v.memory.models import planned_model
from swifti2v.memory.training_fit import MACHINES, RESERVED_BYTES, fit_on

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.geometry import Size
    from swifti2v.memory.training_fit import Fit
    from swifti2v.training.recipe_cost import EncodingCost, TrainingCost

THOUSAND = 1000
CAPTION = f"GiB a card, {RESERVED_BYTES / 2**30:.0f} more reserved; GPU-hours at 40% of the peak, assumed"


def print_training_plan(recipe: Path, *, size: Size, num_frames: int, as_json: bool) -> None:
    """Print what a recipe needs on each machine, as a table or as JSON.

    Args:
        recipe: of `swifti2v train`.
        size: of the clips that Stage II is trained on; Stage I is trained at the size of its motion reference.
        num_frames: of the clips. Recipes of caches say both themselves.
        as_json: print one JSON object.

    Raises:
        ConfigurationError: the recipe cannot be read or counted, or trains the embedded model from the start.
        CheckpointError: the recipe's checkpoint is a folder that cannot be read.
        InvalidInputError: size or length do not divide.
    """
    cost = cost_of_file(recipe, size=size, num_frames=num_frames)
    if as_json:
        typer.echo(json.dumps({"recipe": str(recipe)} | cost_as_mapping(cost), indent=2))
        return
    from swifti2v.training.recipe_cost import EncodingCost

    console = Console()
    if isinstance(cost, EncodingCost):
        console.print(_encoding_table(recipe, cost))
        return
    found = [fit_on(cost.setup, machine) for machine in MACHINES]
    console.print(_training_table(recipe, cost, found))
    for fit in found:
        if not fit.fits:
            console.print(f"{fit.machine.name} would do {_remedy(fit)}", highlight=False)


def cost_of_file(recipe: Path, *, size: Size, num_frames: int) -> TrainingCost | EncodingCost:
    """Count a recipe file; see `print_training_plan` for arguments and errors."""
    from swifti2v.training.recipe_cost import cost_of_recipe

    run = load_yaml(_kind_of(recipe), recipe)
    if not hasattr(run, "checkpoint"):
        msg = f"{recipe} trains the embedded model from the start, on a laptop; give a recipe that has a checkpoint"
        raise ConfigurationError(msg)
    dimensions = planned_model(run.checkpoint).networks
    return cost_of_recipe(run, dimensions, size=size, num_frames=num_frames)


def cost_as_mapping(cost: TrainingCost | EncodingCost) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    from swifti2v.training.recipe_cost import EncodingCost

    if isinstance(cost, EncodingCost):
        machines = [
            asdict(machine)
            | {"fits": machine.holds(cost.peak_bytes)}
            | {"gpu_hours_of_1000_clips": machine.gpu_hours(THOUSAND * cost.tflop_per_clip)}
            for machine in MACHINES
        ]
        return asdict(cost) | {"peak_bytes": cost.peak_bytes, "reserved_bytes": RESERVED_BYTES, "machines": machines}
    return {
        "longest_sample_tokens": cost.setup.num_tokens,
        "trained_weights": cost.setup.num_trained,
        "tflop_per_sample": cost.tflop_per_sample,
        "reserved_bytes": RESERVED_BYTES,
        "machines": [_fit_as_mapping(cost, fit_on(cost.setup, machine)) for machine in MACHINES],
    }


def _fit_as_mapping(cost: TrainingCost, fit: Fit) -> dict[str, Any]:
    samples = cost.num_samples(fit.machine.num_cards)
    return {
        **asdict(fit.machine),
        "memory": asdict(fit.memory) | {"peak_bytes": fit.memory.peak_bytes},
        "fits": fit.fits,
        "changes": fit.changes,
        "min_cards": fit.min_cards,
        "num_samples": samples,
        "gpu_hours": fit.machine.gpu_hours(cost.tflop(fit.machine.num_cards)),
    }


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


def _training_table(recipe: Path, cost: TrainingCost, found: list[Fit]) -> Table:
    setup = cost.setup
    title = f"{recipe.name}: {setup.num_trained / 1e6:,.0f} M weights, up to {setup.num_tokens:,} tokens"
    table = Table(title=title, caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    table.add_column("machine", no_wrap=True)
    for name in ("fits", "weights", "grads", "optim.", "average", "work", "peak", "samples", "TFLOP", "GPU-h"):
        table.add_column(name, justify="right")
    for fit in found:
        memory, samples = fit.memory, cost.num_samples(fit.machine.num_cards)
        held = (memory.weight_bytes, memory.gradient_bytes, memory.optimizer_bytes, memory.average_bytes)
        work = memory.activation_bytes + memory.gathered_bytes
        hours = fit.machine.gpu_hours(cost.tflop(fit.machine.num_cards))
        table.add_row(
            fit.machine.name,
            "yes" if fit.fits else "no",
            *(f"{count / 2**30:,.1f}" for count in (*held, work, memory.peak_bytes)),
            f"{samples:,}",
            f"{cost.tflop_per_sample:,.0f}",
            f"{hours:,.1f}",
        )
    return table


def _encoding_table(recipe: Path, cost: EncodingCost) -> Table:
    table = Table(title=f"{recipe.name}: a cache of 1,000 clips", caption=CAPTION, box=SIMPLE_HEAD, padding=0)
    table.add_column("machine", no_wrap=True)
    for name in ("fits", "weights", "work", "peak", "TFLOP a clip", "GPU-hours"):
        table.add_column(name, justify="right")
    for machine in MACHINES:
        table.add_row(
            machine.name,
            "yes" if machine.holds(cost.peak_bytes) else "no",
            *(f"{count / 2**30:,.1f}" for count in (cost.weight_bytes, cost.working_bytes, cost.peak_bytes)),
            f"{cost.tflop_per_clip:,.0f}",
            f"{machine.gpu_hours(THOUSAND * cost.tflop_per_clip):,.1f}",
        )
    return table


def _remedy(fit: Fit) -> str:
    ways = [f"with {' and '.join(names)}" for names in fit.changes]
    if fit.min_cards is not None:
        ways.append(f"unchanged on {fit.min_cards} such cards, sharded")
    return ", or ".join(ways) if ways else "with nothing that a recipe can set: take larger cards"
