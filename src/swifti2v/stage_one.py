"""Stage I: the motion reference, from an unmodified `WanImageToVideoPipeline` (paper, figure "method").

A clip longer than the trained length is made window by window, each continuing from a frame of the one before it, so
that time is linear in the length and memory does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import PIL.Image
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from peft.tuners.tuners_utils import BaseTunerLayer

from swifti2v.errors import AdapterError, InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.sampling.segmented import derived_seed
from swifti2v.schedulers import FixedSigmaScheduler, WanUniPCScheduler
from swifti2v.segments import plan_windows

if TYPE_CHECKING:
    from diffusers import WanImageToVideoPipeline
    from torch import Tensor

    from swifti2v.settings import GenerationSettings

FEW_STEP_ADAPTER = "few_step"
"""Role, and name or start of the name (``few_step_...``), of the adapters that only few-step sampling uses."""

OnStageOneStep = Callable[[int, int], None]
"""``(step_index, num_steps)`` over all windows, after each step (0-based); an exception raised in it stops the run."""


@dataclass(frozen=True)
class PromptEmbeds:
    """Prompts as the network reads them.

    Args:
        prompt: [1, max_sequence_length, D], zero beyond the prompt's tokens.
        negative: the same for the negative prompt, or None when it was not encoded.
    """

    prompt: Tensor
    negative: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is of them, by name."""
        return {"prompt": self.prompt} | ({} if self.negative is None else {"negative": self.negative})


class MotionStage(Protocol):
    """What every Stage I offers: `StageOne`, and `swifti2v.mini.stage_one.PathStageOne`; see there."""

    geometry: CodecGeometry
    max_sequence_length: int

    def plan(self, num_frames: int) -> tuple[range, ...]:
        """Return the windows of a clip; raise `InvalidInputError` unless it has 4k+1 frames."""

    def check_settings(self, settings: GenerationSettings) -> None:
        """Raise `InvalidInputError` for settings that this stage does not have."""

    def encode_prompt(self, prompt: str, negative_prompt: str | None = None) -> PromptEmbeds:
        """Encode a prompt, and a negative one if given."""

    def generate(
        self,
        image: PIL.Image.Image,
        prompt: str | PromptEmbeds,
        settings: GenerationSettings,
        *,
        size: Size,
        on_step: OnStageOneStep | None = None,
    ) -> Iterator[Tensor]:
        """Make the motion reference, uint8 [n,h,w,3] a piece."""

    def notes_of(self, prompt: str, negative_prompt: str | None = None) -> tuple[str, ...]:
        """Say what of the texts will have no effect."""

    def motion_notes(
        self, image: PIL.Image.Image, prompt: str, settings: GenerationSettings, *, size: Size
    ) -> tuple[str, ...]:
        """Say of the motion itself what is known before the first frame."""


class StageOne:
    """The motion reference of an image and a prompt.

    Args:
        pipeline: a Wan image-to-video pipeline with one or two experts, its adapters loaded; it is borrowed for the
            time of a window and given back as it was, scheduler and active adapters included.
        window_frames: trained length, 4k+1; longer clips are made in windows.
        overlap_frames: 4k+1, frames that two windows share and over which they are cross-faded. Few, because the second
            window knows one frame of the first and not its velocity, so that the two drift apart within the overlap.
        max_sequence_length: text tokens that the checkpoint was trained with.

    Raises:
        InvalidInputError: the window or the overlap has another form.
    """

    def __init__(
        self,
        pipeline: WanImageToVideoPipeline,
        *,
        window_frames: int = 81,
        overlap_frames: int = 5,
        max_sequence_length: int = 512,
    ) -> None:
        transformer = pipeline.transformer if pipeline.transformer is not None else pipeline.transformer_2
        self.pipeline = pipeline
        self.window_frames = window_frames
        self.overlap_frames = overlap_frames
        self.max_sequence_length = max_sequence_length
        self.geometry = CodecGeometry(
            spatial=pipeline.vae_scale_factor_spatial,
            temporal=pipeline.vae_scale_factor_temporal,
            patch=transformer.config.patch_size[1],
        )
        self.plan(window_frames)

    def plan(self, num_frames: int) -> tuple[range, ...]:
        """Return the windows of a clip of `num_frames` frames; raise `InvalidInputError` unless it is 4k+1."""
        return plan_windows(
            num_frames,
            window_frames=self.window_frames,
            overlap_frames=self.overlap_frames,
            temporal=self.geometry.temporal,
        )

    def check_settings(self, settings: GenerationSettings) -> None:
        """Raise `InvalidInputError` if there is a setting for a second expert that this checkpoint has not."""
        second = settings.stage_one_guidance_scale_2
        if second is not None and self.pipeline.config.boundary_ratio is None:
            name = "stage_one_guidance_scale_2"
            msg = f"{name} is for the second expert, and this checkpoint has one expert; leave it out"
            raise InvalidInputError(msg, param=name, value=second)

    @torch.no_grad()
    def encode_prompt(self, prompt: str, negative_prompt: str | None = None) -> PromptEmbeds:
        """Encode a prompt, and a negative one if given (guidance needs it; it may be empty, as may the prompt)."""
        try:
            positive, negative = self.pipeline.encode_prompt(
                prompt=prompt,
                negative_prompt=negative_prompt,
                do_classifier_free_guidance=negative_prompt is not None,
                max_sequence_length=self.max_sequence_length,
            )
        finally:
            self.pipeline.maybe_free_model_hooks()
        return PromptEmbeds(positive, negative)

    def generate(
        self,
        image: PIL.Image.Image,
        prompt: str | PromptEmbeds,
        settings: GenerationSettings,
        *,
        size: Size,
        on_step: OnStageOneStep | None = None,
    ) -> Iterator[Tensor]:
        """Make the motion reference.

        Args:
            image: RGB, of the aspect of `size`; it is reduced to that.
            prompt: text, or what `encode_prompt` made of it.
            settings: frames, seed, steps and guidance. Few steps are those of the distillation's fixed schedule if
                there are as many, and follow the same curve otherwise. The first window is exactly the pipeline's own
                result for a CPU generator of the seed.
            size: of the motion reference, in multiples of the codec's factor times the patch (16 for Wan2.2-A14B).
            on_step: progress over all windows; to cancel, raise in it.

        Returns:
            An iterator of uint8 [n,h,w,3] on the CPU, a piece as each window finishes, `num_frames` frames in all.

        Raises:
            InvalidInputError: at the call, for an argument that cannot be used.
            AdapterError: while iterating, if adapters are merged so that the few-step ones cannot be turned on or off.
        """
        self.geometry.check_size(size)
        if image.mode != "RGB":
            msg = f"the image is {image.mode}, not RGB; convert it with fit_image"
            raise InvalidInputError(msg, param="image", value=image.mode)
        windows = self.plan(settings.num_frames)
        self.check_settings(settings)
        if isinstance(prompt, PromptEmbeds) and _uses_guidance(settings) and prompt.negative is None:
            msg = "guidance needs negative embeddings; call encode_prompt with a negative_prompt (it may be empty)"
            raise InvalidInputError(msg, param="prompt")
        if image.size != tuple(size):
            image = image.resize(size, PIL.Image.Resampling.LANCZOS)
        return self._windows(image, prompt, settings, windows, on_step)

    def _windows(
        self,
        image: PIL.Image.Image,
        prompt: str | PromptEmbeds,
        settings: GenerationSettings,
        windows: tuple[range, ...],
        on_step: OnStageOneStep | None,
    ) -> Iterator[Tensor]:
        if isinstance(prompt, str):
            prompt = self.encode_prompt(prompt, settings.negative_prompt if _uses_guidance(settings) else None)
        steps, start = settings.stage_one_steps, image
        held: Tensor | None = None
        for index, window in enumerate(windows):

            def after_step(step: int, done: int = index * steps) -> None:
                if on_step is not None:
                    on_step(done + step, len(windows) * steps)

            seed = settings.seed if index == 0 else derived_seed(settings.seed, index)
            frames = self._run(start, prompt, len(window), seed, settings, after_step)
            if held is not None:
                frames = cross_fade(held, match_color(frames, held[0]))
            last = index == len(windows) - 1
            num_done = len(window) if last else len(window) - self.overlap_frames
            if not last:
                # A clone: a view would keep the whole window alive while the next one is made.
                held = frames[num_done:].clone()
                start = PIL.Image.fromarray(_to_uint8(held[0]).numpy())
            piece = _to_uint8(frames[:num_done])
            del frames
            yield piece

    def _run(
        self,
        image: PIL.Image.Image,
        embeds: PromptEmbeds,
        num_frames: int,
        seed: int,
        settings: GenerationSettings,
        on_step: Callable[[int], None],
    ) -> Tensor:
        """Run the pipeline once; return float32 [n,h,w,3] in [0,1] on the CPU."""

        def after_step(_pipeline: Any, step_index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step_index)
            return tensors

        # Embeddings of an earlier run come from its work directory, and so from the CPU.
        device = self.pipeline._execution_device
        negative = embeds.negative if _uses_guidance(settings) else None
        with borrowed(self.pipeline, few_step=settings.few_step, flow_shift=settings.stage_one_flow_shift):
            (video,) = self.pipeline(
                image=image,
                height=image.height,
                width=image.width,
                num_frames=num_frames,
                num_inference_steps=settings.stage_one_steps,
                guidance_scale=settings.stage_one_guidance_scale,
                guidance_scale_2=settings.stage_one_guidance_scale_2,
                generator=torch.Generator("cpu").manual_seed(seed),
                prompt_embeds=embeds.prompt.to(device),
                negative_prompt_embeds=None if negative is None else negative.to(device),
                max_sequence_length=self.max_sequence_length,
                output_type="pt",
                return_dict=False,
                callback_on_step_end=after_step,
            )
        return video[0].to("cpu", torch.float32).permute(0, 2, 3, 1)

    def notes_of(self, prompt: str, negative_prompt: str | None = None) -> tuple[str, ...]:
        """Say what of the texts will have no effect: what is cut at the encoder's limit."""
        named = (("prompt", prompt), ("negative prompt", negative_prompt or ""))
        return tuple(note for name, text in named if (note := self.cut_note(name, text)))

    def motion_notes(
        self, _image: PIL.Image.Image, _prompt: str, _settings: GenerationSettings, *, size: Size
    ) -> tuple[str, ...]:
        """Return nothing: what moves is known when there are frames, and not before."""
        del size
        return ()

    def cut_note(self, name: str, text: str) -> str | None:
        """Say that a text, called `name`, is longer than the encoder reads; None if it is not."""
        tokenizer = self.pipeline.tokenizer
        num_tokens = len(tokenizer(prompt_clean(text), truncation=False, verbose=False).input_ids)
        if num_tokens <= self.max_sequence_length:
            return None
        return f"the {name} was cut: the text encoder reads {self.max_sequence_length} of its {num_tokens} tokens"


@contextmanager
def borrowed(pipeline: WanImageToVideoPipeline, *, few_step: bool = True, flow_shift: float = 5.0) -> Iterator[None]:
    """Set scheduler, adapters and progress bar of a pipeline for one run, and give it back as it was.

    Args:
        pipeline: of Stage I.
        few_step: `FixedSigmaScheduler` with the few-step adapters on, or `WanUniPCScheduler` with those off.
        flow_shift: time shift of the many-step schedule.

    Raises:
        AdapterError: see `few_step_adapters`.
    """
    scheduler, progress = pipeline.scheduler, getattr(pipeline, "_progress_bar_config", {})
    with ExitStack() as stack:
        for transformer in (pipeline.transformer, pipeline.transformer_2):
            if transformer is not None:
                stack.enter_context(few_step_adapters(transformer, enabled=few_step))
        try:
            pipeline.scheduler = _scheduler(scheduler, few_step=few_step, flow_shift=flow_shift)
            pipeline.set_progress_bar_config(**{**progress, "disable": True})
            yield
        except BaseException:
            # The pipeline does this at the end of a run, and an exception skips it; without it a cancelled run
            # would leave an offloaded network on the device and a stale cache in its hooks.
            pipeline.maybe_free_model_hooks()
            raise
        finally:
            pipeline.scheduler = scheduler
            pipeline.set_progress_bar_config(**progress)


@contextmanager
def few_step_adapters(transformer: torch.nn.Module, *, enabled: bool) -> Iterator[None]:
    """Turn the adapters of role `few_step` on or off, leave the other adapters and all scales, and restore on exit.

    Raises:
        AdapterError: adapters are merged into the weights, and the few-step ones not as they are needed.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # A layer with anything merged runs its plain weights, whatever is active beside that.
        if layer.merged and any((name in layer.merged_adapters) != enabled for name in _few_step_names(layer)):
            msg = f"adapters {layer.merged_adapters} are merged into the weights; unfuse them to sample in this mode"
            raise AdapterError(msg)
    saved = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers]
    trainable = [(parameter, parameter.requires_grad) for parameter in transformer.parameters()] if layers else []
    try:
        for layer, active, disabled in saved:
            others = [] if disabled else [name for name in active if not _is_few_step(name)]
            mine = _few_step_names(layer) if enabled else []
            layer.enable_adapters(enabled=True)
            layer.set_adapter([*others, *mine], inference_mode=True)
        yield
    finally:
        for layer, active, disabled in saved:
            layer.set_adapter(active, inference_mode=True)
            layer.enable_adapters(enabled=not disabled)
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def _is_few_step(name: str) -> bool:
    return name == FEW_STEP_ADAPTER or name.startswith(f"{FEW_STEP_ADAPTER}_")


def _few_step_names(layer: Any) -> list[str]:
    """Return the few-step adapters that a tuner layer holds, in the order of loading."""
    held = dict.fromkeys(name for part in layer.adapter_layer_names for name in getattr(layer, part))
    return [name for name in held if _is_few_step(name)]


def _uses_guidance(settings: GenerationSettings) -> bool:
    """Return whether each step also runs the network on the negative prompt."""
    return settings.stage_one_guidance_scale > 1


def _scheduler(current: Any, *, few_step: bool, flow_shift: float) -> Any:
    """Return a fresh scheduler: a run leaves its state in the one it used."""
    if not few_step:
        return WanUniPCScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    if isinstance(current, FixedSigmaScheduler):
        return FixedSigmaScheduler.from_config(current.config)
    return FixedSigmaScheduler()


def match_color(frames: Tensor, target: Tensor) -> Tensor:
    """Shift and scale each color of a window so that its first frame has the mean and deviation of `target`.

    The first frame repeats `target` up to the codec, whose small color error would add up from window to window. The
    scale is kept within 10%, so that a first frame that differs for another reason is not forced into shape.

    Args:
        frames: [n,h,w,3] in [0,1].
        target: [h,w,3] in [0,1], the frame that the window continues.

    Returns:
        [n,h,w,3] in [0,1].
    """
    mean, deviation = frames[0].mean(dim=(0, 1)), frames[0].std(dim=(0, 1), correction=0)
    wanted_mean, wanted_deviation = target.mean(dim=(0, 1)), target.std(dim=(0, 1), correction=0)
    gain = (wanted_deviation / deviation.clamp_min(1e-4)).clamp(0.9, 1.1)
    return ((frames - mean) * gain + wanted_mean).clamp(0.0, 1.0)


def cross_fade(held: Tensor, frames: Tensor) -> Tensor:
    """Blend the start of a window into the end of the one before it.

    Args:
        held: [m,h,w,3], the last frames of the window before.
        frames: [n,h,w,3] with n > m; its first m frames are those of `held` made again.

    Returns:
        [n,h,w,3]: frame 0 is ``held[0]``, then the share of `frames` grows by 1/m a frame until it is all at frame m.
    """
    share = (torch.arange(len(held), dtype=frames.dtype) / len(held)).view(-1, 1, 1, 1)
    return torch.cat([torch.lerp(held, frames[: len(held)], share), frames[len(held) :]])


def _to_uint8(frames: Tensor) -> Tensor:
    return (frames * 255).round().to(torch.uint8)
