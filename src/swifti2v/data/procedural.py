"""Procedural motion over photographs: clips whose motion, truth and prompt are known exactly.

A photograph is cropped and re-sampled along a displacement field that grows in time: camera paths (pan, tilt, zoom,
roll, truck with parallax) and motion of the scene (sway, ripple, clouds that drift, water that flows). The photograph
is larger than the crop, so what a camera move uncovers is real. Used to train Stage I and II of `mini` and to test that
a prompt moves the picture as it says.

Coordinates are in widths of the picture, x to the right and y down, (0, 0) at the center; time in pixel frames. A field
gives, for a pixel of frame t, where it was in frame 0 minus where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from swifti2v.geometry import Size

    FloatArray = NDArray[np.float32]

REFERENCE_FRAMES = 80
"""The rates below are what happens over this many frames (an 81-frame clip) at speed 1."""

MotionName = Literal[
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "rotate clockwise",
    "rotate counterclockwise", "truck left", "truck right", "sway", "ripple", "drift left", "drift right",
    "flow left", "flow right", "still",
]  # fmt: skip

PHRASES: dict[MotionName, tuple[str, ...]] = {
    "pan left": ("pan left", "the camera pans left", "the camera turns to the left", "camera panning left"),
    "pan right": ("pan right", "the camera pans right", "the camera turns to the right", "camera panning right"),
    "tilt up": ("tilt up", "the camera tilts up", "the camera looks up", "camera tilting upwards"),
    "tilt down": ("tilt down", "the camera tilts down", "the camera looks down", "camera tilting downwards"),
    "zoom in": ("zoom in", "the camera zooms in", "the camera moves closer", "push in", "dolly in"),
    "zoom out": ("zoom out", "the camera zooms out", "the camera pulls back", "pull out", "dolly out"),
    "rotate clockwise": ("rotate clockwise", "the picture rotates clockwise", "the view rolls clockwise"),
    "rotate counterclockwise": (
        "rotate counterclockwise",
        "the picture rotates counterclockwise",
        "the view rolls counterclockwise",
    ),
    "truck left": ("truck left", "the camera moves sideways to the left", "the camera trucks left"),
    "truck right": ("truck right", "the camera moves sideways to the right", "the camera trucks right"),
    "sway": ("sway", "the trees sway in the wind", "leaves swaying", "the grass sways in the breeze"),
    "ripple": ("ripple", "the water ripples", "small waves on the water", "the water is rippling"),
    "drift left": ("drift left", "the clouds drift left", "the sky drifts to the left"),
    "drift right": ("drift right", "the clouds drift right", "the sky drifts to the right"),
    "flow left": ("flow left", "the river flows left", "the water flows to the left"),
    "flow right": ("flow right", "the river flows right", "the water flows to the right"),
    "still": ("still", "the camera does not move", "static camera", "nothing moves"),
}
CAMERA_MOTIONS: tuple[MotionName, ...] = tuple(PHRASES)[:10]
SCENE_MOTIONS: tuple[MotionName, ...] = tuple(PHRASES)[10:16]
SPEED_WORDS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.5, ("slowly", "gently")),
    (1.0, ("",)),
    (1.8, ("quickly", "fast")),
)

# What differs from place to place is learned long after a pan, a wave last of all: they are drawn more often.
_OFTEN = {"zoom": 3.0, "rotate": 3.0, "sway": 6.0, "ripple": 14.0}


@dataclass(frozen=True)
class Motion:
    """One motion at a speed; 1 is the rate that a prompt without an adverb asks for."""

    name: MotionName
    speed: float = 1.0


def displacement(
    motions: Sequence[Motion], *, size: Size, num_frames: int, horizon: float = 0.0, first_frame: int = 0
) -> FloatArray:
    """Field of each frame, [F,H,W,2] float32 in widths; zero at frame 0.

    Args:
        motions: the camera's first, then the scene's: a pixel is found in the scene, then in the scene's own motion.
        size: of the frames.
        num_frames: F.
        horizon: height (y in widths) below which the ground or water of the scene begins.
        first_frame: index of the first frame asked for.
    """
    columns = ((np.arange(size.width, dtype=np.float32) + 0.5) / size.width) - 0.5
    rows = (np.arange(size.height, dtype=np.float32) + 0.5 - size.height / 2) / size.width
    start = np.stack(np.meshgrid(columns, rows), axis=-1).astype(np.float32)
    fields = []
    for frame in range(first_frame, first_frame + num_frames):
        points = start
        for motion in motions:
            points = _FIELDS[motion.name](points, motion.speed * frame / REFERENCE_FRAMES, horizon)
        fields.append(points - start)
    return np.stack(fields).astype(np.float32)


def sample_motions(rng: np.random.Generator) -> tuple[Motion, ...]:
    """Draw a camera motion (37%), a motion of the scene (42%), both (13%) or none (8%), with speeds."""

    def draw(names: Sequence[MotionName]) -> Motion:
        speed = float(rng.choice([entry[0] for entry in SPEED_WORDS], p=[0.3, 0.45, 0.25]))
        weights = np.array([_OFTEN.get(name.split()[0], 1.0) for name in names])
        return Motion(names[int(rng.choice(len(names), p=weights / weights.sum()))], speed)

    choice = rng.random()
    if choice < 0.37:
        return (draw(CAMERA_MOTIONS),)
    if choice < 0.79:
        return (draw(SCENE_MOTIONS),)
    if choice < 0.92:
        return (draw(CAMERA_MOTIONS), draw(SCENE_MOTIONS))
    return (Motion("still"),)


def find_horizon(picture: NDArray[np.uint8]) -> float:
    """Height (y in widths) of the strongest change of mean color between the rows above and below; [H,W,3] uint8."""
    height, width = picture.shape[:2]
    rows = picture.reshape(height, -1, 3).mean(axis=1)
    sums = np.concatenate([np.zeros((1, 3)), np.cumsum(rows, axis=0)])
    span = max(2, height // 6)
    candidates = np.arange(max(span, height // 4), min(height - span, 3 * height // 4))
    above = (sums[candidates] - sums[candidates - span]) / span
    below = (sums[candidates + span] - sums[candidates]) / span
    return float((candidates[np.abs(above - below).sum(axis=1).argmax()] - height / 2) / width)


def render(
    photograph: NDArray[np.uint8], field: FloatArray, *, center: tuple[float, float], crop_width: float
) -> NDArray[np.uint8]:
    """Re-sample a photograph along `field` [F,H,W,2]: uint8 [F,H,W,3].

    Args:
        photograph: [Hp,Wp,3] uint8; mirrored beyond its borders.
        field: from `displacement`.
        center: of the crop, in pixels of the photograph.
        crop_width: of the crop in pixels of the photograph; at least the width of the field, or details are made up.
    """
    height, width = field.shape[1:3]
    if crop_width < width * 0.99:
        msg = f"a crop {crop_width:.0f} pixels wide has less detail than frames of {width}: use a larger photograph"
        raise InvalidInputError(msg)
    scale = width / crop_width
    reduced = (
        cv2.resize(photograph, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else photograph
    )
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    left = center[0] * scale - width / 2
    top = center[1] * scale - height / 2
    frames = [
        cv2.remap(
            reduced,
            columns + left + offset[..., 0] * width,
            rows + top + offset[..., 1] * width,
            interpolation=cv2.INTER_CUBIC,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        for offset in field
    ]
    return np.stack(frames).astype(np.uint8)


def _moved_x(points: FloatArray, amount: FloatArray) -> FloatArray:
    return _moved(points, amount, np.zeros_like(amount))


def _moved(points: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    moved: FloatArray = points + np.stack([x, y], axis=-1).astype(np.float32)
    return moved


def _shift(x: float, y: float) -> Callable[[FloatArray, float, float], FloatArray]:
    return lambda points, time, _horizon: points + np.array([x * time, y * time], dtype=np.float32)


def _zoom(rate: float) -> Callable[[FloatArray, float, float], FloatArray]:
    return lambda points, time, _horizon: points * np.float32(math.exp(-rate * time))


def _rotate(degrees: float) -> Callable[[FloatArray, float, float], FloatArray]:
    def field(points: FloatArray, time: float, _horizon: float) -> FloatArray:
        angle = math.radians(degrees * time)
        cosine, sine = math.cos(angle), math.sin(angle)
        return points @ np.array([[cosine, -sine], [sine, cosine]], dtype=np.float32)

    return field


def _truck(rate: float) -> Callable[[FloatArray, float, float], FloatArray]:
    def field(points: FloatArray, time: float, horizon: float) -> FloatArray:
        nearness = 0.35 + 1.3 / (1 + np.exp(-(points[..., 1] - horizon) / 0.12))
        return _moved_x(points, rate * time * nearness)

    return field


def _sway(points: FloatArray, time: float, _horizon: float) -> FloatArray:
    phase = 9.0 * points[..., 0] + 5.0 * points[..., 1]
    strength = 0.010 * (1 - 0.8 * np.clip(points[..., 1] / 0.3 + 0.5, 0, 1))
    swing = np.sin(2 * math.pi * 2.5 * time + phase) - np.sin(phase)
    return _moved(points, strength * swing, 0.2 * strength * swing)


def _ripple(points: FloatArray, time: float, horizon: float) -> FloatArray:
    phase = 28.0 * points[..., 1] + 8.0 * points[..., 0]
    strength = 0.005 / (1 + np.exp(-(points[..., 1] - horizon) / 0.03))
    swing = np.sin(2 * math.pi * 3.0 * time + phase) - np.sin(phase)
    return _moved(points, strength * swing, 0.6 * strength * swing)


def _region(rate: float, *, above: bool) -> Callable[[FloatArray, float, float], FloatArray]:
    def field(points: FloatArray, time: float, horizon: float) -> FloatArray:
        sign = 1.0 if above else -1.0
        inside = 1 / (1 + np.exp(sign * (points[..., 1] - horizon) / 0.03))
        return _moved_x(points, rate * time * inside)

    return field


# A camera that pans left shows what was further left: the pixel of frame t was further left in frame 0.
_FIELDS: dict[MotionName, Callable[[FloatArray, float, float], FloatArray]] = {
    "pan left": _shift(-0.20, 0),
    "pan right": _shift(0.20, 0),
    "tilt up": _shift(0, -0.14),
    "tilt down": _shift(0, 0.14),
    "zoom in": _zoom(math.log(1.35)),
    "zoom out": _zoom(-math.log(1.30)),
    "rotate clockwise": _rotate(10),
    "rotate counterclockwise": _rotate(-10),
    "truck left": _truck(-0.13),
    "truck right": _truck(0.13),
    "sway": _sway,
    "ripple": _ripple,
    "drift left": _region(0.10, above=True),
    "drift right": _region(-0.10, above=True),
    "flow left": _region(0.12, above=False),
    "flow right": _region(-0.12, above=False),
    "still": lambda points, _time, _horizon: points,
}
