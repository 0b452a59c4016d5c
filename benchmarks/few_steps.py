"""What distillation gives: Stage II in 4 and in 2 steps, as it was trained and distilled from its own 20 steps.

Command: ``python -m benchmarks.few_steps --clips DIR --runs RUNS [--document docs/ablation.md]``. The teacher is the
first network of `benchmarks.context_study` (trained now, unless ``RUNS`` holds it), whose detail grows with its steps.
The students learn from crops of the clips it learned from, as ``swifti2v train distill`` does, and are judged on clips
that training never saw, 33 frames: against the truth, and against the teacher's own video from the same noise.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.ablation import documented, with_network
from benchmarks.baselines import Baseline, judged, made_frames
from benchmarks.context_study import BIDIRECTIONAL, SHORT_FRAMES, settings_for, small_clips, trained
from benchmarks.fidelity import known_clip
from benchmarks.results import add_result_arguments, markdown_table, mean, number, say, settings_of, write_results
from swifti2v.evaluation.metrics import psnr
from swifti2v.models.transformer import StageTwoTransformer
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.training.embedded.reference_pairs import ReferencePair
from swifti2v.training.engine.loop import LoopOptions, TrainingLoop
from swifti2v.training.refiner.distillation import DistillationObjective, DistillationOptions
from swifti2v.training.refiner.window_source import WindowSourceOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.fidelity import Numbers
    from swifti2v.pipelines.loading import Parts
    from swifti2v.pipelines.options import GenerationSettings
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
COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "to_teacher": (f"PSNR to {TEACHER_STEPS} steps (dB)", 2),
    "ssim": ("SSIM", 4),
    "high_frequency_ratio": ("HF", 3),
    "seam_luma": ("seam, luma", 3),
    "drift_sharpness": ("drift, sharpness (%)", 2),
}


class PairSample:
    """A crop of a pair, named by its number."""

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.name = name
        self.tensors = tensors


class PairCrops:
    """Crops of pairs by number, without end, and as batches: what a number stands for is drawn from it."""

    def __init__(self, pairs: Sequence[ReferencePair], *, text_width: int) -> None:
        self._pairs = pairs
        self._text_width = text_width

    def __getitem__(self, index: int) -> PairSample:
        """Return the latents [C,T,16,16] of a random pair at a random place."""
        rng = np.random.default_rng(index)
        pair = self._pairs[int(rng.integers(len(self._pairs)))]
        top, left = (int(rng.integers(side - CROP + 1)) for side in pair.truth.shape[2:])
        place = (..., slice(top, top + CROP), slice(left, left + CROP))
        tensors = {"latents": pair.truth[place], "reference.0": pair.reference[place]}
        return PairSample(str(index), tensors | {"prompt_embeds": torch.zeros(1, self._text_width)})

    def batch_of(self, step: int) -> Sequence[int]:
        """Return the numbers of a step."""
        return range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)


def distilled(teacher: Path, num_steps: int, *, pairs: Path, output: Path, settings: GenerationSettings) -> Path:
    """Return the folder of a student's weights; trained now, unless it is there."""
    folder = output / "transformer"
    if (output / "finished").exists():
        return folder
    options = DistillationOptions(
        num_student_steps=num_steps,
        teacher_steps_per_step=TEACHER_STEPS // num_steps,
        flow=WindowSourceOptions(
            flow_shift=settings.flow_shift, prompt_dropped_share=0.0, own_context_share=0.5, own_context_steps=1
        ),
    )
    student, frozen = (StageTwoTransformer.from_pretrained(teacher, torch_dtype=torch.float32) for _ in range(2))
    kept = [ReferencePair(*pair) for pair in torch.load(pairs, weights_only=True)]
    crops = PairCrops(kept, text_width=student.config.text_dim)
    objective = DistillationObjective(student, frozen, samples=crops, batches=crops, options=options)

    def report(step: StepReport) -> None:
        if step.step % 50 == 0:
            say(f"{output.name}, step {step.step}: loss {step.numbers.get('loss', float('nan')):.2e}")

    TrainingLoop(objective, output, LOOP).run(
        on_step=report, on_checkpoint=lambda _step: student.save_pretrained(folder)
    )
    (output / "finished").touch()
    return folder


def judge(
    rows: Mapping[str, tuple[Parts, int]], clips: Path, settings: GenerationSettings
) -> dict[str, dict[str, Numbers]]:
    """Return ``{clip: {row: numbers}}``; the first row is the teacher."""
    results: dict[str, dict[str, Numbers]] = {}
    for name, truth in small_clips(clips, SHORT_FRAMES):
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
    parser.add_argument("--document", type=Path, help="Markdown file whose part between the marks is replaced")
    add_result_arguments(parser, pictures=False)
    arguments = parser.parse_args()
    parts = TwoStagePipeline.from_pretrained("mini").parts
    settings = settings_for(parts, SHORT_FRAMES)
    teacher = trained(BIDIRECTIONAL, 0, clips=arguments.clips, runs=arguments.runs)
    own = with_network(parts, teacher)
    rows = {f"{TEACHER_STEPS} steps, the teacher": (own, TEACHER_STEPS)}
    for steps in STUDENT_STEPS:
        student = distilled(
            teacher,
            steps,
            pairs=teacher.parent / "pairs.pt",
            output=arguments.runs / f"distilled_{steps}",
            settings=settings,
        )
        rows[f"{steps} steps"] = (own, steps)
        rows[f"{steps} steps, distilled"] = (with_network(parts, student), steps)
    with torch.no_grad():
        results = judge(rows, arguments.clips, replace(settings, num_inference_steps=TEACHER_STEPS))
    print(table(results))
    if arguments.document is not None:
        text = arguments.document.read_text(encoding="utf-8")
        arguments.document.write_text(documented(text, table(results), begin=BEGIN, end=END), encoding="utf-8")
    content = {"settings": settings_of(arguments), "results": results}
    say(f"written to {write_results('few_steps', content, arguments.output)}")


if __name__ == "__main__":
    main()
