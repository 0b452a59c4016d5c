"""Stage I of `mini`: a picture and a prompt to the motion reference, by one path for the whole clip.

Every frame is sampled once, from the picture continued beyond its borders (`Canvas`), at twice the size of the motion
reference, and reduced with the filter that reduces the picture itself: so no frame is softer than frame 0. There are no
windows; a clip of any length is made piece by piece in the memory of one piece.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import PIL.Image
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from swifti2v.errors import InvalidInputError
from swifti2v.geometry import CodecGeometry
from swifti2v.mini.network import MotionNetwork, grid_of, picture_features, sample, to_path
from swifti2v.mini.prompt_notes import notes_of_motion, notes_of_prompt
from swifti2v.mini.render import render_path
from swifti2v.mini.text import encoded
from swifti2v.stage_one import PromptEmbeds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from swifti2v.geometry import Size
    from swifti2v.mini.path import MotionPath
    from swifti2v.settings import GenerationSettings
    from swifti2v.stage_one import OnStageOneStep

_SETTINGS = "settings.json"


def write_settings(folder: Path, *, max_sequence_length: int) -> None:
    """Write what of a Stage I stands beside its networks."""
    settings = {"max_sequence_length": max_sequence_length}
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class PlannedMotion:
    """What a clip will do, known before its first frame.

    Args:
        path: the motion.
        share: of the asked speed at which it happens; below 1 where a long clip would leave the picture.
        travel: greatest displacement of any place over the clip, in widths of the picture.
        notes: what a person should be told of it, a sentence each.
    """

    path: MotionPath
    share: float
    travel: float
    notes: tuple[str, ...]


class PathStageOne:
    """The motion reference of a picture and a prompt; the face of `swifti2v.stage_one.StageOne`.

    Args:
        network: in float32, on the CPU: it has some hundred tokens.
        text_encoder, tokenizer: of the prompts.
        max_sequence_length: tokens that are read of a prompt.
    """

    def __init__(
        self,
        network: MotionNetwork,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_sequence_length: int = 64,
    ) -> None:
        self.network = network.eval().requires_grad_(requires_grad=False)
        self.text_encoder = text_encoder.eval().requires_grad_(requires_grad=False)
        self.tokenizer = tokenizer
        self.max_sequence_length = max_sequence_length
        self.geometry = CodecGeometry(spatial=8, temporal=4, patch=2)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Load ``network``, ``text_encoder``, ``tokenizer`` and ``settings.json`` of a folder."""
        folder = Path(folder)
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        return cls(
            MotionNetwork.from_pretrained(folder / "network", torch_dtype=torch.float32),
            UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
            PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
            max_sequence_length=settings["max_sequence_length"],
        )

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write what `from_pretrained` reads, networks in `dtype`."""
        folder = Path(folder)
        self.network.to(dtype).save_pretrained(folder / "network")
        self.text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        write_settings(folder, max_sequence_length=self.max_sequence_length)
        self.network.float()
        self.text_encoder.float()

    @torch.no_grad()
    def encode_prompt(self, prompt: str, negative_prompt: str | None = None) -> PromptEmbeds:
        """Encode a prompt, and a negative one if given, which only Stage II may use."""
        return PromptEmbeds(self._encoded(prompt), None if negative_prompt is None else self._encoded(negative_prompt))

    def _encoded(self, prompt: str) -> Tensor:
        texts = [" ".join(prompt.split())]
        embeds = encoded(self.tokenizer, self.text_encoder, texts, max_sequence_length=self.max_sequence_length)
        return F.pad(embeds, (0, 0, 0, self.max_sequence_length - embeds.shape[1]))

    @torch.no_grad()
    def plan_motion(
        self, image: PIL.Image.Image, prompt: str | PromptEmbeds, settings: GenerationSettings, *, size: Size
    ) -> PlannedMotion:
        """Run the network: the motion of the whole clip, and notes of it; arguments as in `generate`."""
        embeds = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        picture = np.asarray(image.resize(size, PIL.Image.Resampling.LANCZOS))
        rows, columns = grid_of(size.width, size.height)
        latents = sample(
            self.network,
            torch.from_numpy(picture_features(picture)),
            embeds.prompt.to("cpu", torch.float32),
            num_steps=settings.stage_one_steps,
            generator=torch.Generator("cpu").manual_seed(settings.seed),
        )
        path, share = to_path(latents, rows, columns).slowed(settings.num_frames)
        travel = path.travel(settings.num_frames, size.width, size.height)
        return PlannedMotion(path, share, travel, notes_of_motion(travel, share, settings.num_frames))

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
            image: RGB, of the aspect of `size` and best twice as large or larger: frames are sampled from it directly.
            prompt: text, or what `encode_prompt` made of it.
            settings: frames, seed and steps.
            size: of the frames, multiples of 16.
            on_step: ``(step, of how many)``, counted in pieces of the clip; to cancel, raise in it.

        Returns:
            An iterator of uint8 [n,h,w,3] on the CPU, frame 0 alone and then four at a time.

        Raises:
            InvalidInputError: at the call, for an argument that cannot be used.
        """
        self.geometry.check_size(size)
        num_pieces = self.geometry.latent_frames(settings.num_frames)
        self.check_settings(settings)
        if image.mode != "RGB":
            msg = f"the image is {image.mode}, not RGB; convert it with fit_image"
            raise InvalidInputError(msg, param="image", value=image.mode)

        def pieces() -> Iterator[Tensor]:
            planned = self.plan_motion(image, prompt, settings, size=size)
            rendered = render_path(planned.path, image, size=size, num_frames=settings.num_frames)
            for index, piece in enumerate(rendered):
                if on_step is not None:
                    on_step(index, num_pieces)
                yield piece

        return pieces()

    def plan(self, num_frames: int) -> tuple[range, ...]:
        """Return the one window of a clip of `num_frames` frames; raise `InvalidInputError` unless it is 4k+1."""
        self.geometry.latent_frames(num_frames)
        return (range(num_frames),)

    def check_settings(self, settings: GenerationSettings) -> None:
        """Raise `InvalidInputError` for guidance, which this stage does not have."""
        names = ("stage_one_guidance_scale", "stage_one_guidance_scale_2")
        for name in names:
            value = getattr(settings, name)
            if value is not None and value > 1:
                msg = f"{name} is {value}, and Stage I of this model has no guidance; leave it out"
                raise InvalidInputError(msg, param=name, value=value)

    def notes_of(self, prompt: str, negative_prompt: str | None = None) -> tuple[str, ...]:
        """Say what of the texts will have no effect: words for no motion, what is cut, a negative prompt."""
        cut = self._cut_note(prompt)
        negative = ("Stage I of mini has no guidance: the negative prompt has no effect on it",)
        return (*notes_of_prompt(prompt), *((cut,) if cut else ()), *(negative if negative_prompt else ()))

    def motion_notes(
        self, image: PIL.Image.Image, prompt: str, settings: GenerationSettings, *, size: Size
    ) -> tuple[str, ...]:
        """Say that the motion is nearly nothing, or slower than asked; takes about 0.1 s."""
        return self.plan_motion(image, prompt, settings, size=size).notes

    def _cut_note(self, prompt: str) -> str | None:
        num_tokens = len(self.tokenizer(" ".join(prompt.split()), truncation=False, verbose=False).input_ids)
        if num_tokens <= self.max_sequence_length:
            return None
        return f"the prompt was cut: the text encoder reads {self.max_sequence_length} of its {num_tokens} tokens"
