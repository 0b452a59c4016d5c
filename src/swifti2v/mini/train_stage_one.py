"""Stage I of `mini`: image and prompt to motion, learned from procedural motion over photographs.

The codec is fitted first (`fit_motion_codec`), then the transformer and the text encoder are trained together to
predict the clean latents from noisy ones (flow matching, x0 form) on clips whose motion is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swifti2v.data.procedural import REFERENCE_FRAMES, describe, displacement, find_horizon, render, sample_motions
from swifti2v.geometry import Size
from swifti2v.mini.fitting import BandStatistics
from swifti2v.mini.motion_codec import MOTION_CHANNELS, MotionCodec
from swifti2v.mini.motion_transformer import MASK_CHANNELS, POSITION_CHANNELS, MotionTransformer
from swifti2v.mini.text import encode_prompts
from swifti2v.mini.transform_codec import BLOCK, TEMPORAL
from swifti2v.pixels import from_uint8
from swifti2v.training.engine.prefetcher import Prefetcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from swifti2v.data.sources import MediaItem


CODEC_SIZE = Size(320, 176)


@dataclass(frozen=True)
class ClipShape:
    """Shape of a training batch, how often it is drawn, and in which part of the run (0 start, 1 end)."""

    num_latent_frames: int
    width: int
    height: int
    batch_size: int
    weight: float
    begins: float = 0.0
    ends: float = 1.0


@dataclass(frozen=True)
class StageOneRecipe:
    """Everything that decides what Stage I of `mini` becomes, but for the data.

    Args:
        width, num_layers, ffn_width: of the transformer; heads are 128 wide.
        residual_weight: of the loss on the residual channels, which are mostly unpredictable.
        smoothness_weight: of the loss on differences of the motion between neighbouring blocks and frames.
        energy_floor: mean square of a clip's motion (latents) down to which its errors count in proportion to it.
        num_steps: of the run; places `begins` and `ends` of the shapes.
        shapes: batches to draw from. What the words mean is learned first, on many small clips; then how motion looks
            at the size and length of use, on few large ones.
    """

    width: int = 256
    num_layers: int = 5
    ffn_width: int = 512
    text_width: int = 96
    vocabulary_size: int = 1024
    max_sequence_length: int = 48
    residual_weight: float = 0.1
    smoothness_weight: float = 4.0
    energy_floor: float = 0.001
    sigma_shift: float = 5.0
    seed: int = 0
    num_steps: int = 1500
    shapes: tuple[ClipShape, ...] = field(
        default_factory=lambda: (
            ClipShape(9, 96, 64, 24, 0.5, ends=0.65),
            ClipShape(21, 80, 48, 16, 0.5, ends=0.65),
            ClipShape(21, 160, 96, 4, 0.35, begins=0.65),
            ClipShape(9, 256, 144, 4, 0.20, begins=0.65),
            ClipShape(6, 320, 176, 4, 0.20, begins=0.65),
            ClipShape(9, 128, 192, 6, 0.10, begins=0.65),
            ClipShape(21, 320, 176, 1, 0.15, begins=0.8),
        )
    )


def load_photographs(items: Sequence[MediaItem], *, max_width: int) -> list[NDArray[np.uint8]]:
    """Read photographs as uint8 [H,W,3], reduced to `max_width`."""
    photographs = []
    for item in items:
        picture = cv2.cvtColor(cv2.imread(str(item.path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        scale = min(1.0, max_width / picture.shape[1])
        photographs.append(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return photographs


@dataclass(frozen=True)
class ProceduralClip:
    """A clip with known motion: frames [3,F,H,W] in [-1,1], motion to frame 0 [2,F,H,W] in widths, prompt."""

    frames: Tensor
    motion: Tensor
    prompt: str


def procedural_clip(
    photograph: NDArray[np.uint8], caption: str, *, size: Size, num_frames: int, rng: np.random.Generator
) -> ProceduralClip:
    """Draw a crop, motions and a prompt, and render the clip."""
    if rng.random() < 0.5:
        photograph = photograph[:, ::-1]
    height, width = photograph.shape[:2]
    widest = min(width, height * size.width / size.height) * 0.85
    crop_width = float(rng.uniform(min(max(size.width, 0.4 * widest), widest), widest))
    crop_width = max(crop_width, size.width)
    crop_height = crop_width * size.height / size.width
    centre = (
        float(rng.uniform(crop_width / 2, max(crop_width / 2, width - crop_width / 2))),
        float(rng.uniform(crop_height / 2, max(crop_height / 2, height - crop_height / 2))),
    )
    still = render(
        photograph, np.zeros((1, size.height, size.width, 2), np.float32), centre=centre, crop_width=crop_width
    )
    motions = sample_motions(rng)
    moved = displacement(motions, size=size, num_frames=num_frames, horizon=find_horizon(still[0]))
    frames = render(photograph, moved, centre=centre, crop_width=crop_width)
    prompt = describe(motions, rng)
    if rng.random() < 0.5:
        prompt = f"{caption} {prompt}" if rng.random() < 0.7 else f"{prompt}. {caption}"
    return ProceduralClip(
        frames=from_uint8(frames)[0],
        motion=torch.from_numpy(moved).permute(3, 0, 1, 2),
        prompt=prompt,
    )


def fit_motion_codec(
    photographs: Sequence[NDArray[np.uint8]],
    *,
    image_channels: int = 56,
    residual_band_channels: tuple[int, int, int, int] = (32, 8, 8, 8),
    size: Size = CODEC_SIZE,
    seed: int = 0,
) -> MotionCodec:
    """Fit both transforms and the deviations of the latents on procedural clips."""
    rng = np.random.default_rng(seed)
    images = BandStatistics(seed=seed)
    residuals = BandStatistics(centred=False, seed=seed)
    clips = [procedural_clip(p, "", size=size, num_frames=41, rng=rng) for p in photographs for _ in range(2)]
    images.add(clip.frames[None, :, :1] for clip in clips)
    codec = MotionCodec(image_channels, residual_band_channels)
    codec.image_transform, image_deviation = images.fit((image_channels, 0, 0, 0))
    for clip in clips:
        residuals.add(_residuals(codec, clip))
    codec.residual_transform, residual_deviation = residuals.fit(residual_band_channels)
    motion_deviation = torch.stack([clip.motion.square().mean() for clip in clips]).mean().sqrt()
    motion_deviation *= REFERENCE_FRAMES / 40
    # One deviation serves the image in frame 0 and the residual in the others: the larger, so that neither exceeds 1.
    deviation = torch.cat(
        [motion_deviation.expand(MOTION_CHANNELS), torch.maximum(image_deviation, residual_deviation)]
    )
    codec.register_to_config(latents_std=[round(float(value), 6) for value in deviation])
    return codec


def _residuals(codec: MotionCodec, clip: ProceduralClip) -> list[Tensor]:
    anchor = codec.decoded_image(codec.image_transform.analyse(clip.frames[None, :, :1]))
    blocks = F.avg_pool3d(clip.motion[None], (1, BLOCK, BLOCK))
    warped = codec.warped(anchor, blocks)
    return list(torch.split((clip.frames[None] - warped)[:, :, 1:], TEMPORAL, dim=2))


class StageOneObjective:
    """Predict the clean motion latents of procedural clips; the `Objective` of Stage I."""

    def __init__(
        self,
        recipe: StageOneRecipe,
        *,
        codec: MotionCodec,
        tokenizer: PreTrainedTokenizerFast,
        text_encoder: UMT5EncoderModel,
        transformer: MotionTransformer,
        photographs: Sequence[NDArray[np.uint8]],
        captions: Sequence[str],
    ) -> None:
        self.recipe = recipe
        self.codec = codec
        self.tokenizer = tokenizer
        self.module: nn.Module = nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})
        self._transformer = transformer
        self._text_encoder = text_encoder
        self._photographs = photographs
        self._captions = captions
        self._batches = Prefetcher(self._batch)

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one batch of one shape, a function of the weights and `step`."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        clean, prompts = self._batches.take(step)
        sigma = self._sigmas(len(prompts), generator)
        noise = torch.randn(clean.shape, generator=generator)
        sigma_like = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - sigma_like) * clean + sigma_like * noise
        predicted = self._predict(noisy, clean, sigma, prompts)
        return self._compare(predicted[:, :, 1:].float(), clean[:, :, 1:])

    def _predict(self, noisy: Tensor, clean: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
        batch, _, frames, height, width = clean.shape
        image = torch.zeros_like(clean)
        image[:, :, :1] = clean[:, :, :1]
        mask = torch.zeros(batch, MASK_CHANNELS, frames, height, width)
        mask[:, :, 0] = 1
        text = encode_prompts(
            self.tokenizer,
            self._text_encoder,
            prompts,
            max_sequence_length=self.recipe.max_sequence_length,
        )
        joined = torch.cat([noisy, mask, image], dim=1)
        return self._transformer.predict_clean(joined, sigma * 1000, text)

    def _compare(self, predicted: Tensor, clean: Tensor) -> tuple[Tensor, dict[str, float]]:
        error = predicted - clean
        # A wave is a hundredth of a pan in width: judged by the mean square alone it would never be learned.
        energy = clean[:, :MOTION_CHANNELS].square().mean(dim=(1, 2, 3, 4), keepdim=True)
        weight = (energy + self.recipe.energy_floor).rsqrt()
        motion, residual = weight * error[:, :MOTION_CHANNELS], error[:, MOTION_CHANNELS:]
        # Channels are (frame of four, x or y): put the frames of the whole clip in one axis before differencing.
        frames = torch.unflatten(motion, 1, (4, 2)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        roughness = torch.stack([frames.diff(dim=axis).square().mean() for axis in (2, 3, 4)]).sum()
        motion_loss = motion.square().mean()
        residual_loss = residual.square().mean()
        loss = motion_loss + self.recipe.smoothness_weight * roughness + self.recipe.residual_weight * residual_loss
        still = clean[:, :MOTION_CHANNELS].square().mean()
        numbers = {"motion": motion_loss, "residual": residual_loss, "roughness": roughness, "still": still}
        return loss, {name: float(value.detach()) for name, value in numbers.items()}

    def _batch(self, step: int) -> tuple[Tensor, list[str]]:
        """Normalised latents [B,z,F,h,w] and prompts of one shape."""
        rng = np.random.default_rng([self.recipe.seed, step])
        shape = self._shape(step, rng)
        latents, prompts = [], []
        for _ in range(shape.batch_size):
            index = int(rng.integers(len(self._photographs)))
            clip = procedural_clip(
                self._photographs[index],
                self._captions[index],
                size=Size(shape.width, shape.height),
                num_frames=4 * (shape.num_latent_frames - 1) + 1,
                rng=rng,
            )
            latents.append(self.codec.encode_with_motion(clip.frames[None], clip.motion[None, :, 1:]))
            prompts.append(clip.prompt)
        deviation = torch.tensor(self.codec.config.latents_std).view(1, -1, 1, 1, 1)
        return torch.cat(latents) / deviation, prompts

    def _shape(self, step: int, rng: np.random.Generator) -> ClipShape:
        progress = min(step / self.recipe.num_steps, 1.0)
        active = [shape for shape in self.recipe.shapes if shape.begins <= progress <= shape.ends]
        weights = np.array([shape.weight for shape in active])
        return active[int(rng.choice(len(active), p=weights / weights.sum()))]

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(count, generator=generator).clamp(min=0.02)
        shift = self.recipe.sigma_shift
        sigmas = shift * uniform / (1 + (shift - 1) * uniform)
        # The first of the four steps starts from pure noise and decides most: meet it often.
        return torch.where(torch.rand(count, generator=generator) < 0.35, torch.ones(count), sigmas)


def make_motion_transformer(recipe: StageOneRecipe, codec: MotionCodec) -> MotionTransformer:
    """Build Stage I's transformer at the recipe's size, random weights."""
    torch.manual_seed(recipe.seed)
    channels = codec.config.z_dim
    return MotionTransformer(
        patch_size=(1, 2, 2),
        num_attention_heads=recipe.width // 128,
        attention_head_dim=128,
        in_channels=2 * channels + MASK_CHANNELS + POSITION_CHANNELS,
        out_channels=channels + 2 * MOTION_CHANNELS,
        text_dim=recipe.text_width,
        freq_dim=256,
        ffn_dim=recipe.ffn_width,
        num_layers=recipe.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
