"""`swifti2v generate` and `swifti2v preview`: a video from an image and a prompt, with progress."""

from __future__ import annotations

import json
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from swifti2v.cli.acceleration_options import PANEL, AccelerationOptions, with_acceleration_options
from swifti2v.cli.processes import ProcessGroup, launched_processes
from swifti2v.cli.progress import progress_bars
from swifti2v.cli.setting_options import STAGE_ONE_SETTINGS, with_setting_options
from swifti2v.errors import InvalidInputError, MemoryBudgetError
from swifti2v.geometry import Size
from swifti2v.memory.device_errors import is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.media.video_writer import VideoWriter
    from swifti2v.runner.two_stage import TwoStagePipeline
    from swifti2v.runs import GenerationRequest, Progress

PHASE_LABELS = {"stage_one": "Stage I, motion", "stage_two": "Stage II, segment", "frames": "frames written"}

ImageArgument = Annotated[Path, typer.Argument(help="The input image: JPEG, PNG, WebP, TIFF, ...")]
PromptOption = Annotated[str, typer.Option(help="What should move, and how.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The video to write: .mp4, .mov or .mkv.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="mini (ships with the package), wan2.2, a checkpoint folder or a hub repository. "
        "Default: wan2.2 where there is a GPU, else mini."
    ),
]
WorkDirOption = Annotated[Path | None, typer.Option(help="Keep finished work here, and continue from what it holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of progress.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: a CUDA card if there is one.")]


@with_setting_options
@with_acceleration_options
def generate(  # noqa: PLR0913 - typer makes an option of each parameter
    image: ImageArgument,
    *,
    output: OutputOption,
    prompt: PromptOption = "",
    model: ModelOption = None,
    choices: dict[str, Any],
    memory: Annotated[
        str | None,
        typer.Option(help="GPU memory to plan for: auto, or 24GiB; see `swifti2v plan`.", rich_help_panel=PANEL),
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Host memory to plan for, with --memory.", rich_help_panel=PANEL)
    ] = None,
    accelerated_by: AccelerationOptions,
    work_dir: WorkDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a video from an image and a prompt. What is not given is left to the checkpoint."""
    if host_memory is not None and memory is None:
        msg = "--host-memory belongs to --memory; give both, --memory auto for instance"
        raise InvalidInputError(msg, param="host_memory", value=host_memory)
    command = _Command(image, prompt, output, choices, work_dir, as_json)
    speed = _Speed(None if memory is None else (memory, host_memory), accelerated_by)
    command.run(model, device=device, speed=speed)


@with_setting_options(only=STAGE_ONE_SETTINGS)
def preview(
    image: ImageArgument,
    *,
    output: OutputOption,
    prompt: PromptOption = "",
    model: ModelOption = None,
    choices: dict[str, Any],
    work_dir: WorkDirOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the motion reference only (Stage I); `generate` with the same --work-dir continues from it."""
    command = _Command(image, prompt, output, choices, work_dir, as_json, stage_one_only=True)
    command.run(model, device=device, speed=_Speed())


@dataclass(frozen=True)
class _Speed:
    """In which memory (of the device, of the host) the networks run, and how."""

    memory: tuple[str, str | None] | None = None
    options: AccelerationOptions = field(default_factory=AccelerationOptions)


@dataclass
class _Command:
    """One command: what was asked for, and what is told about it."""

    image: Path
    prompt: str
    output: Path
    choices: dict[str, Any]
    work_dir: Path | None
    as_json: bool
    stage_one_only: bool = False
    processes: ProcessGroup = field(default_factory=ProcessGroup)
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def run(self, model: str | None, *, device: str | None, speed: _Speed) -> None:
        """Check, load, generate, write, and say what was done."""
        with launched_processes() as processes:
            self.processes = processes
            pipeline = processes.together(lambda: self._described(model, device, speed))
            request = processes.together(lambda: self._request(pipeline))
            processes.together(lambda: self._load(pipeline, request))
            loaded = time.monotonic()
            if not processes.is_first:
                self._take_part(pipeline, request)
                return
            for note in request.notes:
                self._say(note)
            with _memory_errors(), processes.work_directory(self.work_dir) as work_dir:
                first_seconds = self._write(pipeline, request, work_dir)
        summary = {
            "output": str(self.output),
            "size": str(request.motion_size if self.stage_one_only else request.settings.size),
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

    def _described(self, model: str | None, device: str | None, speed: _Speed) -> TwoStagePipeline:
        """Check what can be checked without the checkpoint, and read its configurations, not its weights."""
        for name, given in (("--device", device), ("--memory", speed.memory)):
            if self.processes.count > 1 and given is not None:
                msg = f"{name} is for one process, and torchrun gives each a card; leave it out"
                raise InvalidInputError(msg, param=name, value=given)
        from swifti2v.media.video_writer import check_output_path

        check_output_path(self.output)
        quiet_libraries()

        from swifti2v.memory.heap import map_large_blocks
        from swifti2v.memory.limits import MemoryLimits
        from swifti2v.runner.loading import open_device
        from swifti2v.runner.two_stage import TwoStagePipeline
        from swifti2v.work_directory import WorkDirectory

        if self.work_dir is not None:
            WorkDirectory(self.work_dir)
        place = open_device(device or self.processes.device)
        map_large_blocks()
        return TwoStagePipeline.describe(
            self._chosen_model(model, place.type),
            device=place,
            few_step=self.choices.get("few_step", True),
            memory=MemoryLimits.parse(*speed.memory) if speed.memory is not None else None,
            acceleration=speed.options.acceleration(
                num_processes=self.processes.count, decodes=self.processes.is_first
            ),
        )

    def _chosen_model(self, model: str | None, device_type: str) -> str:
        if model is None and device_type == "cpu":
            self._say("no GPU was found, so the small model `mini` is used; --model wan2.2 asks for the full one")
            return "mini"
        if model == "wan2.2" and device_type == "cpu":
            self._say("wan2.2 is 75 GiB and made for a GPU; on a CPU it is far too slow: try --model mini")
        return model or "wan2.2"

    def _request(self, pipeline: TwoStagePipeline) -> GenerationRequest:
        from swifti2v.runner.acceleration import check_shared

        request = pipeline.request(self.image, self.prompt, **self.choices)
        check_shared(pipeline.parts, request.settings, self.processes.count)
        return request

    def _load(self, pipeline: TwoStagePipeline, request: GenerationRequest) -> None:
        if self.stage_one_only:
            return  # Stage I is loaded when it is run, and Stage II is not needed
        pipeline.load(request.settings)
        if pipeline.loads_in_turn:
            self._say("the host has room for one stage at a time; each is loaded when it is its turn")

    def _take_part(self, pipeline: TwoStagePipeline, request: GenerationRequest) -> None:
        """Do what a process does that neither prints nor writes: its share of every forward pass."""
        from swifti2v.runner.decoders import Undecoded

        pipeline.parts = replace(pipeline.parts, decoder=Undecoded())
        make = pipeline.preview if self.stage_one_only else pipeline.stream
        with _memory_errors(), self.processes.work_directory(self.work_dir) as work_dir:
            for piece in make(request, work_dir=work_dir):
                del piece

    def _write(self, pipeline: TwoStagePipeline, request: GenerationRequest, work_dir: Path | None) -> float:
        """Write the file; return when the first frames were in it."""
        from swifti2v.media.video_writer import VideoWriter

        first_seconds = 0.0
        make = pipeline.preview if self.stage_one_only else pipeline.stream
        with (
            phase_bars(quiet=self.as_json) as on_progress,
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
        if not self.as_json and self.processes.is_first:
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
def phase_bars(*, quiet: bool) -> Iterator[Any]:
    """Yield an `OnProgress` that draws a bar for each phase."""
    with progress_bars(quiet=quiet) as show_bar:

        def show(progress: Progress) -> None:
            label = PHASE_LABELS[progress.phase]
            if progress.num_segments:
                label += f" {progress.segment}/{progress.num_segments}"
            if show_bar is not None:
                show_bar(progress.phase, progress.done, progress.total, label=label)

        yield None if show_bar is None else show
