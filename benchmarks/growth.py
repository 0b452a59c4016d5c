"""How time and memory grow with the length of a clip of 2560x1408: by segments, and with the whole sequence at once.

Command: ``python -m benchmarks.growth --picture docs/images/growth.png``.
Counts over assumed rates of a card (`swifti2v/memory/devices.py`): predictions, not measurements. Nothing is loaded.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.full_size import BF16_TFLOP_PER_SECOND
from benchmarks.results import add_result_arguments, markdown_table, number, say, settings_of, write_results
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.memory.amounts import GIB
from swifti2v.memory.budget import WAN22, plan_run, stored_bytes
from swifti2v.memory.devices import DEVICES, device_rates
from swifti2v.memory.light_cost import with_light_decoder
from swifti2v.memory.plan import plan_memory
from swifti2v.memory.run_settings import RunSettings
from swifti2v.memory.ways import resident_ways, stage_two_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swifti2v.memory.devices import DeviceRates

SIZE = Size(2560, 1408)
FRAMES = (81, 161, 321, 641, 1281)
BUDGET_BYTES = 24 * GIB
LIGHT = with_light_decoder(WAN22)


@dataclass(frozen=True)
class GrowthRow:
    """One length: seconds of runs with all weights resident, of Stage II alone, and GiB at the peak."""

    num_frames: int
    seconds: float
    light_seconds: float
    stage_two_seconds: float
    whole_stage_two_seconds: float
    capped_gib: float
    whole_stage_two_gib: float


@dataclass(frozen=True)
class PhaseRow:
    """One phase of 81 frames: its work, the least that it reads (weights, once a forward pass), its seconds."""

    name: str
    tflop: float
    weight_gb: float
    seconds: float
    roofline_share: float


def growth_row(num_frames: int, rates: DeviceRates) -> GrowthRow:
    """Count one length. The whole sequence is one segment without neighbors."""
    settings = RunSettings(SIZE, num_frames)
    whole = RunSettings(SIZE, num_frames, segment_size=num_frames, neighbors_before=0)
    network = WAN22.stage_two
    tokens = network.num_tokens(*CodecGeometry().latent_shape(SIZE, num_frames))
    return GrowthRow(
        num_frames=num_frames,
        seconds=plan_memory(WAN22, settings, rates, budget_bytes=None).seconds,
        light_seconds=plan_memory(LIGHT, settings, rates, budget_bytes=None).seconds,
        stage_two_seconds=stage_two_seconds(WAN22, settings, rates)[0],
        whole_stage_two_seconds=stage_two_seconds(WAN22, whole, rates)[0],
        capped_gib=plan_memory(WAN22, settings, rates, budget_bytes=BUDGET_BYTES).peak_bytes / GIB,
        whole_stage_two_gib=(stored_bytes(network, "bfloat16") + network.activation_bytes(tokens)) / GIB,
    )


def phase_rows(rates: DeviceRates, peak_tflop_per_second: float, num_frames: int = 81) -> list[PhaseRow]:
    """Return the phases of a run, and the light decoder in the place of the exact one."""
    settings = RunSettings(SIZE, num_frames)
    ways = {way.phase: way.seconds for way in resident_ways(WAN22, settings, rates, "bfloat16")}
    phases = {phase.name: phase for phase in plan_run(WAN22, settings).phases}
    phases["light decode"] = plan_run(LIGHT, settings).phases[-1]
    rows = []
    for name, phase in phases.items():
        coding = phase.tflop / rates.convolution_tflop_per_second
        seconds = stage_two_seconds(WAN22, settings, rates)[0] if name == "stage two" else ways.get(name, coding)
        read = max(phase.num_forwards, CodecGeometry().latent_frames(num_frames) if not phase.num_forwards else 0)
        share = phase.tflop / seconds / peak_tflop_per_second
        rows.append(PhaseRow(name, phase.tflop, read * phase.weight_bytes / 1e9, seconds, share))
    return rows


def growth_table(rows: Sequence[GrowthRow]) -> str:
    """Return the Markdown table of lengths."""
    header = (
        "frames",
        "run, s",
        "light decoder, s",
        "Stage II, s",
        "whole sequence, s",
        "plan for 24 GiB",
        "whole, GiB",
    )
    return markdown_table(
        header,
        [(str(row.num_frames), *(number(value, 1) for value in list(asdict(row).values())[1:])) for row in rows],
    )


def phase_table(rows: Sequence[PhaseRow]) -> str:
    """Return the Markdown table of phases."""
    header = ("phase", "TFLOP", "weights read, GB", "FLOP a byte", "s", "of roofline")
    return markdown_table(
        header,
        [
            (
                row.name,
                number(row.tflop, 1),
                number(row.weight_gb, 1),
                number(1000 * row.tflop / row.weight_gb, 0),
                number(row.seconds),
                f"{row.roofline_share:.0%}",
            )
            for row in rows
        ],
    )


def draw(rows: Sequence[GrowthRow], card: str, path: Path) -> None:
    """Draw time and memory over the length, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    time, memory = figure.subplots(1, 2)
    frames = [row.num_frames for row in rows]
    ours, light, other = "#2f6fde", "#1a9e8f", "#d1495b"
    time.plot(
        frames, [row.whole_stage_two_seconds for row in rows], "s--", color=other, label="Stage II, whole sequence"
    )
    time.plot(frames, [row.seconds for row in rows], "o-", color=ours, label="whole run by segments")
    time.plot(frames, [row.light_seconds for row in rows], "o-", color=light, label="the same, light decoder")
    time.plot(frames, [row.stage_two_seconds for row in rows], "o--", color=ours, label="Stage II by segments")
    time.set_ylabel(f"seconds, predicted for {card}")
    memory.plot(frames, [row.whole_stage_two_gib for row in rows], "s--", color=other, label="Stage II, whole sequence")
    memory.plot(frames, [row.capped_gib for row in rows], "o-", color=ours, label="whole run, planned for 24 GiB")
    memory.set_ylabel("GiB of the device at the peak, counted")
    memory.set_ylim(8, 200)
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(frames, [str(count) for count in frames])
        axes.set_xlabel("frames of 2560x1408")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the command line, count, print, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", help=f"card whose seconds are predicted: {', '.join(DEVICES)}")
    parser.add_argument("--picture", type=Path, help="PNG of the curves; default: none is drawn")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    rates = device_rates(arguments.gpu)
    peak = next(rate for card, rate in BF16_TFLOP_PER_SECOND.items() if card.replace(" ", "").lower() == rates.name)
    rows = [growth_row(num_frames, rates) for num_frames in FRAMES]
    phases = phase_rows(rates, peak)
    print(growth_table(rows), phase_table(phases), sep="\n\n")
    if arguments.picture is not None:
        draw(rows, arguments.gpu.upper(), arguments.picture)
    content = {"rows": [asdict(row) for row in rows], "phases": [asdict(row) for row in phases]}
    say(f"written to {write_results('growth', {'settings': settings_of(arguments)} | content, arguments.output)}")


if __name__ == "__main__":
    main()
