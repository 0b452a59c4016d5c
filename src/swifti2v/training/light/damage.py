"""Damage that real motion references carry, put on perfect reductions: what `light` is trained and judged with.

A generated (or any low-resolution) video is soft, its texture swims by fractions of a pixel, its brightness and color
change, it carries noise and compression, and its frame 0 is not the reduced image. Every frame is damaged, frame 0 too.
All lengths are in pixels of the motion reference.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import cv2
import numpy as np
import PIL.Image

from swifti2v.reference.resample import reduce_frame

Array = np.ndarray[Any, Any]
Reduction = Literal["bicubic", "area", "lanczos"]
# Without cpu-independent, x264 does not write the same bytes every time, even with one thread.
_ENCODER = {"preset": "fast", "x264-params": "threads=1:cpu-independent=1"}
REDUCTIONS: tuple[Reduction, ...] = ("bicubic", "area", "lanczos")


@dataclass(frozen=True)
class Damage:
    """Kinds and strengths. The default is none.

    Args:
        softness: standard deviation of a Gaussian blur.
        swim: root mean square length of a smooth displacement field, fresh in every frame.
        swim_reach: distance over which that field changes.
        slow_swim: the same, but changing over about eight frames.
        color: largest change of gain, and of offset in [0, 1], of a channel; drifts over about six frames.
        flicker: share of the color change that is fresh in every frame.
        noise: standard deviation in [0, 1] of noise blurred by 0.7 pixels, fresh in every frame.
        crf: constant rate factor of H.264; 0 is no compression.
    """

    softness: float = 0.0
    swim: float = 0.0
    swim_reach: float = 12.0
    slow_swim: float = 0.0
    color: float = 0.0
    flicker: float = 0.0
    noise: float = 0.0
    crf: int = 0


CLEAN = Damage()
HEAVY = Damage(softness=0.8, swim=0.7, color=0.03, crf=32)
"""What the damaged table is made with."""
MILD = Damage(softness=0.4, swim=0.35, color=0.015, crf=20)


def sample_damage(rng: np.random.Generator) -> Damage:
    """Draw kinds and strengths: each kind is there in about two of three samples, none at all in one of four."""
    if rng.random() < 0.25:
        return CLEAN

    def strength(most: float, share: float) -> float:
        return float(rng.random() * most) if rng.random() < share else 0.0

    return Damage(
        softness=strength(1.0, 0.7),
        swim=strength(0.9, 0.6),
        swim_reach=float(rng.uniform(6, 24)),
        slow_swim=strength(0.5, 0.2),
        color=strength(0.045, 0.6),
        flicker=float(rng.random() * 0.5),
        noise=strength(0.03, 0.25),
        crf=int(rng.integers(18, 35)) if rng.random() < 0.7 else 0,
    )


def reduced(frame: Array, height: int, width: int, *, reduction: Reduction) -> Array:
    """Reduce a frame uint8 [H, W, 3] with antialiasing; the result is uint8 [height, width, 3]."""
    if reduction == "area":
        return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA))
    if reduction == "lanczos":
        return np.asarray(PIL.Image.fromarray(frame).resize((width, height), PIL.Image.Resampling.LANCZOS))
    return reduce_frame(frame, height, width)


def damaged(frames: Array, damage: Damage, rng: np.random.Generator) -> Array:
    """Damage frames uint8 [F, h, w, 3] of a motion reference; the result has their form.

    Args:
        frames: sRGB.
        damage: kinds and strengths.
        rng: the same state gives the same damage, to the bit.
    """
    num_frames, height, width = frames.shape[:3]
    unit = frames.astype(np.float32) / 255
    shift = np.zeros((num_frames, height, width, 2), dtype=np.float32)
    for index in range(num_frames):
        if damage.swim > 0:
            shift[index] += damage.swim * _smooth_field(rng, height, width, damage.swim_reach)
    if damage.slow_swim > 0:
        knots = [_smooth_field(rng, height, width, damage.swim_reach) for _ in range(num_frames // 8 + 2)]
        for index in range(num_frames):
            before, share = divmod(index / 8, 1)
            shift[index] += damage.slow_swim * ((1 - share) * knots[int(before)] + share * knots[int(before) + 1])
    gain, offset = (_drift(rng, num_frames, damage) for _ in range(2))
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    result = np.empty_like(frames)
    for index, frame in enumerate(unit):
        made = frame
        if damage.swim > 0 or damage.slow_swim > 0:
            x, y = columns + shift[index, ..., 0], rows + shift[index, ..., 1]
            made = np.asarray(cv2.remap(made, x, y, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT))
        if damage.softness > 0:
            made = np.asarray(cv2.GaussianBlur(made, (0, 0), max(damage.softness, 0.1)))
        if damage.color > 0:
            made = made * (1 + gain[index]) + offset[index]
        if damage.noise > 0:
            grain = cv2.GaussianBlur(rng.standard_normal(made.shape).astype(np.float32), (0, 0), 0.7)
            made = made + damage.noise * grain / max(float(grain.std()), 1e-6)
        result[index] = np.rint(np.clip(made, 0, 1) * 255)
    return compressed(result, damage.crf) if damage.crf > 0 else result


def compressed(frames: Array, crf: int) -> Array:
    """Encode frames uint8 [F, h, w, 3] as H.264 in memory and decode them again."""
    height, width = frames.shape[1:3]
    padded = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(24), options=_ENCODER | {"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *padded.shape[1:3], "yuv420p"
        stream.thread_count = 1
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(decoded)[:, :height, :width]


def _smooth_field(rng: np.random.Generator, height: int, width: int, reach: float) -> Array:
    """Return a random field [height, width, 2] whose vectors have a root mean square length of 1."""
    step = max(reach, 2.0)
    rough = rng.standard_normal((int(height / step) + 3, int(width / step) + 3, 2)).astype(np.float32)
    field = np.asarray(cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC))
    return field / max(float(np.sqrt((field**2).sum(axis=-1).mean())), 1e-6)


def _drift(rng: np.random.Generator, num_frames: int, damage: Damage) -> Array:
    """Return changes [F, 3] within +-color: two thirds common to the channels, the rest their own."""
    knots = rng.uniform(-1, 1, (num_frames // 6 + 2, 1)) * 2 / 3 + rng.uniform(-1, 1, (num_frames // 6 + 2, 3)) / 3
    times = np.arange(num_frames) / 6
    smooth = np.stack([np.interp(times, np.arange(len(knots)), knots[:, channel]) for channel in range(3)], axis=1)
    fresh = rng.uniform(-1, 1, (num_frames, 1)) * np.ones((1, 3))
    return (damage.color * ((1 - damage.flicker) * smooth + damage.flicker * fresh)).astype(np.float32)
