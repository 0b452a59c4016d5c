"""The work list of VBench-I2V: which videos, under which names, from which seeds, and how it is divided."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError
from swifti2v.evaluation.vbench.total import DIMENSION_NAMES, check_dimensions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from swifti2v.evaluation.vbench.suite import Suite

NUM_SAMPLES = 5
"""Videos for each prompt; VBench looks for the indices 0 to 4."""


@dataclass(frozen=True)
class Clip:
    """One video to make.

    Args:
        prompt: of the suite.
        index: of the sample, from 0.
        image: path of the picture.
        seed: of the noise; the same wherever and whenever the video is made.
    """

    prompt: str
    index: int
    image: str
    seed: int

    @property
    def file_name(self) -> str:
        """The name by which VBench finds the video."""
        return video_name(self.prompt, self.index)


@dataclass(frozen=True)
class Shard:
    """Part `number` of `count`, from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``, 1/4 to 4/4; raise `InvalidInputError` for another form."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            msg = f"shard {text!r} is not of the form i/n with i from 1 to n; write for instance 1/4"
            raise InvalidInputError(msg)
        return cls(int(match[1]), int(match[2]))

    def select(self, clips: Sequence[Clip]) -> tuple[Clip, ...]:
        """Return every `count`-th clip, so that all shards stand about equally far at any time."""
        return tuple(clips[self.number - 1 :: self.count])

    @property
    def record_name(self) -> str:
        """Name of the file of records of this part."""
        return "clips.jsonl" if self.count == 1 else f"clips.{self.number}-of-{self.count}.jsonl"


def clips_of(
    suite: Suite, *, dimensions: Iterable[str] | None = None, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> tuple[Clip, ...]:
    """Return the videos that the benchmark wants, first samples first, so that a part of a run covers all prompts.

    Args:
        suite: pictures and prompts.
        dimensions: only prompts that are judged in one of these; None for all. Without `camera_motion` 355 of 1118.
        num_samples: for each prompt; the benchmark's 5 for comparable scores.
        seed: decides the seeds of all clips, which differ from clip to clip.

    Raises:
        InvalidInputError: an unknown dimension, or `num_samples` outside 1 to 5.
    """
    if not 1 <= num_samples <= NUM_SAMPLES:
        msg = f"{num_samples} samples for each prompt; use 1 to {NUM_SAMPLES}: VBench looks for no more"
        raise InvalidInputError(msg)
    wanted = set(DIMENSION_NAMES if dimensions is None else check_dimensions(dimensions))
    prompts = [entry for entry in suite.prompts if wanted & set(entry.dimensions)]
    return tuple(
        Clip(entry.prompt, index, str(suite.image_of(entry)), clip_seed(seed, entry.prompt, index))
        for index in range(num_samples)
        for entry in prompts
    )


def video_name(prompt: str, index: int) -> str:
    """Return the name of a video: ``<prompt>-<index>.mp4``."""
    return f"{prompt}-{index}.mp4"


def clip_seed(seed: int, prompt: str, index: int) -> int:
    """Return the seed of a clip, in [0, 2**63): from a hash, so that it is nobody's choice and always the same."""
    digest = hashlib.sha256(f"{seed}\n{index}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
