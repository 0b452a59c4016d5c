"""The whole system on a tiny checkpoint: streaming, requests, seeds, long clips."""

from __future__ import annotations

import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import pytest
import torch

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import Size
from swifti2v.media.images import fit_image, image_to_tensor
from swifti2v.media.video_reader import VideoReader
from swifti2v.pipelines.ahead import THREAD_NAME
from swifti2v.pipelines.two_stage import TwoStagePipeline
from swifti2v.wan.checkpoint_index import WAN_NEGATIVE_PROMPT
from tests.pipelines.whole_runs import OPTIONS, frames_of, stage_two_calls, stop_at

if TYPE_CHECKING:
    from collections.abc import Callable

    from swifti2v.pipelines.loading import Overlap
    from swifti2v.pipelines.runs import GenerationRequest, Progress
    from swifti2v.pipelines.stage_one import PromptEmbeds

# ------------------------------------------------------------------------------------------------ what comes out


def test_call_and_stream_give_the_same_frames(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], uninterrupted: Any
) -> None:
    pieces = list(pipe.stream(request_of()))
    assert torch.equal(torch.cat([piece.frames for piece in pieces]), uninterrupted[0])
    assert [piece.first_frame for piece in pieces] == [0, 1, 5, 9]
    frames = uninterrupted[0]
    assert (frames.dtype, tuple(frames.shape)) == (torch.uint8, (13, 64, 64, 3))
    assert frames.float().std() > 1
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("num_frames", [1, 5, 9, 33])
def test_frames_are_as_many_as_asked_for(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], num_frames: int
) -> None:
    """Stage I of this checkpoint has windows of 9 frames: 33 take several."""
    settings = {"num_frames": num_frames, "segment_size": 3, "num_inference_steps": 1}
    assert len(frames_of(pipe.stream(request_of(**settings)))) == num_frames
    assert len(pipe.parts.stage_one.plan(33)) > 3


def test_first_frame_is_the_image_through_the_codec(
    pipe: TwoStagePipeline, image: PIL.Image.Image, uninterrupted: Any
) -> None:
    codec = pipe.parts.stage_two.codec
    pixels = image_to_tensor(fit_image(image, Size(64, 64)))[None, :, None]
    (frame,) = codec.decode_stream(codec.encode_stream([pixels]))
    assert torch.equal(uninterrupted[0][:1], frame)


def test_segments_come_out_as_they_finish(pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest]) -> None:
    with stage_two_calls(pipe) as calls:
        pieces = pipe.stream(request_of())
        made = [calls.count for _ in pieces]
    for segments_done, steps in enumerate(made):  # two steps a segment, the image before any
        assert 2 * segments_done <= steps <= 2 * (segments_done + 1)  # one segment is made ahead, and no more
    assert made[1] < made[-1] == 6


def test_frames_are_equal_whatever_runs_beside_what(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], uninterrupted: Any
) -> None:
    for overlap in ("decode", "write", "none"):
        other = TwoStagePipeline(replace(pipe.parts, overlap=overlap))
        assert torch.equal(frames_of(other.stream(request_of())), uninterrupted[0])


@pytest.mark.parametrize("overlap", ["decode", "write"])
def test_no_thread_outlives_a_run_that_is_left(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], overlap: Overlap
) -> None:
    other = TwoStagePipeline(replace(pipe.parts, overlap=overlap))
    pieces = other.stream(request_of())
    next(pieces)
    pieces.close()
    with pytest.raises(RuntimeError, match="stopped at"):
        frames_of(other.stream(request_of(), on_progress=stop_at("stage_two", 2, RuntimeError)))
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}


def test_an_error_of_the_network_reaches_the_caller(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(pipe.parts.stage_two.transformer, "forward", full)
    pieces = pipe.stream(request_of())
    assert len(next(pieces).frames) == 1  # the image needs no network
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        next(pieces)


def test_every_step_is_reported(pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest]) -> None:
    reports: list[Progress] = []
    frames_of(pipe.stream(request_of(stage_one_steps=2), on_progress=reports.append))
    by_phase = {name: [each for each in reports if each.phase == name] for name in ("stage_one", "stage_two", "frames")}
    for phase, total in (("stage_one", 4), ("stage_two", 6)):  # two windows of two steps; three segments of two
        assert [each.done for each in by_phase[phase]] == list(range(1, total + 1))
        assert {each.total for each in by_phase[phase]} == {total}
    assert [(each.segment, each.num_segments) for each in by_phase["stage_two"]][::2] == [(1, 3), (2, 3), (3, 3)]
    assert [(each.done, each.total) for each in by_phase["frames"]] == [(1, 13), (5, 13), (9, 13), (13, 13)]


def test_refiner_none_is_the_reference_itself(
    pipe: TwoStagePipeline, image: PIL.Image.Image, request_of: Callable[..., GenerationRequest]
) -> None:
    with stage_two_calls(pipe) as calls:
        plain = frames_of(pipe.stream(request_of(refiner="none")))
    assert calls.count == 0
    assert np.array_equal(plain[0], np.asarray(fit_image(image, Size(64, 64))))
    assert not torch.equal(plain, frames_of(pipe.stream(request_of(refiner="none", reference="replace"))))


def test_stock_network_training_free(tiny_checkpoint: Path, tmp_path: Path, image: PIL.Image.Image) -> None:
    root = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    index = (root / "swifti2v.json").read_text()
    (root / "swifti2v.json").write_text(
        index.replace('"./stage_two"', '"./stock", "refiner": "training-free", "sigma_start": 0.5')
    )
    pipe = TwoStagePipeline.from_pretrained(root, device="cpu")
    video = pipe(image, "pan left", **OPTIONS)
    assert video.frames.shape == (13, 64, 64, 3)
    full_noise = pipe(image, "pan left", **{**OPTIONS, "sigma_start": 1.0})
    assert not torch.equal(video.frames, full_noise.frames)
    with pytest.raises(InvalidInputError, match="use the refiner training-free"):
        pipe.request(image, **{**OPTIONS, "refiner": "concat"})


def test_guidance_and_negative_prompt_change_the_video(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], uninterrupted: Any
) -> None:
    videos = [
        frames_of(pipe.stream(request_of(guidance_scale=4.0, negative_prompt=text))) for text in ("blurry", "shaking")
    ]
    assert not torch.equal(*videos)
    assert not torch.equal(videos[0], uninterrupted[0])


def test_video_is_saved(uninterrupted: Any, pipe: TwoStagePipeline, image: PIL.Image.Image, tmp_path: Path) -> None:
    video = pipe(image, "pan left", **OPTIONS, work_dir=uninterrupted[2])
    assert torch.equal(video.frames, uninterrupted[0])
    reader = VideoReader(video.save(tmp_path / "out.mp4"))
    assert reader.info.size == Size(64, 64)
    assert sum(len(chunk) for chunk in reader) == 13


# ------------------------------------------------------------------------------------------------ asking wrongly


def test_requests_are_refused_before_work_begins(
    pipe: TwoStagePipeline, image: PIL.Image.Image, request_of: Callable[..., GenerationRequest], tmp_path: Path
) -> None:
    for changes, words in (
        ({"size": Size(64, 48)}, "multiple of 32"),
        ({"num_frames": 12}, "4k\\+1"),
        ({"refiner": "training-free"}, "use the refiner concat"),
        ({"few_step": False}, "load with few_step=False"),
        ({"prompt": "x" * 100_001}, "shorten it"),
        ({"num_frames": 129}, "has 32 positions in time, and .* need 33; use at most 125 frames, or positions compact"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            request_of(**changes)
    with pytest.raises(InvalidInputError, match="does not exist"):
        pipe.request(tmp_path / "no.jpg")
    with pytest.raises(InvalidInputError, match=r"the image is a ndarray; .* PIL\.Image\.fromarray"):
        pipe.request(np.zeros((32, 32, 3), np.uint8))  # type: ignore[arg-type]


def test_a_long_clip_is_taken_where_positions_do_not_grow_with_it(request_of: Callable[..., GenerationRequest]) -> None:
    for changes in ({"positions": "compact"}, {"refiner": "none"}):
        assert request_of(num_frames=129, **changes).settings.num_frames == 129


def test_notes_say_what_was_done(pipe: TwoStagePipeline, image: PIL.Image.Image, tmp_path: Path) -> None:
    image.convert("CMYK").save(tmp_path / "print.jpg")
    short = {**OPTIONS, "num_frames": 1}
    notes = pipe(tmp_path / "print.jpg", " ", **short).notes
    assert any("CMYK" in note for note in notes)
    assert any("prompt is empty" in note for note in notes)
    notes = pipe(image, "left " * 2000, **short).notes
    assert any("16 of its" in note for note in notes)
    assert not any("empty" in note for note in notes)


def test_a_picture_is_treated_as_its_file_is(pipe: TwoStagePipeline, image: PIL.Image.Image, tmp_path: Path) -> None:
    """A user who opens the file, as with diffusers, gets the video of one who names it."""
    turned = image.convert("RGBA")
    turned.putalpha(PIL.Image.linear_gradient("L").resize(image.size))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    by_name = pipe.request(tmp_path / "turned.png")
    opened = pipe.request(PIL.Image.open(tmp_path / "turned.png"))
    assert opened.image.tobytes() == by_name.image.tobytes()
    assert opened.notes == by_name.notes
    assert {"rotated by its EXIF orientation", "transparent parts laid on white"} <= set(opened.notes)


def test_a_negative_prompt_without_guidance_is_said(pipe: TwoStagePipeline, image: PIL.Image.Image) -> None:
    asked = {**OPTIONS, "negative_prompt": "blurry"}
    assert any("negative prompt has no effect" in note for note in pipe.request(image, **asked).notes)
    guided = {**asked, "guidance_scale": 2.0}
    assert not any("negative prompt" in note for note in pipe.request(image, **guided).notes)


@pytest.mark.parametrize(
    ("few_step", "choices", "negative"),
    [
        (True, {}, None),
        (True, {"negative_prompt": "blurry"}, None),
        (True, {"guidance_scale": 2.0}, WAN_NEGATIVE_PROMPT),
        (False, {}, WAN_NEGATIVE_PROMPT),
        (False, {"negative_prompt": ""}, ""),
        (False, {"negative_prompt": "blurry"}, "blurry"),
        (False, {"stage_one_guidance_scale": 1.0}, None),
    ],
)
def test_a_negative_prompt_is_encoded_where_there_is_guidance_alone(
    tiny_checkpoint: Path,
    image: PIL.Image.Image,
    monkeypatch: pytest.MonkeyPatch,
    few_step: bool,
    choices: dict[str, Any],
    negative: str | None,
) -> None:
    pipe = TwoStagePipeline.from_pretrained(tiny_checkpoint, device="cpu", few_step=few_step)
    encoded: list[tuple[str, str | None]] = []
    encode = pipe.parts.stage_one.encode_prompt

    def watching(prompt: str, negative_prompt: str | None = None) -> PromptEmbeds:
        encoded.append((prompt, negative_prompt))
        return encode(prompt, negative_prompt)

    monkeypatch.setattr(pipe.parts.stage_one, "encode_prompt", watching)
    short = {"num_frames": 5, "stage_one_steps": 1, "num_inference_steps": 1}
    pipe(image, "pan left", **(short | choices))
    assert encoded == [("pan left", negative)]


def test_choices_may_be_named_in_the_call(pipe: TwoStagePipeline, image: PIL.Image.Image) -> None:
    asked = {**OPTIONS, "num_frames": 5, "seed": 8}
    assert pipe.request(image, **asked).settings == pipe.defaults.settled(asked)
    assert len(pipe(image, "pan left", **{**OPTIONS, "num_frames": 1}).frames) == 1
    with pytest.raises(InvalidInputError, match="did you mean guidance_scale"):
        pipe.request(image, guidance=2.0)


# ------------------------------------------------------------------------------------------------ seeds


def test_seeds(pipe: TwoStagePipeline, image: PIL.Image.Image, uninterrupted: Any) -> None:
    short = {**OPTIONS, "num_frames": 5, "num_inference_steps": 1}

    def make(options: dict[str, Any] = short, seed: int | None = None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return pipe(image, "pan left", **options, generator=generator).frames

    drawn = make(seed=1)
    assert torch.equal(drawn, make(seed=1))
    assert not torch.equal(drawn, make(seed=2))
    assert not torch.equal(make(), make({**short, "seed": 4}))
    generator = torch.Generator().manual_seed(1)
    first, second = (pipe.request(image, **short, generator=generator).settings.seed for _ in range(2))
    assert first != second


# ------------------------------------------------------------------------------------------------ memory


def test_frames_that_are_held_do_not_grow_with_length(
    pipe: TwoStagePipeline, request_of: Callable[..., GenerationRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of the reference, latents and results that are alive at once, without the garbage collector's help."""
    alive: list[weakref.ref[Any]] = []

    def watch(value: Any) -> Any:
        alive.append(weakref.ref(value))
        return value

    def most_of(num_frames: int) -> int:
        alive.clear()
        most = 0
        request = request_of(num_frames=num_frames, num_inference_steps=1)
        for piece in pipe.stream(request):
            watch(piece.frames)
            del piece
            most = max(most, sum(each() is not None for each in alive))
        return most

    codec = pipe.parts.stage_two.codec
    encode, decode = codec.encode_stream, codec.decode_stream
    monkeypatch.setattr(codec, "encode_stream", lambda chunks: map(watch, encode(map(watch, chunks))))
    monkeypatch.setattr(codec, "decode_stream", lambda latents: map(watch, decode(latents)))
    short, long = most_of(13), most_of(37)
    assert len(alive) > 3 * 9
    assert short > 0
    # Two threads do not meet at the same line every time. Six latent frames more would be eighteen things.
    assert long <= short + 2
