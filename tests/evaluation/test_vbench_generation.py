"""The videos of the benchmark: names, seeds, shards, continuation, records; from the control and from a checkpoint."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from swifti2v.errors import (
    ConfigurationError,
    InvalidInputError,
    MemoryBudgetError,
    OutputError,
    WorkDirectoryError,
)
from swifti2v.evaluation.vbench.clips import Clip, Shard, clip_seed, clips_of
from swifti2v.evaluation.vbench.generation import ClipRecord, VideoRun, append_record, make_videos, open_run
from swifti2v.evaluation.vbench.makers import ClipShape, MakerSettings, StillMaker
from swifti2v.evaluation.vbench.ray_workers import RayJob, make_videos_with_ray
from swifti2v.evaluation.vbench.suite import Suite, prepare_suite
from swifti2v.geometry import Size
from swifti2v.media.images import load_image
from swifti2v.media.video_reader import VideoReader
from tests.evaluation.vbench_checkout import PROMPTS, make_checkout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPE = ClipShape(Size(96, 96), 3, 8.0)
STILL = MakerSettings("still", SHAPE.size, {"num_frames": 3, "fps": 8.0})


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    root = tmp_path_factory.mktemp("suite")
    return prepare_suite(make_checkout(root / "VBench"), root / "suite", size=SHAPE.size)


@pytest.fixture
def run(tmp_path: Path) -> VideoRun:
    return VideoRun(tmp_path / "run", {"model": "still"})


def records(folder: Path, name: str = "clips.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_names_are_those_that_vbench_looks_for(suite: Suite) -> None:
    names = [clip.file_name for clip in clips_of(suite)]
    assert len(names) == 15
    assert set(names) == {f"{prompt}-{index}.mp4" for prompt, _, _ in PROMPTS for index in range(5)}
    assert names[:3] == [f"{prompt}-0.mp4" for prompt, _, _ in PROMPTS], "first samples go first"


def test_only_prompts_of_the_dimensions(suite: Suite) -> None:
    prompts = {clip.prompt for clip in clips_of(suite, dimensions=["i2v_subject", "i2v_background"])}
    assert prompts == {"a bear in the water", "a beach at dusk"}
    assert len(clips_of(suite, dimensions=["camera_motion"], num_samples=2)) == 2


@pytest.mark.parametrize("num_samples", [0, 6])
def test_numbers_of_samples(suite: Suite, num_samples: int) -> None:
    with pytest.raises(InvalidInputError, match="use 1 to 5"):
        clips_of(suite, num_samples=num_samples)


def test_seeds_differ_and_last(suite: Suite) -> None:
    seeds = [clip.seed for clip in clips_of(suite)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [clip.seed for clip in clips_of(suite)]
    fewer = {clip.file_name: clip.seed for clip in clips_of(suite, num_samples=1)}
    assert fewer.items() <= {clip.file_name: clip.seed for clip in clips_of(suite)}.items()
    assert not set(seeds) & {clip.seed for clip in clips_of(suite, seed=1)}
    # Pinned: a later version must find the videos of an earlier one.
    assert clip_seed(0, "a beach at dusk", 0) == 7091302716539244993


@pytest.mark.parametrize("count", [1, 2, 4, 20])
def test_shards_are_a_partition(suite: Suite, count: int) -> None:
    clips = clips_of(suite)
    parts = [Shard(number, count).select(clips) for number in range(1, count + 1)]
    assert sorted((clip for part in parts for clip in part), key=clips.index) == list(clips)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_are_read() -> None:
    assert Shard.parse(" 2/4 ") == Shard(2, 4)
    assert Shard.parse("2/4").record_name == "clips.2-of-4.jsonl"
    assert Shard().record_name == "clips.jsonl"
    for text in ("0/4", "5/4", "1", "1/0", "-1/2", "a/b", "1/4/2"):
        with pytest.raises(InvalidInputError, match="of the form i/n"):
            Shard.parse(text)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")])
def test_the_end_of_memory_is_one_line_and_leaves_no_video(
    suite: Suite, run: VideoRun, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frames(_maker: StillMaker, _clip: Clip) -> Iterator[np.ndarray]:
        yield np.zeros((1, 96, 96, 3), np.uint8)
        raise error

    first, second = clips_of(suite)[:2]
    run.make(first, StillMaker(SHAPE))
    monkeypatch.setattr(StillMaker, "frames", frames)
    with pytest.raises(MemoryBudgetError, match=r"not enough memory to make .*; use fewer --frames") as caught:
        run.make(second, StillMaker(SHAPE))
    assert "\n" not in str(caught.value)
    assert second.file_name in str(caught.value)
    assert [path.name for path in run.videos.iterdir()] == [first.file_name]


def test_a_model_too_large_is_said_and_other_errors_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_settings: MakerSettings) -> StillMaker:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(_settings: MakerSettings) -> StillMaker:
        raise RuntimeError("a bug")

    monkeypatch.setattr(MakerSettings, "open", too_large)
    with pytest.raises(MemoryBudgetError, match="not enough memory to load 'still'"):
        open_run(tmp_path / "run", STILL, seed=0)
    monkeypatch.setattr(MakerSettings, "open", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        open_run(tmp_path / "run", STILL, seed=0)
    assert not (tmp_path / "run").exists()


def test_the_control_repeats_the_picture(suite: Suite, run: VideoRun) -> None:
    clip = clips_of(suite)[0]
    record = run.make(clip, StillMaker(SHAPE))
    frames = np.concatenate(list(VideoReader(run.videos / clip.file_name))).astype(np.float64)
    picture = np.asarray(load_image(clip.image).image, dtype=np.float64)
    assert frames.shape == (3, 96, 96, 3)
    assert np.abs(frames - picture).mean() < 2  # what H.264 at crf 10 and 4:2:0 leave
    assert np.abs(np.diff(frames, axis=0)).mean() < 0.5
    assert (record.video, record.seed, record.size) == (clip.file_name, clip.seed, "96x96")
    assert record.seconds > 0


def test_only_videos_lie_among_the_videos(suite: Suite, run: VideoRun) -> None:
    """VBench takes the extension of all from whichever file comes first."""
    make_videos(clips_of(suite, num_samples=1), StillMaker(SHAPE), run)
    assert sorted(path.name for path in run.videos.iterdir()) == sorted(f"{prompt}-0.mp4" for prompt, _, _ in PROMPTS)
    assert sorted(path.name for path in run.folder.iterdir()) == ["clips.jsonl", "run.json", "videos"]


def test_a_stopped_run_continues(suite: Suite, run: VideoRun) -> None:
    clips = clips_of(suite, num_samples=1)

    def stop(done: int, _count: int, _record: ClipRecord | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_videos(clips, StillMaker(SHAPE), run, on_clip=stop)
    seen: list[tuple[int, int, bool]] = []
    times = {path.name: path.stat().st_mtime_ns for path in run.videos.iterdir()}
    again = VideoRun(run.folder, {"model": "still"})
    made = make_videos(clips, StillMaker(SHAPE), again, on_clip=lambda *told: seen.append((*told[:2], told[2] is None)))
    assert made == 1
    assert seen == [(1, 3, True), (2, 3, True), (3, 3, False)]
    assert times.items() <= {path.name: path.stat().st_mtime_ns for path in run.videos.iterdir()}.items()
    assert [record["video"] for record in records(run.folder)] == [clip.file_name for clip in clips]
    assert [record["clips_before"] for record in records(run.folder)] == [0, 1, 0]


def test_a_cut_off_video_is_made_again(suite: Suite, run: VideoRun) -> None:
    clips = clips_of(suite, num_samples=1)[:2]
    maker = StillMaker(SHAPE._replace(num_frames=24))
    make_videos(clips, maker, run)
    cut, empty = (run.videos / clip.file_name for clip in clips)
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-20])  # the index stands in front: the header still promises every frame
    assert VideoReader(cut).info.num_frames == 24
    empty.write_bytes(b"")
    assert make_videos(clips, maker, run) == 2
    assert cut.read_bytes() == whole


@pytest.mark.parametrize("change", [{"num_frames": 5}, {"fps": 16.0}, {"size": Size(64, 64)}])
def test_videos_of_another_shape_are_not_mixed_in(suite: Suite, run: VideoRun, change: dict[str, Any]) -> None:
    clips = clips_of(suite, num_samples=1)[:1]
    make_videos(clips, StillMaker(SHAPE), run)
    with pytest.raises(WorkDirectoryError, match="96x96, 3 frames at 8 fps, this run makes"):
        make_videos(clips, StillMaker(SHAPE._replace(**change)), run)


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    open_run(tmp_path / "run", STILL, seed=0)
    open_run(tmp_path / "run", STILL, seed=0)
    with pytest.raises(WorkDirectoryError, match=r"another run \(unequal: base_seed\)"):
        open_run(tmp_path / "run", STILL, seed=1)
    other = replace(STILL, choices={"num_frames": 5, "fps": 8.0})
    with pytest.raises(WorkDirectoryError, match=r"unequal: num_frames"):
        open_run(tmp_path / "run", other, seed=0)
    (tmp_path / "run" / "run.json").write_text("")
    with pytest.raises(WorkDirectoryError, match="is damaged"):
        open_run(tmp_path / "run", STILL, seed=0)


def test_a_failed_clip_leaves_no_file(suite: Suite, run: VideoRun) -> None:
    class Failing(StillMaker):
        def frames(self, clip: Clip) -> Iterator[np.ndarray[Any, Any]]:  # type: ignore[override]
            yield np.zeros((1, 96, 96, 3), dtype=np.uint8)
            raise InvalidInputError("the second frame")

    class Short(StillMaker):
        def frames(self, clip: Clip) -> Iterator[np.ndarray[Any, Any]]:  # type: ignore[override]
            yield np.zeros((2, 96, 96, 3), dtype=np.uint8)

    clip = clips_of(suite)[0]
    failing, short = Failing(SHAPE), Short(SHAPE)
    for maker in (failing, short):
        maker.frames = _closable(maker.frames)  # type: ignore[method-assign]
    with pytest.raises(InvalidInputError, match="the second frame"):
        run.make(clip, failing)
    with pytest.raises(InvalidInputError, match="has 2 frames, not 3"):
        run.make(clip, short)
    assert list(run.videos.iterdir()) == []


def _closable(frames: Callable[[Clip], Any]) -> Callable[[Clip], Any]:
    return lambda clip: (piece for piece in frames(clip))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        VideoRun(tmp_path / "file" / "run", {})


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    record = ClipRecord("v", "p", 0, 1, 3, "96x96", 8.0, 1.0, 0)
    with pytest.raises(OutputError, match="run again"):
        append_record(tmp_path / "missing" / "clips.jsonl", record)


@pytest.mark.slow
def test_a_checkpoint_makes_the_videos(suite: Suite, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = {"num_frames": 5, "num_inference_steps": 1, "stage_one_steps": 1, "segment_size": 1}
    settings = MakerSettings(str(tiny_checkpoint), Size(64, 64), options, "cpu")
    run, maker = open_run(tmp_path / "run", settings, seed=3)
    assert maker.shape == (Size(64, 64), 5, 8.0)
    bear, beach = clips_of(suite, dimensions=["i2v_subject"], seed=3)[:2]
    assert make_videos([bear, beach], maker, run) == 2
    first, second = (np.concatenate(list(VideoReader(run.videos / clip.file_name))) for clip in (bear, beach))
    assert first.shape == (5, 64, 64, 3)
    assert (first != second).any(), "the seed of the clip reaches the noise"
    identity = json.loads((run.folder / "run.json").read_text())
    assert identity["model"] == "tiny"
    assert (identity["num_inference_steps"], identity["base_seed"], identity["size"]) == ("1", "3", "64x64")
    assert "seed" not in identity
    before = (run.videos / bear.file_name).read_bytes()
    (run.videos / bear.file_name).unlink()
    run.make(bear, maker)
    assert (run.videos / bear.file_name).read_bytes() == before


class _FakeDataset:
    """As much of `ray.data.Dataset` as is used, in this process."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.asked: dict[str, Any] = {}

    def map(self, worker: Any, *, fn_constructor_args: tuple[Any, ...], **asked: Any) -> _FakeDataset:
        made = worker(*fn_constructor_args)
        mapped = _FakeDataset([lambda row=row: made(row) for row in self.rows])
        _FakeDataset.last = {**asked, "num_rows": len(self.rows)}  # type: ignore[attr-defined]
        return mapped

    def iter_rows(self) -> Iterator[Any]:
        for row in self.rows:
            yield row()


def test_ray_workers(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ModuleType("ray.data")
    blocks: list[int] = []

    def from_items(items: list[Any], *, override_num_blocks: int) -> _FakeDataset:
        blocks.append(override_num_blocks)
        return _FakeDataset(json.loads(json.dumps(items)))

    data.ActorPoolStrategy = lambda *, size: f"{size} actors"  # type: ignore[attr-defined]
    data.from_items = from_items  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.data", data)
    clips = clips_of(suite, num_samples=1)
    job = RayJob(tmp_path / "run", STILL, 0)
    seen: list[int] = []
    made = make_videos_with_ray(
        clips, job, num_workers=2, gpus_per_worker=0.5, on_clip=lambda done, _count, _record: seen.append(done)
    )
    assert (made, seen, blocks) == (3, [1, 2, 3], [3])
    assert _FakeDataset.last == {"compute": "2 actors", "num_cpus": 1, "num_gpus": 0.5, "num_rows": 3}  # type: ignore[attr-defined]
    assert [record["video"] for record in records(job.folder)] == [clip.file_name for clip in clips]
    assert make_videos_with_ray(clips, job, num_workers=1, gpus_per_worker=0) == 0
    assert len(records(job.folder)) == 3


def test_without_ray(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    job = RayJob(tmp_path / "run", STILL, 0)
    with pytest.raises(ConfigurationError, match="--shard i/n"):
        make_videos_with_ray(clips_of(suite), job, num_workers=1, gpus_per_worker=0)
    with pytest.raises(InvalidInputError, match="at least 1"):
        make_videos_with_ray(clips_of(suite), job, num_workers=0, gpus_per_worker=0)


def test_what_workers_are_sent_is_plain(suite: Suite, tmp_path: Path) -> None:
    """Rows hold what Ray's tables can: strings and 64-bit numbers."""
    for clip in clips_of(suite):
        row = asdict(clip)
        assert all(isinstance(value, str | int) for value in row.values())
        assert np.int64(row["seed"]) == row["seed"]
