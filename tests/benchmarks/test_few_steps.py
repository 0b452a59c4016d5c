"""Students learn from crops that their number names, and come nearer to their teacher than the teacher in few steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import few_steps
from benchmarks.few_steps import BATCH_SIZE, CROP, LABELS, PairCrops, Student, distilled, judge, table
from swifti2v.mini.reference_pairs import ReferencePair
from swifti2v.runner.loading import load_parts
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.runner.parts import Parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return load_parts("mini", device="cpu")


@pytest.fixture
def pairs(parts: Parts) -> list[ReferencePair]:
    channels = parts.stage_two.codec.num_channels
    made = torch.randn(2, 2, channels, 6, CROP + 4, CROP, generator=torch.Generator().manual_seed(0)).half()
    return [ReferencePair(truth, reference) for truth, reference in made]


def test_a_number_names_a_crop(pairs: list[ReferencePair]) -> None:
    crops = PairCrops(pairs, text_width=8)
    assert list(crops.batch_of(0)) + list(crops.batch_of(1)) == list(range(2 * BATCH_SIZE))
    for number in range(8):
        first, again = crops[number], crops[number]
        assert first.tensors["latents"].shape[1:] == (6, CROP, CROP)
        assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)
    places = {float(crops[number].tensors["latents"].float().mean()) for number in range(8)}
    assert len(places) > 2


def test_a_smaller_crop_is_a_setting(pairs: list[ReferencePair]) -> None:
    assert PairCrops(pairs, text_width=8, crop=8)[3].tensors["latents"].shape[1:] == (6, 8, 8)


@pytest.mark.parametrize("objective", list(LABELS))
def test_a_student_is_trained_once(
    parts: Parts, pairs: list[ReferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    teacher = tmp_path / "teacher"
    parts.stage_two.transformer.save_pretrained(teacher)
    torch.save([(pair.truth, pair.reference) for pair in pairs], tmp_path / "pairs.pt")
    monkeypatch.setattr(few_steps, "TEACHER_STEPS", 4)
    monkeypatch.setattr(few_steps, "CRITIC", few_steps.CRITIC | {"critic_steps_per_step": 1})
    student = Student(2, objective, num_training_steps=1)
    assert objective in student.name
    options = {"pairs": tmp_path / "pairs.pt", "output": tmp_path / "student", "settings": parts.defaults}
    folder = distilled(teacher, student, **options)
    weights = folder / "diffusion_pytorch_model.safetensors"
    made = weights.stat().st_mtime_ns
    changed = StageTwoTransformer.from_pretrained(folder).state_dict()
    start = StageTwoTransformer.from_pretrained(teacher).state_dict()
    assert any(not torch.equal(changed[key], start[key]) for key in start)
    assert distilled(teacher, student, **options) == folder
    assert weights.stat().st_mtime_ns == made


def test_rows_are_compared_with_the_first(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is the teacher's again is infinitely near to it; one of other steps is not."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)
    monkeypatch.setattr(few_steps, "small_clips", lambda *_: [("noise", truth)])
    settings = few_steps.settings_for(parts, 9)
    found = judge({"teacher": (parts, 2), "again": (parts, 2), "one": (parts, 1)}, tmp_path, settings)["noise"]
    assert "to_teacher" not in found["teacher"]
    assert found["again"]["to_teacher"] > 90 > found["one"]["to_teacher"]
    text = table({"noise": found})
    assert text.splitlines()[2].startswith("| teacher | ")
