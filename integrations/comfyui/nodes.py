"""The nodes: Load, Stage I, Reference, Stage II, Save.

Between them travel ComfyUI's IMAGE tensors, float32 [F,H,W,3] in [0, 1], so that the motion reference may come from any
other video nodes, and every stage can be looked at. The package does the work; `comfy` and `folder_paths` are imported
where they are used, and only there.
"""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from swifti2v import InvalidInputError, Size, TwoStagePipeline
from swifti2v.media.images import image_to_tensor
from swifti2v.media.video_writer import VideoWriter
from swifti2v.memory.limits import MemoryLimits
from swifti2v.memory.placement import PlacedNetworks
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.runner.fitting import place, plan_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from swifti2v.runner.parts import Parts
    from swifti2v.runs import GenerationRequest, Progress
    from swifti2v.settings import GenerationSettings

CATEGORY = "SwiftI2V"
PIPELINE, REQUEST = "SWIFTI2V_PIPELINE", "SWIFTI2V_REQUEST"
FROM_CHECKPOINT = 0
"""In a number field: what the checkpoint recommends."""

_PIECE_FRAMES = 16


class SwiftI2VLoad:
    """Loads a checkpoint: `mini` (embedded), `wan2.2`, a folder or a Hugging Face repository."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        memory = {"default": "auto", "tooltip": "Device memory to plan for: auto, 24GiB, ...; empty: all on the device"}
        return {
            "required": {
                "model": ("STRING", {"default": "wan2.2"}),
                "device": (["auto", "cuda", "cpu"],),
                "memory": ("STRING", memory),
            }
        }

    def load(self, model: str, device: str, memory: str) -> tuple[TwoStagePipeline]:
        """Return the pipeline."""
        limits = MemoryLimits.parse(memory) if memory.strip() else None
        place_of_work = None if device == "auto" else device
        return (TwoStagePipeline.from_pretrained(model, device=place_of_work, memory=limits),)


class SwiftI2VStageOne:
    """Stage I: image and prompt become the motion reference, a small video."""

    CATEGORY = CATEGORY
    FUNCTION = "generate"
    RETURN_TYPES = (REQUEST, "IMAGE")
    RETURN_NAMES = ("request", "motion")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "image": ("IMAGE",),
                "prompt": ("STRING", {"multiline": True, "default": ""}),
                "width": ("INT", {"default": 2560, "min": 32, "max": 8192, "step": 32}),
                "height": ("INT", {"default": 1408, "min": 32, "max": 8192, "step": 32}),
                "num_frames": ("INT", {"default": 81, "min": 1, "max": 1281, "step": 4}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**63 - 1}),
            }
        }

    @torch.no_grad()
    def generate(
        self,
        pipeline: TwoStagePipeline,
        image: Tensor,
        prompt: str,
        width: int,
        height: int,
        num_frames: int,
        seed: int,
    ) -> tuple[GenerationRequest, Tensor]:
        """Return the request, for the nodes behind this one, and the motion reference."""
        if len(image) != 1:
            msg = f"Stage I starts from one picture, and {len(image)} are given; choose one of them"
            raise InvalidInputError(msg)
        picture = Image.fromarray(_bytes(image)[0].numpy())
        request = pipeline.request(picture, prompt, size=Size(width, height), num_frames=num_frames, seed=seed)
        with _placed(pipeline, request.settings) as parts:
            small = TwoStagePipeline(parts).preview(request, on_progress=_progress_bar())
            with closing(small) as pieces:
                motion = torch.cat([_floats(piece.frames) for piece in pieces])
        return request, motion


class SwiftI2VReference:
    """The hybrid reference: the motion reference at output size, with the input image in it."""

    CATEGORY = CATEGORY
    FUNCTION = "build"
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("reference",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "request": (REQUEST,),
                "motion": ("IMAGE",),
                "mode": (["transport", "replace"],),
                "flow_scale": ("FLOAT", {"default": 0.5, "min": 0.02, "max": 1.0, "step": 0.01}),
            }
        }

    @torch.no_grad()
    def build(
        self, pipeline: TwoStagePipeline, request: GenerationRequest, motion: Tensor, mode: Any, flow_scale: float
    ) -> tuple[Tensor]:
        """Return the reference."""
        chunks = hybrid_reference(
            (_bytes(piece) for piece in motion.split(_PIECE_FRAMES)),
            image_to_tensor(request.image),
            options=ReferenceOptions(mode=mode, flow_scale=flow_scale),
            device=pipeline.parts.device,
            temporal_factor=pipeline.parts.stage_two.geometry.temporal,
        )
        frames = [chunk[0].permute(1, 2, 3, 0).add(1).div(2).cpu() for chunk in chunks]
        return (torch.cat(frames).clamp_(0, 1),)


class SwiftI2VStageTwo:
    """Stage II: the reference is refined segment by segment, and decoded."""

    CATEGORY = CATEGORY
    FUNCTION = "refine"
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        open_choice = {"default": FROM_CHECKPOINT, "min": 0, "tooltip": "0: what the checkpoint recommends"}
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "request": (REQUEST,),
                "reference": ("IMAGE",),
                "steps": ("INT", open_choice | {"max": 1000}),
                "segment_size": ("INT", open_choice | {"max": 1000}),
                "guidance_scale": ("FLOAT", open_choice | {"default": 0.0, "max": 100.0, "step": 0.1}),
            }
        }

    @torch.no_grad()
    def refine(
        self,
        pipeline: TwoStagePipeline,
        request: GenerationRequest,
        reference: Tensor,
        steps: int,
        segment_size: int,
        guidance_scale: float,
    ) -> tuple[Tensor, float]:
        """Return the video and its frames per second."""
        num_frames, height, width = reference.shape[:3]
        choices = {
            "size": Size(width, height),
            "num_frames": num_frames,
            "num_inference_steps": steps or None,
            "segment_size": segment_size or None,
            "guidance_scale": guidance_scale or None,
        }
        settings = request.settings.settled(choices)
        with _placed(pipeline, settings) as parts:
            pieces = _refined(parts, request.prompt, settings, reference)
            frames = torch.cat([_floats(piece.cpu()) for piece in pieces])
        return frames, settings.fps


class SwiftI2VSave:
    """Writes an H.264 MP4 into ComfyUI's output folder."""

    CATEGORY = CATEGORY
    FUNCTION = "save"
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        """Describe the fields."""
        return {
            "required": {
                "frames": ("IMAGE",),
                "fps": ("FLOAT", {"default": 16.0, "min": 1.0, "max": 240.0}),
                "filename_prefix": ("STRING", {"default": "SwiftI2V"}),
            }
        }

    def save(self, frames: Tensor, fps: float, filename_prefix: str) -> dict[str, Any]:
        """Write the file, and return what ComfyUI shows of it."""
        import folder_paths

        height, width = frames.shape[1:3]
        folder, name, counter, subfolder, _prefix = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        path = Path(folder) / f"{name}_{counter:05}_.mp4"
        with VideoWriter(path, size=Size(width, height), fps=fps) as writer:
            for piece in frames.split(_PIECE_FRAMES):
                writer.write(_bytes(piece))
        shown = {"filename": path.name, "subfolder": subfolder, "type": "output"}
        return {"ui": {"images": [shown], "animated": (True,)}}


NODE_CLASS_MAPPINGS: dict[str, type] = {
    node.__name__: node for node in (SwiftI2VLoad, SwiftI2VStageOne, SwiftI2VReference, SwiftI2VStageTwo, SwiftI2VSave)
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SwiftI2VLoad": "SwiftI2V Load",
    "SwiftI2VStageOne": "SwiftI2V Stage I (motion)",
    "SwiftI2VReference": "SwiftI2V Reference",
    "SwiftI2VStageTwo": "SwiftI2V Stage II (refine)",
    "SwiftI2VSave": "SwiftI2V Save video",
}


def _refined(parts: Parts, prompt: str, settings: GenerationSettings, reference: Tensor) -> Iterator[Tensor]:
    """Yield uint8 [f,H,W,3], a latent frame at a time."""
    show = _progress_bar()
    total = len(parts.stage_two.plan(settings)) * settings.num_inference_steps
    guided = settings.guidance_scale > 1
    embeds = parts.stage_one.encode_prompt(prompt, settings.negative_prompt if guided else None)
    latents = parts.stage_two.refine(
        _chunks(reference, parts.stage_two.geometry.temporal, parts.device),
        settings,
        prompt_embeds=embeds.prompt,
        negative_prompt_embeds=embeds.negative,
        on_step=lambda segment, step, steps: show(segment.index * steps + step + 1, total),
    )
    return parts.stage_two.codec.decode_stream(item.latents for item in latents)


def _chunks(frames: Tensor, temporal_factor: int, device: torch.device) -> Iterable[Tensor]:
    """Yield the frames of each latent frame, [1,3,f,H,W] in [-1, 1]: 1, then `temporal_factor`."""
    starts = [0, *range(1, len(frames), temporal_factor)]
    for start, stop in zip(starts, [*starts[1:], len(frames)], strict=True):
        yield frames[start:stop].permute(3, 0, 1, 2)[None].to(device, torch.float32).mul(2).sub(1).contiguous()


@contextmanager
def _placed(pipeline: TwoStagePipeline, settings: GenerationSettings) -> Iterator[Parts]:
    """Hold the networks where a plan within the memory limits of the pipeline wants them."""
    parts = pipeline.parts
    if parts.memory is None:
        yield parts
        return
    networks = PlacedNetworks(parts.device)
    try:
        yield place(parts, plan_for(parts, settings, parts.memory), networks)
    finally:
        networks.release()


def _progress_bar() -> Callable[..., None]:
    """Return what shows progress in ComfyUI, and stops where its user wishes to; outside of ComfyUI, nothing."""
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.utils import ProgressBar
    except ImportError:
        return _ignore
    bar = ProgressBar(1)

    def show(progress: Progress | int, total: int = 1) -> None:
        throw_exception_if_processing_interrupted()
        done, total = (progress, total) if isinstance(progress, int) else (progress.done, progress.total)
        bar.update_absolute(done, total)

    return show


def _ignore(*_progress: Any) -> None:
    """Show nothing."""


def _bytes(frames: Tensor) -> Tensor:
    return frames.cpu().clamp(0, 1).mul(255).round_().to(torch.uint8)


def _floats(frames: Tensor) -> Tensor:
    return frames.to(torch.float32).div_(255)
