"""Whether a network that met its own output in training makes better use of its neighbors over a long video.

Command: ``python -m benchmarks.own_context --clips DIR --runs RUNS [--seeds 3] [--ways NAME ...] [--document FILE]``.
Networks of `benchmarks.context_study` (trained now, unless ``RUNS`` holds them), on clips that training never saw: 161
frames, and 321, the same to and fro. Each way is judged once and its numbers are kept in ``RUNS``, so that a stopped
run goes on, and several processes may share the work, each with its ``--ways``. Of all measures only those that say
whether segments hold together: PSNR, its decay, high frequencies, seams and drift (`benchmarks.baselines`).
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.ablation import documented, with_network
from benchmarks.baselines import Baseline, made_frames
from benchmarks.context_study import (
    BIDIRECTIONAL,
    END_SHARE,
    FROZEN,
    LONG_COLUMNS,
    LONG_FRAMES,
    OWN_CONTEXT,
    OWN_FROZEN,
    Network,
    settings_for,
    small_clips,
    to_and_fro,
    trained,
)
from benchmarks.fidelity import known_clip
from benchmarks.results import add_result_arguments, markdown_table, mean, say, settings_of, write_results
from swifti2v.evaluation.drift import drift, look
from swifti2v.evaluation.metrics import high_frequency_ratio, psnr
from swifti2v.evaluation.motion import consecutive_pairs
from swifti2v.evaluation.seams import frame_change, seam_ratio_of_changes
from swifti2v.pipelines.two_stage import TwoStagePipeline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.fidelity import Array
    from swifti2v.pipelines.loading import Parts

BEGIN, END = "<!-- own context: begin -->", "<!-- own context: end -->"
LENGTHS = (LONG_FRAMES, 2 * LONG_FRAMES - 1)
COLUMNS = {name: column for name, column in LONG_COLUMNS.items() if name != "drift_saturation"}


@dataclass(frozen=True)
class ContextWay:
    """A network and what its segments see."""

    name: str
    label: str
    network: Network
    settings: Mapping[str, Any] = field(default_factory=dict)


INDEPENDENT = {"neighbors_before": 0}
WAYS = (
    ContextWay("truth", "trained on the truth: neighbors", BIDIRECTIONAL),
    ContextWay("truth_independent", "the same network: independent segments", BIDIRECTIONAL, INDEPENDENT),
    ContextWay("truth_frozen", "trained on the truth, frozen: neighbors", FROZEN),
    ContextWay("own", "trained on its own output: neighbors", OWN_CONTEXT),
    ContextWay("own_independent", "the same network: independent segments", OWN_CONTEXT, INDEPENDENT),
    ContextWay("own_frozen", "trained on its own output, frozen: neighbors", OWN_FROZEN),
)


def holding_together(frames: Sequence[Array], truth: Array, *, segment_size: int) -> dict[str, float]:
    """Return the measures of `COLUMNS` of frames uint8 [H, W, 3], the first one given, whose truth is [F, H, W, 3]."""
    made = list(zip(frames[1:], truth[1:], strict=True))
    curve = [psnr(frame, true) for frame, true in made]
    count = round(END_SHARE * len(curve))
    seams = seam_ratio_of_changes(map(frame_change, consecutive_pairs(frames)), segment_size=segment_size)
    return {
        "psnr": mean(curve),
        "decay": mean(curve[:count]) - mean(curve[-count:]),
        "high_frequency_ratio": mean(high_frequency_ratio(frame, true) for frame, true in made),
        "seam_luma": seams.luma,
        "seam_detail": seams.detail,
        "drift_sharpness": drift("sharpness", [look(frame).sharpness for frame in frames]),
    }


def judged_way(
    way: ContextWay, seed: int, num_frames: int, *, parts: Parts, clips: Path, runs: Path, max_clips: int | None
) -> dict[str, dict[str, float]]:
    """Return ``{clip: measures}`` of a network of a way; judged now, unless it was before."""
    kept = runs / f"{way.network.name}_{seed}" / f"{way.name}_{num_frames}.json"
    if kept.exists():
        found: dict[str, dict[str, float]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    own = with_network(parts, trained(way.network, seed, clips=clips, runs=runs))
    settings = settings_for(own, num_frames)
    found = {}
    for name, frames in itertools.islice(small_clips(clips, LONG_FRAMES), max_clips):
        truth = frames if num_frames == LONG_FRAMES else to_and_fro(frames)
        clip = known_clip(truth, settings)
        row = Baseline(way.name, way.label, "stage_two", way.settings)
        with torch.no_grad():
            made, _ = made_frames(row, clip, own, settings, None)
        found[name] = holding_together(made, truth, segment_size=settings.segment_size)
        say(f"{way.name} {seed}, {num_frames} frames, {name}: {found[name]['psnr']:.2f} dB")
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def table(results: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]]) -> str:
    """Return the Markdown table of ``{way: [{clip: measures} for each seed]}``: mean over the seeds and range."""
    rows = []
    for way in WAYS:
        seeds = results.get(way.name, ())
        if seeds:
            values = {key: [mean(clip[key] for clip in clips.values()) for clips in seeds] for key in COLUMNS}
            cells = [_with_range(values[key], digits) for key, (_, digits) in COLUMNS.items()]
            rows.append((way.label, str(len(seeds)), *cells))
    return markdown_table(("context", "networks", *(heading for heading, _ in COLUMNS.values())), rows)


def main() -> None:
    """Read the command line, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with INDEX.csv: to train on and held back")
    parser.add_argument("--runs", type=Path, required=True, help="where the networks are, or will be")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the networks of each way")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], help="only these")
    parser.add_argument("--max-clips", type=int, help="only the first clips")
    parser.add_argument("--document", type=Path, help="Markdown file whose part between the marks is replaced")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    parts = TwoStagePipeline.from_pretrained("mini").parts
    place = {"clips": arguments.clips, "runs": arguments.runs, "max_clips": arguments.max_clips}
    chosen = [way for way in WAYS if arguments.ways is None or way.name in arguments.ways]
    results = {
        length: {
            way.name: [judged_way(way, seed, length, parts=parts, **place) for seed in arguments.seeds]
            for way in chosen
        }
        for length in LENGTHS
    }
    sections = [f"{length} frames:\n\n{table(found)}" for length, found in results.items()]
    print("\n\n".join(sections))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        written = documented(text, "\n\n".join(sections), begin=BEGIN, end=END)
        arguments.document.write_text(written, encoding="utf-8")
    content = {"settings": settings_of(arguments), "results": results}
    say(f"written to {write_results('own_context', content, arguments.output)}")


def _with_range(values: Sequence[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
