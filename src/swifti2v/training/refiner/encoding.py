"""From a clip to what Stage II learns from: latents of the truth and of several hybrid references (paper, Stage II).

The references are made as inference makes them: the clip's first frame is the image, the clip reduced to Stage I's size
is redrawn by Stage I (`transition.py`) and becomes the motion reference. Without transition it is the reduced clip
itself, which is what Stage II would meet if Stage I were perfect.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from swifti2v.data.description import weights_digest
from swifti2v.errors import ConfigurationError, LatentCacheError
from swifti2v.geometry import CodecGeometry, Size, motion_size
from swifti2v.media.atomic_files import write_atomically
from swifti2v.pixels import from_uint8
from swifti2v.reference.hybrid import hybrid_reference
from swifti2v.reference.options import ReferenceOptions
from swifti2v.settings import ReferenceMode  # noqa: TC001 - an annotation that pydantic reads while it runs
from swifti2v.stage_one import StageOne
from swifti2v.training.refiner.transition import TransitionOptions, lightly_denoised
from swifti2v.training.refiner.windows import LATENTS, PROMPT, REFERENCE
from swifti2v.wan.checkpoint_files import read_json
from swifti2v.wan.checkpoints import load_other_stage_one, load_stage_one_pipeline, load_stage_two_vae, resolve
from swifti2v.wan.streaming import open_codec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from swifti2v.data.clips import Clip
    from swifti2v.stage_one import MotionStage, PromptEmbeds
    from swifti2v.wan.checkpoints import ResolvedCheckpoint
    from swifti2v.wan.streaming import StreamingCodec


EMPTY_PROMPT_NAME = "empty_prompt.safetensors"
"""In the folder of a cache: `prompt_embeds` of no words, which guidance leads away from in training."""


@dataclass(frozen=True)
class EncodingOptions:
    """Which references of a clip are made.

    Args:
        transition: how Stage I redraws the clip; None: no references of this kind.
        unchanged: whether there is also a reference of the reduced clip as it is.
        modes: constructions of the hybrid reference; every motion reference is used in each of them.
        flow_scale: of `transport`.
        seed: of levels and noise.
    """

    transition: TransitionOptions | None = field(default_factory=TransitionOptions)
    unchanged: bool = False
    modes: tuple[ReferenceMode, ...] = ("transport", "replace")
    flow_scale: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class EncodingParts:
    """What of a checkpoint makes references: all but Stage II's transformer.

    Args:
        stage_one: with all its adapters.
        codec: of Stage II.
        codec_digest: of its weights as they were loaded, for the description of a cache.
        geometry: of Stage II's latents and tokens.
        motion_reduction: output size over motion size.
        motion_max_area: pixels of a motion frame at most, None for no limit.
        device: where all of it is.
    """

    stage_one: MotionStage
    codec: StreamingCodec
    codec_digest: str
    geometry: CodecGeometry
    motion_reduction: float
    motion_max_area: int | None
    device: torch.device

    def motion_size(self, size: Size) -> Size:
        """Return the size of the motion reference of clips of `size`, as at inference."""
        multiple = self.stage_one.geometry.size_multiple
        return motion_size(size, reduction=self.motion_reduction, max_area=self.motion_max_area, multiple=multiple)


def load_encoding_parts(checkpoint: str | Path, *, device: torch.device) -> EncodingParts:
    """Load what `StageTwoEncoder` needs, float32 on a CPU and bfloat16 elsewhere.

    Raises:
        CheckpointError: the checkpoint cannot be found, downloaded or read.
    """
    resolved = resolve(checkpoint)
    one, two = resolved.index.stage_one, resolved.index.stage_two
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    vae: Any = load_stage_two_vae(resolved, dtype=dtype)
    codec_digest = weights_digest(dict(vae.config), vae.state_dict())
    codec = open_codec(vae.to(device).eval())
    config = read_json(resolved.folder_of("stage_two") / two.transformer_subfolder / "config.json")
    return EncodingParts(
        stage_one=_stage_one(resolved, dtype, device),
        codec=codec,
        codec_digest=codec_digest,
        geometry=CodecGeometry(codec.spatial_factor, codec.temporal_factor, config["patch_size"][1]),
        motion_reduction=one.reference_reduction,
        motion_max_area=one.max_area,
        device=device,
    )


def _stage_one(resolved: ResolvedCheckpoint, dtype: torch.dtype, device: torch.device) -> MotionStage:
    one = resolved.index.stage_one
    if one.kind != "wan":
        stage: MotionStage = load_other_stage_one(resolved)
        return stage
    pipeline = load_stage_one_pipeline(resolved, dtype=dtype).to(device)
    return StageOne(pipeline, window_frames=one.window_frames, max_sequence_length=one.max_sequence_length)


class StageTwoEncoder:
    """Encodes clips with the parts of a checkpoint; one clip is held in memory at a time.

    Args:
        parts: of `load_encoding_parts`.
        options: see `EncodingOptions`.

    Raises:
        ConfigurationError: references are to be redrawn, and Stage I has no latents to redraw them in.
    """

    def __init__(self, parts: EncodingParts, options: EncodingOptions) -> None:
        if options.transition is not None and not isinstance(parts.stage_one, StageOne):
            msg = "Stage I of this checkpoint moves the image and redraws nothing; set transition to null"
            raise ConfigurationError(msg, param="transition")
        self.parts = parts
        self.options = options

    @torch.no_grad()
    def __call__(self, clip: Clip) -> dict[str, Tensor]:
        """Return `latents` and ``reference.N`` [C,T,h,w] float16, and `prompt_embeds` [L,D] float16, on the CPU."""
        pixels = from_uint8(clip.frames)
        embeds = self.parts.stage_one.encode_prompt(clip.prompt)
        tensors = {LATENTS: self._encoded(_chunks(pixels)), PROMPT: embeds.prompt[0].to("cpu", torch.float16)}
        references = (
            self._encoded(
                hybrid_reference(
                    [motion],
                    pixels[0, :, 0],
                    options=ReferenceOptions(mode=mode, flow_scale=self.options.flow_scale),
                    device=self.parts.device,
                    temporal_factor=self.parts.geometry.temporal,
                )
            )
            for motion in self.motion_references(clip, embeds)
            for mode in self.options.modes
        )
        return tensors | {f"{REFERENCE}{number}": latents for number, latents in enumerate(references)}

    @torch.no_grad()
    def write_empty_prompt(self, cache: Path) -> None:
        """Encode "", which stands for a prompt that is dropped, for `read_empty_prompt`."""
        embeds = self.parts.stage_one.encode_prompt("").prompt[0].to("cpu", torch.float16)
        write_atomically(cache / EMPTY_PROMPT_NAME, save({PROMPT: embeds.contiguous()}), writer="empty")

    def motion_references(self, clip: Clip, prompt_embeds: PromptEmbeds) -> Iterator[Tensor]:
        """Yield the motion references of a clip, uint8 [F,h,w,3] at Stage I's size, the unchanged one first."""
        height, width = clip.frames.shape[1:3]
        reduced = torch.from_numpy(resized(clip.frames, self.parts.motion_size(Size(width, height))))
        if self.options.unchanged:
            yield reduced
        transition = self.options.transition
        if transition is None or not isinstance(self.parts.stage_one, StageOne):
            return
        generator = torch.Generator("cpu").manual_seed(_seed_of(clip.name, self.options.seed))
        for _ in range(transition.num_variants):
            sigma = transition.draw(generator)
            seed = int(torch.randint(2**62, (1,), generator=generator))
            yield lightly_denoised(self.parts.stage_one, reduced, prompt_embeds, sigma=sigma, seed=seed)

    def _encoded(self, chunks: Iterator[Tensor]) -> Tensor:
        on_device = (chunk.to(self.parts.device) for chunk in chunks)
        latents = self.parts.codec.encode_stream(on_device)
        return torch.cat([latent.to("cpu", torch.float16) for latent in latents], dim=2)[0]


def read_empty_prompt(cache: Path) -> Tensor | None:
    """Return the embedding [L,D] of no words; None where a cache was made without it.

    Raises:
        LatentCacheError: the file is damaged.
    """
    path = cache / EMPTY_PROMPT_NAME
    if not path.exists():
        return None
    try:
        return load_file(path)[PROMPT]
    except (SafetensorError, OSError, KeyError) as error:
        msg = f"{str(path)!r} is damaged; run train transition on this cache again: its clips are kept"
        raise LatentCacheError(msg) from error


def resized(
    frames: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], size: Size
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return frames uint8 [F,H,W,3] at `size` by Lanczos, the filter with which inference reduces the input image."""
    lanczos, sides = PIL.Image.Resampling.LANCZOS, (size.width, size.height)
    reduced = [PIL.Image.fromarray(frame).resize(sides, lanczos) for frame in frames]
    return np.stack([np.asarray(frame) for frame in reduced])


def _chunks(pixels: Tensor) -> Iterator[Tensor]:
    yield pixels[:, :, :1]
    yield from torch.split(pixels[:, :, 1:], 4, dim=2)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
