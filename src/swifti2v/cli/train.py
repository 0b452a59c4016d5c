"""`swifti2v train ...`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from swifti2v.config import load_yaml

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe of recipes/mini.")]
DataOption = Annotated[Path, typer.Option(help="Index of clips and photographs: a CSV with file, kind, caption, ...")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an interrupted run continues.")]
InitialOption = Annotated[
    str | None, typer.Option("--init", help="Checkpoint whose weights and codec to start from: mini, or a folder.")
]

app = typer.Typer(help="Train the embedded model by its recipes.", no_args_is_help=True)


@app.command("stage-one")
def stage_one(recipe: RecipeArgument, *, data: DataOption, output: OutputOption, initial: InitialOption = None) -> None:
    """Train Stage I: image and prompt to motion."""
    from swifti2v.training.mini import StageOneRun, train_stage_one

    train_stage_one(load_yaml(StageOneRun, recipe), index=data, output=output, initial=initial)


@app.command("stage-two")
def stage_two(recipe: RecipeArgument, *, data: DataOption, output: OutputOption, initial: InitialOption = None) -> None:
    """Train Stage II: the refiner; after Stage I of the same --output."""
    from swifti2v.training.mini import StageTwoRun, train_stage_two

    train_stage_two(load_yaml(StageTwoRun, recipe), index=data, output=output, initial=initial)


@app.command()
def export(run: Annotated[Path, typer.Argument(help="Folder of a run.")], *, output: OutputOption) -> None:
    """Put the trained parts together as a checkpoint folder."""
    from swifti2v.training.mini import export_mini

    export_mini(run, output)
