"""`swifti2v generate` and `swifti2v preview`: a video from an image and a prompt, with progress."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from swifti2v.cli.acceleration_options import AccelerationOptions, with_acceleration_options
from swifti2v.cli.processes import ProcessGroup, launched_processes
from swifti2v.cli.progress import progress_bars
from swifti2v.cli.stage_one_options import StageOneSampling, with_stage_one_options
from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory.device_errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.media.video_writer import VideoWriter
    from swifti2v.pipelines.runs import GenerationRequest, Progress
    from swifti2v.pipelines.two_stage import TwoStagePipeline

PHASE_LABELS = {"stage_one": "Stage I, motion", "stage_two": "Stage II, segment", "frames": "frames written"}

ImageArgument = Annotated[Path, typer.Argument(help="The input image: JPEG, PNG, WebP, TIFF, ...")]
PromptOption = Annotated[str, typer.Option(help="What should move, and how.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The video to write: .mp4, .mov or .mkv.")]
ModelOption = Annotated[str, typer.Option(help="mini (embedded), wan2.2, a checkpoint folder or a hub repository.")]
SizeOption = Annotated[str | None, typer.Option(help="Output size, WIDTHxHEIGHT, multiples of 32.")]
FramesOption = Annotated[int | None, typer.Option(help="Pixel frames, 4k+1.")]
FpsOption = Annotated[float | None, typer.Option(help="Frames per second of the file.")]
SeedOption = Annotated[int | None, typer.Option(help="Seed of the noise.")]
WorkDirOption = Annotated[Path | None, typer.Option(help="Keep finished work here, and continue from what it holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of progress.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a CUDA card if there is one.")]


@with_stage_one_options
@with_acceleration_options
def generate(  # noqa: PLR0913 - typer makes an option of each parameter
    image: ImageArgument,
    *,
    output: OutputOption,
    prompt: PromptOption = "",
    model: ModelOption = "wan2.2",
    size: SizeOption = None,
    frames: FramesOption = None,
    fps: FpsOption = None,
    seed: SeedOption = None,
    steps: Annotated[int | None, typer.Option(help="Steps of Stage II.")] = None,
    sigma_start: Annotated[float | None, typer.Option(help="Noise level that Stage II starts from, (0, 1].")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of Stage II.")] = None,
    refiner: Annotated[
        Literal["concat", "training-free", "none"] | None, typer.Option(help="How Stage II works.")
    ] = None,
    reference: Annotated[
        Literal["replace", "transport"] | None, typer.Option(help="How the hybrid reference is made.")
    ] = None,
    flow_scale: Annotated[float | None, typer.Option(help="Size of transport's optical flow, (0, 1].")] = None,
    segment_size: Annotated[int | None, typer.Option(help="Latent frames that a segment makes.")] = None,
    neighbors_before: Annotated[int | None, typer.Option(help="Finished latent frames that it sees.")] = None,
    neighbors_after: Annotated[int | None, typer.Option(help="Unrefined latent frames that it sees.")] = None,
    keep_context: Annotated[
        bool, typer.Option("--keep-context", help="Run a segment's context in its first step only: faster, inexact.")
    ] = False,
    positions: Annotated[
        Literal["absolute", "compact"] | None, typer.Option(help="Time positions of a segment's frames.")
    ] = None,
    stage_one: StageOneSampling,
    memory: Annotated[str | None, typer.Option(help="Device memory to plan for: auto, or 24GiB; see `plan`.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Host memory to plan for, with --memory.")] = None,
    accelerated_by: AccelerationOptions,
    work_dir: WorkDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a video from an image and a prompt."""
    choices = {
        "size": size,
        "num_frames": frames,
        "fps": fps,
        "seed": seed,
        "refiner": refiner,
        "reference": reference,
        "flow_scale": flow_scale,
        "num_inference_steps": steps,
        "sigma_start": sigma_start,
        "guidance_scale": guidance,
        "segment_size": segment_size,
        "neighbors_before": neighbors_before,
        "neighbors_after": neighbors_after,
        "keep_context": keep_context or None,
        "positions": positions,
        **stage_one.choices(),
    }
    job = _Job(image, prompt, output, choices, work_dir, as_json)
    if host_memory is not None and memory is None:
        msg = "--host-memory belongs to --memory; give both, --memory auto for instance"
        raise InvalidInputError(msg)
    speed = _Speed(None if memory is None else (memory, host_memory), accelerated_by)
    job.run(model, device=device, few_step=not stage_one.many_step, speed=speed)


@with_stage_one_options
def preview(  # noqa: PLR0913 - typer makes an option of each parameter
    image: ImageArgument,
    *,
    output: OutputOption,
    prompt: PromptOption = "",
    model: ModelOption = "wan2.2",
    size: SizeOption = None,
    frames: FramesOption = None,
    fps: FpsOption = None,
    seed: SeedOption = None,
    stage_one: StageOneSampling,
    work_dir: WorkDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the motion reference only (Stage I); `generate` with the same --work-dir continues from it."""
    choices = {
        "size": size,
        "num_frames": frames,
        "fps": fps,
        "seed": seed,
        **stage_one.choices(),
    }
    job = _Job(image, prompt, output, choices, work_dir, as_json)
    job.run(model, device=device, few_step=not stage_one.many_step, stage_one_only=True, speed=_Speed())


@dataclass(frozen=True)
class _Speed:
    """In which memory (of the device, of the host) the networks run, and how."""

    memory: tuple[str, str | None] | None = None
    options: AccelerationOptions = field(default_factory=AccelerationOptions)


@dataclass
class _Job:
    """One command: what was asked for, and what is told about it."""

    image: Path
    prompt: str
    output: Path
    choices: dict[str, Any]
    work_dir: Path | None
    as_json: bool
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def run(
        self,
        model: str,
        *,
        device: str | None,
        few_step: bool,
        speed: _Speed,
        stage_one_only: bool = False,
    ) -> None:
        """Load, generate, write, and say what was done."""
        with launched_processes() as processes:
            self.processes = processes
            processes.together(lambda: self._check(model, device, few_step=few_step, speed=speed))
            pipeline = processes.together(lambda: self._load(model, device, few_step=few_step, speed=speed))
            loaded = time.monotonic()
            request = processes.together(lambda: self._request(pipeline))
            if not processes.is_first:
                self._take_part(pipeline, request, stage_one_only=stage_one_only)
                return
            for note in (*request.notes, *pipeline.prompt_notes(request)):
                self._say(note)
            with _memory_errors(), processes.work_directory(self.work_dir) as work_dir:
                first_seconds = self._write(pipeline, request, work_dir, stage_one_only=stage_one_only)
        summary = {
            "output": str(self.output),
            "size": str(pipeline.parts.motion_size(request.settings.size) if stage_one_only else request.settings.size),
            "num_frames": request.settings.num_frames,
            "fps": request.settings.fps,
            "load_seconds": round(loaded - self.started, 2),
            "first_frames_seconds": round(first_seconds - loaded, 2),
            "seconds": round(time.monotonic() - loaded, 2),
            "notes": self.notes,
        }
        if self.as_json:
            typer.echo(json.dumps(summary))
        else:
            typer.echo(
                f"{summary['output']}: {summary['num_frames']} frames of {summary['size']}, {summary['seconds']} s"
            )

    def _load(self, model: str, device: str | None, *, few_step: bool, speed: _Speed) -> TwoStagePipeline:
        from swifti2v.memory.heap import map_large_blocks
        from swifti2v.pipelines.fitting import MemoryLimits
        from swifti2v.pipelines.in_turn import StagesInTurn, open_pipeline

        map_large_blocks()
        pipeline = open_pipeline(
            model,
            self.choices,
            device=device or self.processes.device,
            few_step=few_step,
            memory=MemoryLimits.parse(*speed.memory) if speed.memory is not None else None,
            acceleration=speed.options.acceleration(
                num_processes=self.processes.count, decodes=self.processes.is_first
            ),
        )
        if isinstance(pipeline, StagesInTurn):
            self._say("the host has room for one stage at a time; each is loaded when it is its turn")
        return pipeline

    def _request(self, pipeline: TwoStagePipeline) -> GenerationRequest:
        from swifti2v.pipelines.acceleration import check_shared

        request = pipeline.request(self.image, self.prompt, **self.choices)
        check_shared(pipeline.parts, request.settings, self.processes.count)
        return request

    def _take_part(self, pipeline: TwoStagePipeline, request: GenerationRequest, *, stage_one_only: bool) -> None:
        """Do what a process does that neither prints nor writes: its share of every forward pass."""
        from swifti2v.pipelines.decoders import Undecoded

        pipeline.parts = replace(pipeline.parts, decoder=Undecoded())
        make = pipeline.preview if stage_one_only else pipeline.stream
        with _memory_errors(), self.processes.work_directory(self.work_dir) as work_dir:
            for piece in make(request, work_dir=work_dir):
                del piece

    def _check(self, model: str, device: str | None, *, few_step: bool, speed: _Speed) -> None:
        """Find what can be found wrong before a model is loaded, which may take minutes."""
        for name, given in (("--device", device), ("--memory", speed.memory)):
            if self.processes.count > 1 and given is not None:
                msg = f"{name} is for one process, and torchrun gives each a card; leave it out"
                raise InvalidInputError(msg)
        from swifti2v.media.images import load_image
        from swifti2v.media.video_writer import check_output_path

        check_output_path(self.output)
        load_image(self.image)
        quiet_libraries()

        from swifti2v.pipelines.loading import open_device, settings_of
        from swifti2v.pipelines.run_store import RunStore
        from swifti2v.wan.quantized_products import check_quantized_device

        settings_of(model, self.choices, few_step=few_step)
        quantization = speed.options.quantization
        if quantization != "none":
            check_quantized_device(quantization, open_device(device or self.processes.device))
        if self.work_dir is not None:
            RunStore(self.work_dir)
        # It is the default: whoever tries the command on a laptop is to know before the download.
        if model == "wan2.2" and open_device(device or self.processes.device).type == "cpu":
            self._say("wan2.2 is 75 GiB and made for a GPU; on a CPU it is far too slow: try --model mini")

    def _write(
        self, pipeline: TwoStagePipeline, request: GenerationRequest, work_dir: Path | None, *, stage_one_only: bool
    ) -> float:
        """Write the file; return when the first frames were in it."""
        from swifti2v.media.video_writer import VideoWriter

        first_seconds = 0.0
        make = pipeline.preview if stage_one_only else pipeline.stream
        with (
            _phase_bars(quiet=self.as_json) as on_progress,
            closing(make(request, work_dir=work_dir, on_progress=on_progress)) as pieces,
        ):
            first = next(pieces)
            height, width = first.frames.shape[1:3]
            writer = VideoWriter(self.output, size=Size(width, height), fps=request.settings.fps)
            try:
                with writer:
                    writer.write(first.frames)
                    first_seconds = time.monotonic()
                    for piece in pieces:
                        writer.write(piece.frames)
            except BaseException as error:  # Ctrl-C too
                self._tell_partial(writer, error)
                raise
        return first_seconds

    def _tell_partial(self, writer: VideoWriter, error: BaseException) -> None:
        """Say, in the JSON form too, where the finished part of a stopped run is."""
        if writer.partial_path is None:
            return
        # After a failure to write, some of the frames that were handed to the encoder are not in the file.
        amount = "finished" if isinstance(error, OSError) else f"{writer.num_frames} finished"
        line = f"note: {amount} frames are kept in {writer.partial_path}"
        if self.work_dir is not None:
            line += f"; the same command continues from {self.work_dir}"
        typer.echo(line, err=True)

    def _say(self, note: str) -> None:
        self.notes.append(note)
        if not self.as_json:
            typer.echo(f"note: {note}", err=True)


def quiet_libraries() -> None:
    """Keep the progress bars and remarks of the libraries beneath out of sight: they are not about the user's run."""
    import diffusers
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn the end of memory into one line that says what to do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        msg = "there is not enough memory for this run; choose a smaller --size or --segment-size (see swifti2v plan)"
        raise MemoryBudgetError(msg) from error


@contextmanager
def _phase_bars(*, quiet: bool) -> Iterator[Any]:
    """Yield an `OnProgress` that draws a bar for each phase."""
    with progress_bars(quiet=quiet) as show_bar:

        def show(progress: Progress) -> None:
            label = PHASE_LABELS[progress.phase]
            if progress.num_segments:
                label += f" {progress.segment}/{progress.num_segments}"
            if show_bar is not None:
                show_bar(progress.phase, progress.done, progress.total, label=label)

        yield None if show_bar is None else show
