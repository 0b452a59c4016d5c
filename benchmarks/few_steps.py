"""What distillation gives: Stage II in few steps, as it was trained and distilled from its own 20 by both objectives.

Command: ``python -m benchmarks.few_steps --clips DIR --runs RUNS [--document docs/ablation.md]``. The teacher is the
first network of `benchmarks.context_study` (trained now, unless ``RUNS`` holds it), whose detail grows with its steps.
The students learn from crops of the clips it learned from, as ``swifti2v train distill`` does, and are judged on clips
that training never saw, 33 frames: against the truth, and against the teacher's own video from the same noise.

``--student-steps``, ``--objectives``, ``--num-steps``, ``--crop`` and ``--max-clips`` make it shorter. Students of both
objectives are trained for equally many steps; one of distribution matching costs about twice as much (`CRITIC`).
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.ablation import with_network
from benchmarks.baselines import Baseline, judged, made_frames
from benchmarks.context_study import BIDIRECTIONAL, SHORT_FRAMES, settings_for, small_clips, trained
from benchmarks.fidelity import known_clip
from benchmarks.results import (
    add_result_arguments,
    markdown_table,
    mean,
    number,
    say,
    settings_of,
    write_between,
    write_results,
)
from swifti2v.evaluation.metrics import psnr
from swifti2v.mini.reference_pairs import ReferencePair
from swifti2v.runner.two_stage import TwoStagePipeline
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.refiner.distillation import DistillationObjective, DistillationOptions
from swifti2v.training.refiner.distribution_matching import DistributionMatchingObjective, DistributionMatchingOptions
from swifti2v.training.refiner.window_source import WindowSource, WindowSourceOptions
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.fidelity import Numbers
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings
    from swifti2v.training.engine.loop import StepReport

BEGIN, END = "<!-- few steps: begin -->", "<!-- few steps: end -->"
TEACHER_STEPS = 20
STUDENT_STEPS = (4, 2)
CROP = 16
BATCH_SIZE = 4
LOOP = LoopOptions(
    num_steps=300,
    learning_rate=3e-4,
    warmup_steps=20,
    ema_decay=0.98,
    checkpoint_every=50,
    log_every=10,
    bfloat16=False,
)
TRAJECTORY, MATCHING = "trajectory", "distribution_matching"
LOOPS = {TRAJECTORY: LOOP, MATCHING: replace(LOOP, learning_rate=5e-5, betas=(0.0, 0.999))}
CRITIC: dict[str, Any] = {"critic_steps_per_step": 5, "critic_learning_rate": 2e-4}
LABELS = {TRAJECTORY: "distilled along the trajectory", MATCHING: "distilled by distribution matching"}
COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "to_teacher": (f"PSNR to {TEACHER_STEPS} steps (dB)", 2),
    "ssim": ("SSIM", 4),
    "high_frequency_ratio": ("HF", 3),
    "seam_luma": ("seam, luma", 3),
    "seam_detail": ("seam, detail", 3),
    "drift_sharpness": ("drift, sharpness (%)", 2),
}


class PairSample:
    """A crop of a pair, named by its number."""

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.name = name
        self.tensors = tensors


class PairCrops:
    """Crops of pairs by number, without end, and as batches: what a number stands for is drawn from it."""

    def __init__(self, pairs: Sequence[ReferencePair], *, text_width: int, crop: int = CROP) -> None:
        self._pairs = pairs
        self._text_width = text_width
        self._crop = crop

    def __getitem__(self, index: int) -> PairSample:
        """Return the latents [C,T,crop,crop] of a random pair at a random place."""
        rng = np.random.default_rng(index)
        pair = self._pairs[int(rng.integers(len(self._pairs)))]
        top, left = (int(rng.integers(side - self._crop + 1)) for side in pair.truth.shape[2:])
        place = (..., slice(top, top + self._crop), slice(left, left + self._crop))
        tensors = {"latents": pair.truth[place], "reference.0": pair.reference[place]}
        return PairSample(str(index), tensors | {"prompt_embeds": torch.zeros(1, self._text_width)})

    def batch_of(self, step: int) -> Sequence[int]:
        """Return the numbers of a step."""
        return range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)


@dataclass(frozen=True)
class Student:
    """How a student is made: in how many steps it samples, by which objective, for how long and on what it learns."""

    num_steps: int
    objective: str = TRAJECTORY
    num_training_steps: int = LOOP.num_steps
    crop: int = CROP

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.objective}_{self.num_steps}_{self.num_training_steps}_{self.crop}"


def distilled(teacher: Path, student: Student, *, pairs: Path, output: Path, settings: GenerationSettings) -> Path:
    """Return the folder of a student's weights; trained now, unless it is there."""
    folder = output / "transformer"
    if (output / "finished").exists():
        return folder
    made, frozen = (StageTwoTransformer.from_pretrained(teacher, torch_dtype=torch.float32) for _ in range(2))
    kept = [ReferencePair(*pair) for pair in torch.load(pairs, weights_only=True)]
    crops = PairCrops(kept, text_width=made.config.text_dim, crop=student.crop)
    flow = WindowSourceOptions(
        flow_shift=settings.flow_shift, prompt_dropped_share=0.0, own_context_share=0.5, own_context_steps=1
    )
    objective: DistillationObjective | DistributionMatchingObjective
    critic = None
    if student.objective == TRAJECTORY:
        options = DistillationOptions(student.num_steps, 1.0, flow, TEACHER_STEPS // student.num_steps)
        source = WindowSource(made, samples=crops, batches=crops, options=options.source_options)
        objective = DistillationObjective(made, frozen, source=source, options=options)
    else:
        second = StageTwoTransformer.from_pretrained(teacher, torch_dtype=torch.float32)
        matching = DistributionMatchingOptions(student.num_steps, 1.0, flow, **CRITIC)
        source = WindowSource(made, samples=crops, batches=crops, options=matching.source_options)
        objective = DistributionMatchingObjective(made, frozen, critic=second, source=source, options=matching)
        critic = objective.critic

    def report(step: StepReport) -> None:
        if step.step % 10 == 0:
            say(f"{output.name}, step {step.step}: " + ", ".join(f"{k} {v:.2e}" for k, v in step.numbers.items()))

    options_of_loop = replace(LOOPS[student.objective], num_steps=student.num_training_steps)
    TrainingLoop(objective, output, options_of_loop, critic=critic).run(
        on_step=report, on_checkpoint=lambda _step: made.save_pretrained(folder)
    )
    (output / "finished").touch()
    return folder


def judge(
    rows: Mapping[str, tuple[Parts, int]], clips: Path, settings: GenerationSettings, *, max_clips: int | None = None
) -> dict[str, dict[str, Numbers]]:
    """Return ``{clip: {row: numbers}}``; the first row is the teacher."""
    results: dict[str, dict[str, Numbers]] = {}
    for name, truth in itertools.islice(small_clips(clips, SHORT_FRAMES), max_clips):
        clip = known_clip(truth, settings)
        first: list[Any] = []
        for label, (parts, steps) in rows.items():
            way = Baseline(label, label, "stage_two", {"num_inference_steps": steps})
            frames, _ = made_frames(way, clip, parts, settings, None)
            first = first or frames
            numbers = judged(label, frames, clip, fps=settings.fps, segment_size=settings.segment_size, vmaf=False)
            if frames is not first:
                numbers["to_teacher"] = mean(psnr(a, b) for a, b in zip(frames[1:], first[1:], strict=True))
            results.setdefault(name, {})[label] = numbers
        say(f"{name}: " + ", ".join(f"{label} {each['psnr']:.2f} dB" for label, each in results[name].items()))
    return results


def table(results: Mapping[str, Mapping[str, Numbers]]) -> str:
    """Return the Markdown table, means over the clips."""
    clips = list(results.values())
    rows = [
        (
            label,
            *(number(mean(clip[label].get(key) for clip in clips), digits) for key, (_, digits) in COLUMNS.items()),
        )
        for label in clips[0]
    ]
    return markdown_table((f"mean of {len(clips)} clips", *(heading for heading, _ in COLUMNS.values())), rows)


def main() -> None:
    """Read the command line, train, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True, help="folder with INDEX.csv: to train on and held back")
    parser.add_argument("--runs", type=Path, required=True, help="where the networks are, or will be")
    parser.add_argument("--student-steps", type=int, nargs="+", default=list(STUDENT_STEPS))
    parser.add_argument("--objectives", nargs="+", choices=list(LABELS), default=list(LABELS))
    parser.add_argument("--num-steps", type=int, default=LOOP.num_steps, help="of a student's training")
    parser.add_argument("--crop", type=int, default=CROP, help="side of what is learned from, in latents")
    parser.add_argument("--max-clips", type=int, help="only the first of the clips held back")
    parser.add_argument("--document", type=Path, help="Markdown file whose part between the marks is replaced")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    parts = TwoStagePipeline.from_pretrained("mini").parts
    settings = settings_for(parts, SHORT_FRAMES)
    teacher = trained(BIDIRECTIONAL, 0, clips=arguments.clips, runs=arguments.runs)
    own = with_network(parts, teacher)
    rows = {f"{TEACHER_STEPS} steps, the teacher": (own, TEACHER_STEPS)}
    for steps in arguments.student_steps:
        rows[f"{steps} steps"] = (own, steps)
        for objective in arguments.objectives:
            student = Student(steps, objective, arguments.num_steps, arguments.crop)
            output = arguments.runs / f"distilled_{student.name}"
            weights = distilled(teacher, student, pairs=teacher.parent / "pairs.pt", output=output, settings=settings)
            rows[f"{steps} steps, {LABELS[objective]}"] = (with_network(parts, weights), steps)
    judged_at = replace(settings, num_inference_steps=TEACHER_STEPS)
    with torch.no_grad():
        results = judge(rows, arguments.clips, judged_at, max_clips=arguments.max_clips)
    print(table(results))
    if arguments.document is not None:
        write_between(arguments.document, table(results), begin=BEGIN, end=END)
    content = {"settings": settings_of(arguments), "results": results}
    say(f"written to {write_results('few_steps', content, arguments.output)}")


if __name__ == "__main__":
    main()
