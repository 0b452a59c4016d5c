"""`swifti2v plan`: whether a run fits a card, and what it takes; nothing is loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size, nearest_size
from swifti2v.memory.amounts import GIB, format_bytes, parse_bytes
from swifti2v.memory.devices import DISK_BYTES_PER_SECOND, device_rates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.memory.devices import DeviceRates
    from swifti2v.memory.networks import PipelineNetworks
    from swifti2v.memory.plan import MemoryPlan
    from swifti2v.settings import GenerationSettings, Storage

EXIT_DOES_NOT_FIT = 2
TASKS = {
    "text encoding": ("text encoding",),
    "stage one": ("stage one",),
    "refinement": ("reference encode", "stage two", "decode"),
}


def plan(  # noqa: PLR0913 - typer makes an option of each parameter
    *,
    train: Annotated[Path | None, typer.Option(help="Plan a training instead: a recipe of `swifti2v train`.")] = None,
    model: Annotated[str, typer.Option(help="wan2.2, mini, or a checkpoint folder.")] = "wan2.2",
    size: Annotated[str | None, typer.Option(help="Output size, WIDTHxHEIGHT.")] = None,
    frames: Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Stage II.")] = None,
    stage_one_steps: Annotated[int | None, typer.Option(help="Steps of Stage I.")] = None,
    stage_one_guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of Stage I; above 1 every step takes two passes.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of Stage II; above 1 every step takes two passes.")
    ] = None,
    segment_size: Annotated[int | None, typer.Option(help="Latent frames that a segment makes.")] = None,
    neighbors_before: Annotated[int | None, typer.Option(help="Finished latent frames that a segment sees.")] = None,
    neighbors_after: Annotated[int | None, typer.Option(help="Unrefined latent frames that a segment sees.")] = None,
    keep_context: Annotated[
        bool, typer.Option("--keep-context", help="Run a segment's context in its first step only.")
    ] = False,
    gpu: Annotated[
        str, typer.Option(help="The card, for instance 4090 or 'RTX 3060 12GB': its memory, and predicted seconds.")
    ] = "RTX 4090",
    memory: Annotated[
        str | None, typer.Option(help="GPU memory to plan for: 12 (GiB), 24GB, ..., or auto for no limit.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="RAM to plan for; default: no limit.")] = None,
    dtype: Annotated[
        Literal["bfloat16", "float8", "nf4", "int8"] | None,
        typer.Option(help="How weights are stored; default: as exactly as the RAM allows. int8: as --quantization."),
    ] = None,
    quantization: Annotated[
        Literal["none", "float8", "int8"], typer.Option(help="Quantized matmul in the blocks of the transformers.")
    ] = "none",
    decoder: Annotated[
        Literal["exact", "light"], typer.Option(help="The checkpoint's decoder, or TAEHV's for the same latents.")
    ] = "exact",
    stage: Annotated[Literal["one", "two", "both"], typer.Option(help="The stages to load, for a worker.")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether a run fits a card, how long it takes there, and what each phase needs; nothing is loaded."""
    if train is not None:
        from swifti2v.cli.plan_training import print_training_plan

        print_training_plan(train, size=Size.parse(size or "2560x1408"), num_frames=frames or 81, as_json=as_json)
        return
    from swifti2v.memory.models import planned_model

    choices = {
        "size": size,
        "num_frames": frames,
        "num_inference_steps": steps,
        "stage_one_steps": stage_one_steps,
        "stage_one_guidance_scale": stage_one_guidance,
        "guidance_scale": guidance,
        "segment_size": segment_size,
        "neighbors_before": neighbors_before,
        "neighbors_after": neighbors_after,
        "keep_context": keep_context or None,
    }
    planned, card = planned_model(model), device_rates(gpu)
    networks = planned.networks if decoder == "exact" else planned.networks.with_light_decoder()
    networks = replace(networks, quantization="int8" if dtype == "int8" else quantization)
    if stage != "both":
        networks = replace(networks, stages=("stage_one",) if stage == "one" else ("stage_two",))
    if not networks.planned:
        msg = f"Stage I of {model} takes some megabytes of RAM and no GPU memory; plan --stage two, or both"
        raise InvalidInputError(msg, param="stage", value=stage)
    asked = _Asked(
        networks,
        planned.settings.settled(choices),
        card,
        budget_bytes=None if memory == "auto" else card.memory_bytes if memory is None else parse_bytes(memory),
        host_bytes=None if host_memory is None else parse_bytes(host_memory),
        storage=None if dtype == "int8" else dtype,
    )
    try:
        plans = asked.plans()
    except MemoryBudgetError as error:
        verdict = f"Does not fit: {error}; try {', or '.join(asked.alternatives())}"
        typer.echo(json.dumps({"fits": False, "verdict": verdict}, indent=2) if as_json else verdict)
        raise typer.Exit(EXIT_DOES_NOT_FIT) from error
    if as_json:
        typer.echo(json.dumps({"model": model} | as_mapping(asked.settings, card, plans), indent=2))
        return
    console = Console(highlight=False)
    console.print(verdict_of(card, plans), soft_wrap=True)
    console.print(plan_table(model, asked.settings, card, plans))
    for each in plans:
        for line in _remarks(each):
            console.print(line)


@dataclass(frozen=True)
class _Asked:
    """What is to be planned."""

    networks: PipelineNetworks
    settings: GenerationSettings
    card: DeviceRates
    budget_bytes: int | None
    host_bytes: int | None
    storage: Storage | None

    def plans(self) -> tuple[MemoryPlan, ...]:
        """Return the plan, or one for each stage; raise `MemoryBudgetError` if nothing fits."""
        from swifti2v.memory.plan import plan_stages
        from swifti2v.settings import STORAGES

        return plan_stages(
            self.networks,
            self.settings,
            self.card,
            budget_bytes=self.budget_bytes,
            host_bytes=self.host_bytes,
            storages=STORAGES if self.storage is None else (self.storage,),
        )

    def alternatives(self) -> list[str]:
        """Return options with which it fits: half the size, another decoder; else what to change."""
        size = self.settings.size
        half = nearest_size(Size(size.width // 2, size.height // 2), 32)
        changes = {f"--size {half}": replace(self, settings=replace(self.settings, size=half))}
        if self.networks.light_decoder is None and self.networks.stage_two_codec.is_wan_codec:
            changes["--decoder light"] = replace(self, networks=self.networks.with_light_decoder())
        found = []
        for words, change in changes.items():
            with suppress(MemoryBudgetError):
                change.plans()
                found.append(words)
        return found or ["a card with more memory (--gpu)" if self.host_bytes is None else "more --host-memory"]


def verdict_of(card: DeviceRates, plans: tuple[MemoryPlan, ...]) -> str:
    """Return one line: what the run takes, and how long."""
    article = "an" if card.name[0] in "RALH" else "a"
    return (
        f"Fits: {format_bytes(max(each.peak_bytes for each in plans))} of GPU memory and "
        f"{format_bytes(max(each.host_bytes for each in plans))} of RAM; "
        f"about {_duration(sum(each.seconds + _loading_seconds(each) for each in plans))} on {article} {card.name}"
    )


def as_mapping(settings: GenerationSettings, card: DeviceRates, plans: tuple[MemoryPlan, ...]) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    return {
        "fits": True,
        "verdict": verdict_of(card, plans),
        **asdict(settings),
        "size": str(settings.size),
        "gpu": card.name,
        "budget_bytes": plans[0].budget_bytes,
        "storage": [each.storage for each in plans],
        "tasks": [
            {"name": task.name, "num_tokens": task.num_tokens, "num_forwards": task.num_forwards}
            | {"tflop": task.work.tflop, "seconds": seconds}
            for each in plans
            for task, seconds in zip(each.tasks, each.task_seconds, strict=True)
        ],
        "phases": [asdict(way) | {"peak_bytes": way.peak_bytes} for each in plans for way in each.ways],
        "tflop": sum(task.work.tflop for each in plans for task in each.tasks),
        "weight_bytes": sum(each.weight_bytes for each in plans),
        "peak_bytes": max(each.peak_bytes for each in plans),
        "host_bytes": max(each.host_bytes for each in plans),
        "loading_seconds": sum(map(_loading_seconds, plans)),
        "seconds": sum(each.seconds + _loading_seconds(each) for each in plans),
        "given_up": [note for each in plans for note in each.given_up],
    }


def plan_table(model: str, settings: GenerationSettings, card: DeviceRates, plans: tuple[MemoryPlan, ...]) -> Table:
    """Return the table: loading and the phases of each plan, and their totals."""
    limit = plans[0].budget_bytes
    budget = "no limit of GPU memory" if limit is None else f"{format_bytes(limit)} of GPU memory"
    tasks = [task for each in plans for task in each.tasks]
    footer = {
        "TFLOP": f"{sum(task.work.tflop for task in tasks):,.1f}",
        "RAM": gibibytes(max(each.host_bytes for each in plans)),
        "GPU": gibibytes(max(each.peak_bytes for each in plans)),
        "seconds": f"{sum(each.seconds + _loading_seconds(each) for each in plans):,.1f}",
    }
    table = Table(
        title=f"{model}, {settings.size}, {settings.num_frames} frames, {budget}",
        caption=f"RAM and GPU in GiB; seconds are predicted for {card.name}, not measured",
        show_footer=True,
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("phase", "total", no_wrap=True)
    for name in ("tokens", "passes", "TFLOP", "RAM", "GPU", "seconds"):
        table.add_column(name, footer.get(name, ""), justify="right", no_wrap=True)
    table.add_column("weights", no_wrap=True)
    for each in plans:
        for row in _rows(each):
            table.add_row(*row)
    return table


def _rows(plan: MemoryPlan) -> Iterator[tuple[str, ...]]:
    yield (
        "loading",
        "",
        "",
        "",
        gibibytes(plan.weight_bytes),
        "",
        f"{_loading_seconds(plan):,.1f}",
        f"in {plan.storage}",
    )
    tasks = {task.name: task for task in plan.tasks}
    for way in plan.ways:
        done = [tasks[name] for name in TASKS[way.phase]]
        largest = max(done, key=lambda task: task.num_tokens)
        yield (
            way.phase,
            f"{largest.num_tokens:,}",
            str(largest.num_forwards),
            f"{sum(task.work.tflop for task in done):,.1f}",
            gibibytes(way.offloaded_bytes) if way.offloaded_bytes else "",
            gibibytes(plan.peak_bytes_of(way)),
            f"{way.seconds:,.1f}",
            way.placement,
        )
        for task in done if len(done) > 1 else ():
            yield f"  {task.name}", "", "", f"{task.work.tflop:,.1f}", "", "", "", ""


def _remarks(plan: MemoryPlan) -> Iterator[str]:
    if any(way.codec is not None for way in plan.ways):
        beside = ", decoding beside the next segment" if plan.overlaps_decode else ""
        yield f"Stage II: {plan.codec}{beside}"
    for note in plan.given_up:
        yield f"less memory: {note}"


def _loading_seconds(plan: MemoryPlan) -> float:
    return plan.read_bytes / DISK_BYTES_PER_SECOND


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def gibibytes(num_bytes: int) -> str:
    """Return what stands in a column of GiB, with two decimals."""
    return f"{num_bytes / GIB:,.2f}"
