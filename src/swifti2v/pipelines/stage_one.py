"""Stage I: the motion reference, from an unmodified `WanImageToVideoPipeline` (paper, figure "method").

A clip longer than the trained length is made window by window, each continuing from a frame of the one before it, so
that time is linear in the length and memory does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import prompt_clean
from peft.tuners.tuners_utils import BaseTunerLayer

from swifti2v.errors import AdapterError, InvalidInputError
from swifti2v.geometry import CodecGeometry, Size
from swifti2v.pipelines.windows import cross_fade, match_color
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
        notes: what was done to the prompts, one sentence each ("the prompt was cut ...").
    """

    prompt: Tensor
    negative: Tensor | None = None
    notes: tuple[str, ...] = ()

    def tensors(self) -> dict[str, Tensor]:
        """Return what there is of them, by name."""
        return {"prompt": self.prompt} | ({} if self.negative is None else {"negative": self.negative})


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
        named = (("prompt", prompt), ("negative prompt", negative_prompt or ""))
        notes = tuple(note for name, text in named if (note := self.cut_note(name, text)))
        return PromptEmbeds(positive, negative, notes)

    def generate(
        self,
        image: PIL.Image.Image,
        prompt: str | None,
        settings: GenerationSettings,
        *,
        size: Size,
        prompt_embeds: PromptEmbeds | None = None,
        on_step: OnStageOneStep | None = None,
    ) -> Iterator[Tensor]:
        """Make the motion reference.

        Args:
            image: RGB, already of `size` (`swifti2v.media.images.fit_image`).
            prompt: text, or None with `prompt_embeds`.
            settings: frames, seed, steps and guidance. Few steps are those of the distillation's fixed schedule if
                there are as many, and follow the same curve otherwise. The first window is exactly the pipeline's own
                result for a CPU generator of the seed.
            size: of the motion reference, in multiples of the codec's factor times the patch (16 for Wan2.2-A14B).
            prompt_embeds: from `encode_prompt`, instead of `prompt`.
            on_step: progress over all windows; to cancel, raise in it.

        Returns:
            An iterator of uint8 [n,h,w,3] on the CPU, a piece as each window finishes, `num_frames` frames in all.

        Raises:
            InvalidInputError: at the call, for an argument that cannot be used.
            AdapterError: while iterating, if adapters are merged so that the few-step ones cannot be turned on or off.
        """
        self.geometry.check_size(size)
        windows = self.plan(settings.num_frames)
        if image.size != tuple(size) or image.mode != "RGB":
            msg = f"the image is {Size(*image.size)} {image.mode}, not {size} RGB; crop and resize it with fit_image"
            raise InvalidInputError(msg, param="image", value=image.size)
        self.check_settings(settings)
        if (prompt is None) == (prompt_embeds is None):
            msg = "give either prompt or prompt_embeds, not both or none; an empty prompt is written ''"
            raise InvalidInputError(msg)
        if prompt_embeds is not None and _uses_guidance(settings) and prompt_embeds.negative is None:
            msg = "guidance needs negative embeddings; call encode_prompt with a negative_prompt (it may be empty)"
            raise InvalidInputError(msg)

        def make(index: int, start: PIL.Image.Image, embeds: PromptEmbeds) -> Tensor:
            def step(step_index: int) -> None:
                if on_step is not None:
                    steps = settings.stage_one_steps
                    on_step(index * steps + step_index, len(windows) * steps)

            window_seed = settings.seed if index == 0 else derived_seed(settings.seed, index)
            return self._run(start, embeds, len(windows[index]), window_seed, settings, step)

        return self._windows(image, prompt, prompt_embeds, settings, windows, make)

    def _windows(
        self,
        image: PIL.Image.Image,
        prompt: str | None,
        embeds: PromptEmbeds | None,
        settings: GenerationSettings,
        windows: tuple[range, ...],
        make: Callable[[int, PIL.Image.Image, PromptEmbeds], Tensor],
    ) -> Iterator[Tensor]:
        if embeds is None:
            embeds = self.encode_prompt(prompt or "", settings.negative_prompt if _uses_guidance(settings) else None)
        held: Tensor | None = None
        for index, window in enumerate(windows):
            if held is None:
                frames = make(index, image, embeds)
            else:
                frames = make(index, PIL.Image.fromarray(_to_uint8(held[0]).numpy()), embeds)
                frames = cross_fade(held, match_color(frames, held[0]))
            last = index == len(windows) - 1
            num_done = len(window) if last else len(window) - self.overlap_frames
            # A clone: a view would keep the whole window alive while the next one is made.
            held = None if last else frames[num_done:].clone()
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
                prompt_embeds=embeds.prompt,
                negative_prompt_embeds=embeds.negative if _uses_guidance(settings) else None,
                max_sequence_length=self.max_sequence_length,
                output_type="pt",
                return_dict=False,
                callback_on_step_end=after_step,
            )
        return video[0].to("cpu", torch.float32).permute(0, 2, 3, 1)

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


def _to_uint8(frames: Tensor) -> Tensor:
    return (frames * 255).round().to(torch.uint8)
