"""What context is worth where it has to carry the detail: networks trained in different ways, judged on the same clips.

Command: ``python -m benchmarks.context_study --clips DIR --runs RUNS [--seeds 3] [--document docs/ablation.md]``.
Trains the networks of `NETWORKS` by ``recipes/mini/context.yaml`` (one that ``RUNS`` holds finished is taken as it is,
one that was stopped goes on), then judges them on clips that training never saw:

- short, 33 frames: every row changes one thing of the first network's own way;
- seeds: the first way with both kinds of context, over the seeds: what differs less than they do is not shown;
- artifacts: trained on references with or without the artifacts of Stage I's codec (stage-transition, as far as `mini`
  can show it), each fed with both, over the seeds;
- long, 161 frames, and 321 (the same to and fro), over the seeds: errors have time to add up. Decay: PSNR of the first
  15% of the frames less that of the last 15%. What was judged is kept in ``RUNS``, so that several processes may share
  the work, each with its ``--ways``.

Clips: the held-back ones at a quarter of their size. Motion reference: the truth reduced four times more. Reference:
``replace``, the paper's: enlarged, its first frame the image. Measures are those of `benchmarks.baselines`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks import pictures
from benchmarks.ablation import FULL, VARIANTS, Variant, measured, plot, table, with_network
from benchmarks.baselines import Baseline, made_frames
from benchmarks.clips import held_back_clips, truth_frames
from benchmarks.fidelity import KnownClip, known_clip
from benchmarks.results import (
    add_result_arguments,
    markdown_table,
    mean,
    png_of,
    say,
    settings_of,
    write_between,
    write_results,
)
from swifti2v.config import load_yaml
from swifti2v.evaluation.drift import drift, look
from swifti2v.evaluation.metrics import high_frequency_ratio, psnr
from swifti2v.evaluation.motion import consecutive_pairs
from swifti2v.evaluation.seams import frame_change, seam_ratio
from swifti2v.geometry import Size
from swifti2v.mini.recipes import StageTwoRun, train_stage_two
from swifti2v.mini.reference_pairs import damaged
from swifti2v.pixels import from_uint8
from swifti2v.reference.replace import replace_first_frame
from swifti2v.reference.resample import reduce_frames
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.wan.checkpoints import resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.fidelity import Array, Numbers
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings
    from swifti2v.training.engine.loop import StepReport

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "mini" / "context.yaml"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- context: begin -->", "<!-- context: end -->"
SIZE = Size(320, 160)
SHRINK = 4
SHORT_FRAMES, LONG_FRAMES = 33, 161
END_SHARE = 0.15
SEED_COLUMNS = {
    "psnr": "PSNR (dB)",
    "high_frequency_ratio": "HF",
    "seam_luma": "seam, luma",
    "seam_detail": "seam, detail",
}


@dataclass(frozen=True)
class Network:
    """A way of training: what differs from the recipe."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    pairs: Mapping[str, Any] = field(default_factory=dict)


BIDIRECTIONAL = Network("bidirectional")
FROZEN = Network("frozen", model={"context_attention": "frozen"})
WITH_ARTIFACTS = Network("artifacts", pairs={"damaged_share": 1.0})
CLEAN_CONTEXT = Network("clean_context", model={"context_noise": 0.0})
OWN = {"own_context_share": 0.5, "own_context_segments": 2}
OWN_CONTEXT = Network("own_context", model=OWN)
OWN_FROZEN = Network("own_frozen", model={"context_attention": "frozen", **OWN})
SHORT_NETWORKS = (BIDIRECTIONAL, FROZEN, WITH_ARTIFACTS, CLEAN_CONTEXT)
NETWORKS = {each.name: each for each in (*SHORT_NETWORKS, OWN_CONTEXT, OWN_FROZEN)}

SHORT = (
    *(row for row in VARIANTS if row.uses_reference),
    Variant("kept", "4 steps, context kept", {"num_inference_steps": 4, "keep_context": True}),
    Variant(FROZEN.name, "trained with frozen context", network=FROZEN.name),
    Variant(CLEAN_CONTEXT.name, "trained without noise on the context", network=CLEAN_CONTEXT.name),
)
LONG = (
    FULL,
    Variant("compact", "compact positions", {"positions": "compact"}),
    Variant("no_neighbors", "independent segments", {"neighbors_before": 0}),
    Variant("no_anchor", "no anchor", {"anchor": False}),
    Variant(FROZEN.name, "trained with frozen context", network=FROZEN.name),
    Variant(CLEAN_CONTEXT.name, "trained without noise on the context", network=CLEAN_CONTEXT.name),
    Variant("own", "trained on its own output", network=OWN_CONTEXT.name),
    Variant("own_independent", "the same, independent segments", {"neighbors_before": 0}, network=OWN_CONTEXT.name),
    Variant("own_frozen", "trained on its own output, frozen", network=OWN_FROZEN.name),
)
LONG_COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "decay": ("decay (dB)", 2),
    "high_frequency_ratio": ("HF", 3),
    "seam_luma": ("seam, luma", 3),
    "seam_detail": ("seam, detail", 3),
    "drift_sharpness": ("drift, sharpness (%)", 2),
}
LENGTHS = (LONG_FRAMES, 2 * LONG_FRAMES - 1)


def trained(network: Network, seed: int, *, clips: Path, runs: Path) -> Path:
    """Return the folder of a network's weights; trained now, unless it is there."""
    output = runs / f"{network.name}_{seed}"
    recipe = load_yaml(StageTwoRun, RECIPE)
    model, pairs = replace(recipe.model, seed=seed, **network.model), replace(recipe.pairs, **network.pairs)
    recipe = replace(recipe, model=model, pairs=pairs)
    if not (output / "finished").exists():
        _copy_codec(output)
        # What is learned from does not change with the seed, and takes longer to make than to link.
        shared = runs / f"pairs_{pairs.damaged_share:g}.pt"
        own = output / "stage_two" / "pairs.pt"
        if shared.exists() and not own.exists():
            os.link(shared, own)

        def report(step: StepReport) -> None:
            if step.step % 100 == 0:
                say(f"{output.name}, step {step.step}: {step.numbers.get('gained', 0.0):.2f} dB gained")

        train_stage_two(recipe, index=clips / "INDEX.csv", output=output, on_step=report)
        if not shared.exists():
            os.link(own, shared)
        (output / "finished").touch()
    return output / "stage_two" / "transformer"


def small_clips(folder: Path, num_frames: int) -> Iterator[tuple[str, Array]]:
    """Yield name and frames uint8 [F, 160, 320, 3] of the held-back clips that are long enough."""
    large = Size(SIZE.width * SHRINK, SIZE.height * SHRINK)
    for item in held_back_clips(folder):
        frames = truth_frames(item.path, large, num_frames)
        if len(frames) == num_frames:
            yield item.path.stem, reduce_frames(frames, SHRINK)


def to_and_fro(frames: Array) -> Array:
    """Return the frames and then, without the last, the way back: 2F - 1 frames, all of them true."""
    return np.concatenate([frames, frames[-2::-1]])


def with_artifacts(clip: KnownClip) -> KnownClip:
    """Return the clip with a motion reference that JPEG has damaged."""
    motion = damaged(clip.motion)
    image = from_uint8(clip.truth[:1])[0, :, 0]
    return replace(clip, motion=motion, reference=list(replace_first_frame([torch.from_numpy(motion)], image)))


def settings_for(parts: Parts, num_frames: int) -> GenerationSettings:
    """Return the way of the first row: one step, three targets, the finished frame before them, the anchor."""
    options = {"size": SIZE, "num_frames": num_frames, "reference": "replace", "num_inference_steps": 1}
    return parts.defaults.settled(options)


def judge_short(networks: Mapping[str, Parts], clips: Path) -> dict[str, dict[str, Numbers]]:
    """Return ``{clip: {row: numbers}}`` of `SHORT`."""
    results: dict[str, dict[str, Numbers]] = {}
    settings = settings_for(networks[BIDIRECTIONAL.name], SHORT_FRAMES)
    for name, truth in small_clips(clips, SHORT_FRAMES):
        clip = known_clip(truth, settings)
        rows = [row for row in SHORT if (row.network or BIDIRECTIONAL.name) in networks]
        results[name] = {
            row.name: measured(row, clip, networks[row.network or BIDIRECTIONAL.name], settings, None) for row in rows
        }
        say(f"short, {name}: {results[name]['full']['psnr']:.2f} dB")
    return results


def judge_long(
    row: Variant, seed: int, num_frames: int, *, parts: Parts, clips: Path, runs: Path, max_clips: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return ``{clip: measures}`` of a network of a row of `LONG`; judged now, unless ``RUNS`` holds it."""
    network = NETWORKS[row.network or BIDIRECTIONAL.name]
    kept = runs / f"{network.name}_{seed}" / f"{row.name}_{num_frames}.json"
    if kept.exists():
        found: dict[str, dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    own = with_network(parts, trained(network, seed, clips=clips, runs=runs))
    settings = settings_for(own, num_frames)
    found = {}
    for name, frames in itertools.islice(small_clips(clips, LONG_FRAMES), max_clips):
        truth = frames if num_frames == LONG_FRAMES else to_and_fro(frames)
        clip = known_clip(truth, settings)
        with torch.no_grad():
            made, _ = made_frames(Baseline(row.name, row.label, "stage_two", row.settings), clip, own, settings, None)
        found[name] = long_numbers(made, truth, segment_size=settings.segment_size)
        say(f"{row.name} {seed}, {num_frames} frames, {name}: {found[name]['psnr']:.2f} dB")
    kept.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def long_numbers(frames: Sequence[Array], truth: Array, *, segment_size: int) -> dict[str, Any]:
    """Return the measures of `LONG_COLUMNS`, and PSNR by frame as ``curve``.

    Frames are uint8 [H, W, 3], the first one given, and their truth is [F, H, W, 3].
    """
    made = list(zip(frames[1:], truth[1:], strict=True))
    curve = [psnr(frame, true) for frame, true in made]
    count = round(END_SHARE * len(curve))
    seams = seam_ratio(map(frame_change, consecutive_pairs(frames)), segment_size=segment_size)
    return {
        "psnr": mean(curve),
        "decay": mean(curve[:count]) - mean(curve[-count:]),
        "high_frequency_ratio": mean(high_frequency_ratio(frame, true) for frame, true in made),
        "seam_luma": seams.luma,
        "seam_detail": seams.detail,
        "drift_sharpness": drift("sharpness", [look(frame).sharpness for frame in frames]),
        "curve": curve,
    }


def judge_seeds(parts_of: Mapping[tuple[str, int], Parts], clips: Path) -> dict[str, dict[str, list[float]]]:
    """Return ``{network: {measure of SEED_COLUMNS: value for each seed}}``, means over the clips, 33 frames."""
    found: dict[str, dict[str, list[float]]] = {}
    settings = settings_for(next(iter(parts_of.values())), SHORT_FRAMES)
    known = [known_clip(truth, settings) for _, truth in small_clips(clips, SHORT_FRAMES)]
    for (network, seed), parts in parts_of.items():
        numbers = [measured(FULL, clip, parts, settings, None) for clip in known]
        for key in SEED_COLUMNS:
            found.setdefault(network, {}).setdefault(key, []).append(mean(each[key] for each in numbers))
        say(f"seeds, {network} {seed}: {found[network]['psnr'][-1]:.2f} dB")
    return found


def seeds_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the Markdown table of `judge_seeds`: mean over the seeds and their range."""
    rows = [(name, *(_mean_and_range(numbers[key]) for key in SEED_COLUMNS)) for name, numbers in found.items()]
    return markdown_table(("context, mean and range over seeds", *SEED_COLUMNS.values()), rows)


def judge_artifacts(parts_of: Mapping[tuple[str, int], Parts], clips: Path) -> dict[str, dict[str, list[float]]]:
    """Return ``{fed with: {network: PSNR for each seed}}``, means over the clips."""
    decibels: dict[tuple[str, str, int], list[float]] = {}
    settings = settings_for(next(iter(parts_of.values())), SHORT_FRAMES)
    for name, truth in small_clips(clips, SHORT_FRAMES):
        clean = known_clip(truth, settings)
        for fed, clip in (("clean", clean), ("with artifacts", with_artifacts(clean))):
            for (network, seed), parts in parts_of.items():
                made, _ = made_frames(Baseline(network, network, "stage_two"), clip, parts, settings, None)
                error = mean(psnr(frame, true) for frame, true in zip(made[1:], truth[1:], strict=True))
                decibels.setdefault((fed, network, seed), []).append(error)
        say(f"artifacts, {name}")
    found: dict[str, dict[str, list[float]]] = {}
    for (fed, network, _seed), values in decibels.items():
        found.setdefault(fed, {}).setdefault(network, []).append(mean(values))
    return found


def artifacts_table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the Markdown table of `judge_artifacts`: mean over the seeds and their range."""
    rows = []
    for network, label in (
        (BIDIRECTIONAL.name, "clean references"),
        (WITH_ARTIFACTS.name, "references with artifacts"),
    ):
        rows.append((f"trained on {label}", *(_mean_and_range(values[network]) for values in found.values())))
    return markdown_table(("PSNR (dB), mean and range over seeds", *(f"fed {fed}" for fed in found)), rows)


def long_table(results: Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]) -> str:
    """Return the Markdown table of ``{row: [{clip: measures} for each seed]}``: mean over the seeds and range."""
    rows = []
    for row in LONG:
        if seeds := results.get(row.name, ()):
            values = {key: [mean(clip[key] for clip in clips.values()) for clips in seeds] for key in LONG_COLUMNS}
            cells = [_mean_and_range(values[key], digits) for key, (_, digits) in LONG_COLUMNS.items()]
            rows.append((row.label, str(len(seeds)), *cells))
    return markdown_table(("long clips", "networks", *(heading for heading, _ in LONG_COLUMNS.values())), rows)


def curves(results: Mapping[int, Mapping[str, Sequence[Mapping[str, Mapping[str, Any]]]]]) -> Array:
    """Return PSNR by frame, the mean over clips and seeds, as a picture uint8 [H, W, 3]: one panel a length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axes, (length, rows) in zip(panels, results.items(), strict=True):
        for row in LONG:
            if seeds := rows.get(row.name, ()):
                by_frame = np.mean([clip["curve"] for clips in seeds for clip in clips.values()], axis=0)
                axes.plot(np.arange(1, len(by_frame) + 1), by_frame, label=row.label.strip("*"), linewidth=1.2)
        axes.set(title=f"{length} frames", xlabel="frame")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("PSNR, dB")
    figure.axes[0].legend(fontsize=8)
    picture: Array = png_of(figure)
    return picture


def main() -> None:
    """Read the command line, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with INDEX.csv: to train on and held back")
    parser.add_argument("--runs", type=Path, required=True, help="where the networks are, or will be")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each of the ways that `artifacts` compares")
    parser.add_argument("--ways", nargs="+", choices=[row.name for row in LONG], help="only these of the long rows")
    parser.add_argument("--max-long-clips", type=int, help="only the first of the long clips; they take longest")
    parser.add_argument("--document", type=Path, help="Markdown file whose part between the marks is replaced")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    parts = TwoStagePipeline.from_pretrained("mini").parts
    place = {"clips": arguments.clips, "runs": arguments.runs}
    chosen = [row for row in LONG if arguments.ways is None or row.name in arguments.ways]
    long = {
        length: {
            row.name: [
                judge_long(row, seed, length, parts=parts, max_clips=arguments.max_long_clips, **place)
                for seed in range(arguments.seeds)
            ]
            for row in chosen
        }
        for length in LENGTHS
    }
    first = {each.name: with_network(parts, trained(each, 0, **place)) for each in SHORT_NETWORKS}
    every = {
        (each.name, seed): with_network(parts, trained(each, seed, **place))
        for each in (BIDIRECTIONAL, FROZEN, WITH_ARTIFACTS)
        for seed in range(arguments.seeds)
    }
    with torch.no_grad():
        short = judge_short(first, arguments.clips)
        seeds = judge_seeds(_without(every, WITH_ARTIFACTS), arguments.clips)
        artifacts = judge_artifacts(_without(every, FROZEN), arguments.clips)
    sections = [table(short, SHORT), seeds_table(seeds), artifacts_table(artifacts)]
    sections += [f"{length} frames:\n\n{long_table(results)}" for length, results in long.items()]
    print("\n\n".join(sections))
    if arguments.document is not None:
        write_between(arguments.document, "\n\n".join(sections), begin=BEGIN, end=END)
        pictures.save(plot(short, SHORT), IMAGES / "ablation_context.png")
        pictures.save(curves(long), IMAGES / "ablation_long.png")
    content = {"settings": settings_of(arguments), "short": short, "seeds": seeds, "artifacts": artifacts, "long": long}
    say(f"written to {write_results('context_study', content, arguments.output)}")


def _without(parts_of: Mapping[tuple[str, int], Parts], network: Network) -> dict[tuple[str, int], Parts]:
    return {key: parts for key, parts in parts_of.items() if key[0] != network.name}


def _mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def _copy_codec(output: Path) -> None:
    """Let a run use the codec of `mini`, so that its network can take the place of the one there."""
    codec = Path(resolve("mini", parts=("stage_two",)).folder_of("stage_two")) / "vae"
    shutil.copytree(codec, output / "stage_two" / "vae", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
