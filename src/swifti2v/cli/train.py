"""`swifti2v train ...`: run a recipe."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swifti2v.cli.progress import OnBar

RecipeArgument = Annotated[
    Path, typer.Argument(help="YAML recipe: one of recipes/mini or recipes/wan2.2, or your own.")
]
IndexOption = Annotated[
    Path | None,
    typer.Option("--data", help="To train mini itself: CSV that lists its clips and photographs."),
]
VideosOption = Annotated[
    Path, typer.Option("--data", help="Folder of videos with captions; see `swifti2v data check`.")
]
CacheOption = Annotated[Path, typer.Option(help="Latent cache, made by `train transition`.")]
StageCacheOption = Annotated[
    Path | None, typer.Option("--cache", help="To train any other checkpoint: latent cache to learn from.")
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; run again to continue.")]
InitialOption = Annotated[
    str | None,
    typer.Option("--init", help="Checkpoint to start from, instead of the one in the recipe: mini, or a folder."),
]

T = TypeVar("T")

app = typer.Typer(help="Train Stage I and Stage II from recipes.", no_args_is_help=True)


@app.command("low-res-cache")
def low_res_cache(recipe: RecipeArgument, *, data: VideosOption, output: OutputOption) -> None:
    """Encode videos at the size of Stage I, to train its Low-Res LoRA on."""
    from swifti2v.training.low_res.run import LowResCacheRun, build_low_res_cache

    _encode(build_low_res_cache, _read_recipe(LowResCacheRun, recipe), data, output)


@app.command("stage-one")
def stage_one(
    recipe: RecipeArgument,
    *,
    output: OutputOption,
    cache: StageCacheOption = None,
    data: IndexOption = None,
    initial: InitialOption = None,
) -> None:
    """Train Stage I: a Low-Res LoRA for a checkpoint (--cache), or all of mini's Stage I (--data)."""
    _check_one_source(cache, data, "train low-res-cache")
    with _training() as on_step:
        if data is not None:
            from swifti2v.mini.recipes import StageOneRun, train_stage_one

            run = _read_recipe(StageOneRun, recipe)
            train_stage_one(run, index=data, output=output, initial=initial, on_step=on_step)
        elif cache is not None:
            _train_low_res_lora(recipe, cache, output, initial, on_step)


@app.command()
def transition(
    recipe: RecipeArgument, *, data: VideosOption, output: OutputOption, initial: InitialOption = None
) -> None:
    """Encode videos and the references that Stage I makes of them, to train Stage II on (stage-transition)."""
    from swifti2v.training.refiner.run import TransitionRun, build_references

    _encode(build_references, _from_checkpoint(_read_recipe(TransitionRun, recipe), initial), data, output)


@app.command("stage-two")
def stage_two(
    recipe: RecipeArgument,
    *,
    output: OutputOption,
    cache: StageCacheOption = None,
    data: IndexOption = None,
    initial: InitialOption = None,
) -> None:
    """Train Stage II: the refiner of a checkpoint (--cache), or that of mini (--data, see docs/mini.md)."""
    _check_one_source(cache, data, "train transition")
    with _training() as on_step:
        if data is not None:
            from swifti2v.mini.recipes import StageTwoRun, train_stage_two

            run = _read_recipe(StageTwoRun, recipe)
            train_stage_two(run, index=data, output=output, initial=initial, on_step=on_step)
        elif cache is not None:
            from swifti2v.training.refiner.run import RefinerRun, train_refiner

            refiner = _from_checkpoint(_read_recipe(RefinerRun, recipe), initial)
            _tell(train_refiner(refiner, cache=cache, output=output, on_step=on_step))


@app.command()
def light(
    recipe: RecipeArgument,
    *,
    data: Annotated[Path, typer.Option("--data", help="CSV that lists clips and photographs.")],
    output: OutputOption,
    initial: Annotated[Path | None, typer.Option("--init", help="Folder of weights to start from.")] = None,
) -> None:
    """Train `light`, the small refiner in pixel space that needs no checkpoint."""
    from swifti2v.cli.progress import progress_bars
    from swifti2v.training.light.run import LightRun, train_light

    with progress_bars(quiet=False) as on_bar:
        weights = train_light(
            _read_recipe(LightRun, recipe),
            index=data,
            output=output,
            initial=initial,
            on_item=None if on_bar is None else lambda done, total: on_bar("pairs", done, total),
            on_step=None if on_bar is None else _shown_on(on_bar),
        )
    typer.echo(f"weights: {weights}")


@app.command()
def distill(recipe: RecipeArgument, *, cache: CacheOption, output: OutputOption, initial: InitialOption = None) -> None:
    """Distill Stage II to a few steps without guidance, by trajectory or by distribution matching."""
    from swifti2v.training.refiner.run import DistillationRun, distill_refiner

    run = _from_checkpoint(_read_recipe(DistillationRun, recipe), initial)
    with _training() as on_step:
        checkpoint = distill_refiner(run, cache=cache, output=output, on_step=on_step)
    _tell(checkpoint)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of the run that trained mini.")], *, output: OutputOption
) -> None:
    """Write the trained stages of mini as one checkpoint folder."""
    from swifti2v.mini.recipes import export_mini

    export_mini(run, output)


def _read_recipe(cls: type[T], recipe: Path) -> T:
    from swifti2v.config import load_yaml

    return load_yaml(cls, recipe)


def _check_one_source(cache: Path | None, data: Path | None, maker: str) -> None:
    if (cache is None) == (data is None):
        msg = f"give --cache (of `{maker}`) for a checkpoint, or --data (an index) for the embedded model"
        raise InvalidInputError(msg)


def _encode(build: Callable[..., Any], run: Any, data: Path, output: Path) -> None:
    from swifti2v.cli.generate import quiet_libraries
    from swifti2v.cli.progress import progress_bars

    quiet_libraries()
    with progress_bars(quiet=not _is_first()) as on_bar:
        cache = build(
            run,
            data=data,
            output=output,
            on_video=None if on_bar is None else lambda done, total: on_bar("videos", done, total),
            on_clip=None if on_bar is None else lambda clip: on_bar("clips", clip.done + clip.skipped, clip.total),
        )
    missing = ""
    if cache.num_missing:
        missing = f", {cache.num_missing} still missing: other processes make them; if none is left, run this again"
    _say(f"{len(cache)} clips in {output}, {len(cache.skipped)} skipped{missing}")


def _train_low_res_lora(
    recipe: Path, cache: Path, output: Path, initial: str | None, on_step: Callable[[Any], None] | None
) -> None:
    from swifti2v.data.latent_cache import LatentCache
    from swifti2v.training.engine.distributed import joined_processes
    from swifti2v.training.low_res.run import LowResLoraRun, train_low_res_lora

    run = _from_checkpoint(_read_recipe(LowResLoraRun, recipe), initial)
    with joined_processes(run.loop.context_parallel) as processes:
        checkpoint = train_low_res_lora(
            run,
            cache=LatentCache.open(cache),
            output=output,
            processes=processes,
            on_step=None if on_step is None else lambda _expert, report: on_step(report),
        )
    _say(f"LoRA files, for diffusers and for ComfyUI: {checkpoint / 'adapters'}")
    _tell(checkpoint)


@contextmanager
def _training() -> Iterator[Callable[[Any], None] | None]:
    """Yield what shows the steps of a run in a terminal."""
    from swifti2v.cli.generate import quiet_libraries
    from swifti2v.cli.progress import progress_bars

    quiet_libraries()
    with progress_bars(quiet=not _is_first()) as on_bar:
        yield None if on_bar is None else _shown_on(on_bar)


def _shown_on(on_bar: OnBar) -> Callable[[Any], None]:
    def show(report: Any) -> None:
        loss = report.numbers["loss"]
        on_bar("steps", report.step, report.num_steps, label=f"loss {loss:.4g}")

    return show


def _from_checkpoint(run: Any, initial: str | None) -> Any:
    """Return a recipe that starts from `initial` in place of its own checkpoint."""
    from dataclasses import replace

    return run if initial is None else replace(run, checkpoint=initial)


def _tell(checkpoint: Path) -> None:
    _say(f"generate with: swifti2v generate IMAGE --model {checkpoint}")


def _say(line: str) -> None:
    """Print a line, once for all processes."""
    if _is_first():
        typer.echo(line)


def _is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"
