"""`swifti2v plan`: what a run would cost, printed without loading anything."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from swifti2v.errors import CheckpointError, InvalidInputError
from swifti2v.geometry import Size
from swifti2v.memory.amounts import format_bytes, parse_bytes
from swifti2v.memory.devices import DEVICES, device_rates
from swifti2v.memory.run_settings import RunSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.memory.budget import PipelineDimensions, RunPlan
    from swifti2v.memory.plan import MemoryPlan

EMBEDDED_MODELS = ("mini",)


def plan(  # noqa: PLR0913 - typer makes an option of each parameter
    *,
    train: Annotated[Path | None, typer.Option(help="Plan a training instead: a recipe of `swifti2v train`.")] = None,
    model: Annotated[str, typer.Option(help="wan2.2, mini, or a checkpoint folder.")] = "wan2.2",
    size: Annotated[str, typer.Option(help="Output size, WIDTHxHEIGHT.")] = "2560x1408",
    frames: Annotated[int, typer.Option(help="Pixel frames, 4k+1.")] = 81,
    steps: Annotated[int | None, typer.Option(help="Steps of Stage II; default: the checkpoint's.")] = None,
    stage_one_steps: Annotated[int, typer.Option(help="Steps of Stage I.")] = RunSettings.stage_one_steps,
    stage_one_guidance: Annotated[
        float, typer.Option(help="Guidance scale of Stage I; above 1 every step takes two passes.")
    ] = RunSettings.stage_one_guidance_scale,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale of Stage II; above 1 every step takes two passes.")
    ] = RunSettings.guidance_scale,
    segment_size: Annotated[int, typer.Option(help="Latent frames that a segment makes.")] = RunSettings.segment_size,
    neighbors_before: Annotated[
        int, typer.Option(help="Finished latent frames that a segment sees.")
    ] = RunSettings.neighbors_before,
    neighbors_after: Annotated[
        int, typer.Option(help="Unrefined latent frames that a segment sees.")
    ] = RunSettings.neighbors_after,
    keep_context: Annotated[
        bool, typer.Option("--keep-context", help="Run a segment's context in its first step only.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Storage of weights: float32, bfloat16, float8, int8 or nf4.")
    ] = "bfloat16",
    quantization: Annotated[
        Literal["none", "float8", "int8"], typer.Option(help="Products of the transformers' blocks, compiled.")
    ] = "none",
    memory: Annotated[
        str | None, typer.Option(help="Plan for so much device memory: auto (no limit), 24GiB, 16GiB, ...")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="Host memory for weights and parked features.")] = None,
    decoder: Annotated[
        Literal["exact", "light"], typer.Option(help="The checkpoint's decoder, or TAEHV's for the same latents.")
    ] = "exact",
    stage: Annotated[
        Literal["one", "two", "both"], typer.Option(help="With --memory: plan for a worker of one stage alone.")
    ] = "both",
    gpu: Annotated[str, typer.Option(help=f"Card whose seconds are predicted: {', '.join(DEVICES)}.")] = "rtx4090",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Print tokens, TFLOP and bytes of a run without loading anything, and how it fits into --memory."""
    if train is not None:
        from swifti2v.cli.plan_training import print_training_plan

        print_training_plan(train, size=Size.parse(size), num_frames=frames, as_json=as_json)
        return
    from swifti2v.memory.budget import BITS_PER_WEIGHT, plan_run
    from swifti2v.memory.light_cost import with_light_decoder

    planned = planned_model(model)
    dimensions = planned.dimensions if decoder == "exact" else with_light_decoder(planned.dimensions)
    dimensions = replace(dimensions, products=quantization)
    settings = RunSettings(
        size=Size.parse(size),
        num_frames=frames,
        stage_one_steps=stage_one_steps,
        stage_one_guidance_scale=stage_one_guidance,
        num_inference_steps=planned.num_inference_steps if steps is None else steps,
        guidance_scale=guidance,
        segment_size=segment_size,
        neighbors_before=neighbors_before,
        neighbors_after=neighbors_after,
        keep_context=keep_context,
    )
    weight_dtype = next((known for known in BITS_PER_WEIGHT if known == dtype), None)
    if weight_dtype is None:
        msg = f"dtype {dtype!r} is not known; use one of {', '.join(BITS_PER_WEIGHT)}"
        raise InvalidInputError(msg)
    run = plan_run(dimensions, settings, weight_dtype=weight_dtype)
    held = dimensions
    if stage != "both":
        held = replace(dimensions, stages=("stage_one",) if stage == "one" else ("stage_two",))
    fitted = _fitted(held, settings, gpu, memory, host_memory) if memory is not None else ()
    if as_json:
        mapping = plan_as_mapping(model, settings, run) | {"quantization": quantization}
        mapping |= memory_as_mapping(gpu, fitted)
        typer.echo(json.dumps(mapping, indent=2))
        return
    title = f"{model}, {settings.size}, {settings.num_frames} frames, {weight_dtype} weights"
    title += "" if quantization == "none" else f", {quantization} products"
    console = Console()
    console.print(plan_table(title, run))
    console.print(
        f"memory: {_amount(run.peak_bytes)} with one network at a time on the device, "
        f"{_amount(run.resident_bytes)} with all of them ({_amount(run.weight_bytes)} of weights)",
        highlight=False,
    )
    for plan_of_memory in fitted:
        _print_memory(console, gpu, plan_of_memory)


def _fitted(
    dimensions: PipelineDimensions, settings: RunSettings, gpu: str, memory: str | None, host_memory: str | None
) -> tuple[MemoryPlan, ...]:
    from swifti2v.memory.plan import plan_stages

    budget = None if memory in {None, "auto"} else parse_bytes(str(memory))
    host = None if host_memory is None else parse_bytes(host_memory)
    return plan_stages(dimensions, settings, device_rates(gpu), budget_bytes=budget, host_bytes=host)


def _print_memory(console: Console, gpu: str, fitted: MemoryPlan) -> None:
    title = f"plan for {_amount(fitted.budget_bytes)}" if fitted.budget_bytes is not None else "plan, no limit"
    table = Table(
        title=title, caption=f"GiB; seconds are predicted for {gpu}, not measured", box=SIMPLE_HEAD, padding=0
    )
    table.add_column("phase", no_wrap=True)
    for name in ("weights", "working", "peak", "moved", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("placement", no_wrap=True)
    for way in fitted.ways:
        sizes = map(gibibytes, (way.weight_bytes, way.working_bytes, way.peak_bytes, way.transfer_bytes))
        table.add_row(way.phase, *sizes, f"{way.seconds:,.1f}", way.placement)
    console.print(table)
    codec = [f"{way.codec}; " for way in fitted.ways if way.codec is not None]
    lines = (
        f"{''.join(codec)}{fitted.weight_dtype} weights",
        f"peak {_amount(fitted.peak_bytes)} on the device, {_amount(fitted.host_bytes)} in host memory, "
        f"{fitted.seconds:,.0f} s predicted",
        *(f"given up - {note}" for note in fitted.given_up),
    )
    for line in lines:
        console.print(line, highlight=False)


def memory_as_mapping(gpu: str, fitted: Sequence[MemoryPlan]) -> dict[str, Any]:
    """Return what ``--json`` prints of memory plans, more than one where stages are loaded in turn; nothing of none."""
    if not fitted:
        return {}
    totals = {
        "gpu": gpu,
        "budget_bytes": fitted[0].budget_bytes,
        "weight_dtypes": [each.weight_dtype for each in fitted],
        "phases": [asdict(way) | {"peak_bytes": way.peak_bytes} for each in fitted for way in each.ways],
        "peak_bytes": max(each.peak_bytes for each in fitted),
        "host_bytes": max(each.host_bytes for each in fitted),
        "predicted_seconds": sum(each.seconds for each in fitted),
        "given_up": [note for each in fitted for note in each.given_up],
    }
    return {"memory": totals}


class PlannedModel(NamedTuple):
    """The networks of a model, and how many steps its Stage II takes by default."""

    dimensions: PipelineDimensions
    num_inference_steps: int


def planned_model(model: str) -> PlannedModel:
    """Return what there is to know of a named model or a checkpoint folder.

    Raises:
        InvalidInputError: `model` is neither a known name nor a folder.
        CheckpointError: the index or a `config.json` is missing or damaged, or a part lies in a hub repository.
    """
    if model == "wan2.2":
        from swifti2v.memory.budget import WAN22

        return PlannedModel(WAN22, RunSettings.num_inference_steps)
    if model in EMBEDDED_MODELS:
        with as_file(files("swifti2v") / "presets" / model) as folder:
            return _read_checkpoint(folder)
    if Path(model).is_dir():
        return _read_checkpoint(Path(model))
    msg = f"model {model!r} is not known; use wan2.2, {', '.join(EMBEDDED_MODELS)}, or the path of a checkpoint folder"
    raise InvalidInputError(msg)


def _read_checkpoint(folder: Path) -> PlannedModel:
    from swifti2v.memory.checkpoint_dimensions import read_pipeline_dimensions
    from swifti2v.wan.checkpoint_index import INDEX_NAME, read_index

    index = read_index(folder / INDEX_NAME)
    stage_two = _local(folder, index.stage_two.source)
    dimensions = read_pipeline_dimensions(
        _local(folder, index.stage_one.source),
        stage_two / index.stage_two.transformer_subfolder,
        stage_two / index.stage_two.vae_subfolder,
        text_tokens=index.stage_one.max_sequence_length,
        reference_factor=index.stage_one.reference_reduction,
        max_reference_area=index.stage_one.max_area,
        window_frames=index.stage_one.window_frames,
    )
    return PlannedModel(dimensions, index.stage_two.num_inference_steps)


def _local(folder: Path, source: str) -> Path:
    from swifti2v.wan.checkpoint_index import is_hub_id

    if is_hub_id(source):
        msg = f"{source} is a hub repository, and plan loads nothing; give a checkpoint whose parts are folders"
        raise CheckpointError(msg)
    return folder / source


def plan_as_mapping(model: str, settings: RunSettings, run: RunPlan) -> dict[str, Any]:
    """Return what ``--json`` prints: the settings, each phase, and the totals."""
    return {
        "model": model,
        **asdict(settings),
        "size": str(settings.size),
        "phases": [asdict(phase) | {"peak_bytes": phase.peak_bytes} for phase in run.phases],
        "tflop": run.tflop,
        "weight_bytes": run.weight_bytes,
        "peak_bytes": run.peak_bytes,
        "resident_bytes": run.resident_bytes,
    }


def plan_table(title: str, run: RunPlan) -> Table:
    """Return the table of a plan: a row a phase, and the sum of TFLOP with the largest peak below."""
    table = Table(title=title, caption="weights, working and peak in GiB", show_footer=True, box=SIMPLE_HEAD, padding=0)
    table.add_column("phase", "total", no_wrap=True)
    table.add_column("tokens", justify="right")
    table.add_column("passes", justify="right")
    table.add_column("TFLOP", f"{run.tflop:,.1f}", justify="right", no_wrap=True)
    table.add_column("share", justify="right")
    table.add_column("weights", justify="right")
    table.add_column("working", justify="right")
    table.add_column("peak", gibibytes(run.peak_bytes), justify="right")
    for phase in run.phases:
        table.add_row(
            phase.name,
            f"{phase.num_tokens:,}" if phase.num_tokens else "-",
            str(phase.num_forwards) if phase.num_forwards else "-",
            f"{phase.tflop:,.1f}",
            f"{phase.tflop / run.tflop:.0%}",
            gibibytes(phase.weight_bytes),
            gibibytes(phase.activation_bytes),
            gibibytes(phase.peak_bytes),
        )
    return table


def gibibytes(num_bytes: int) -> str:
    """Return what stands in a column of GiB, with two decimals."""
    return f"{num_bytes / 2**30:,.2f}"


def _amount(num_bytes: int) -> str:
    return format_bytes(num_bytes, decimals=2)
