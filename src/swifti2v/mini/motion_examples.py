"""Examples of motion for the training of Stage I: a photograph, a prompt, and the path that it asks for, exactly."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from swifti2v.data.procedural import find_horizon
from swifti2v.mini.network import grid_of, picture_features, to_latents
from swifti2v.mini.path import MAP_CHANNELS, MotionPath, cell_centers
from swifti2v.mini.words import JOINTS, MotionName, distractor, phrase_of, speed_of, with_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CAMERA_MOTIONS: tuple[MotionName, ...] = (
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "rotate clockwise",
    "rotate counterclockwise", "truck left", "truck right",
)  # fmt: skip
SCENE_MOTIONS: tuple[MotionName, ...] = (
    "sway", "ripple", "drift left", "drift right", "flow left", "flow right", "sway", "ripple", "ripple",
)  # fmt: skip
_MIXTURE: tuple[tuple[float, tuple[tuple[MotionName, ...], ...]], ...] = (
    (0.40, (CAMERA_MOTIONS,)),
    (0.66, (SCENE_MOTIONS,)),
    (0.80, (CAMERA_MOTIONS, SCENE_MOTIONS)),
    (0.84, (SCENE_MOTIONS, SCENE_MOTIONS)),
    (0.88, (CAMERA_MOTIONS, CAMERA_MOTIONS)),
    (0.94, (("still",),)),
)
"""How often which motions are asked for together: shares added up; the rest asks for none."""
UNASKED_SPEED = 0.4
"""A prompt that names no motion gets a zoom at this speed: a video of a photograph that stands still is of no use."""

_CAMERA: dict[str, tuple[float, float, float, float]] = {
    "pan left": (-0.20, 0, 0, 0), "pan right": (0.20, 0, 0, 0),
    "tilt up": (0, -0.14, 0, 0), "tilt down": (0, 0.14, 0, 0),
    "zoom in": (0, 0, math.log(1.35), 0), "zoom out": (0, 0, -math.log(1.30), 0),
    "rotate clockwise": (0, 0, 0, math.radians(10)), "rotate counterclockwise": (0, 0, 0, -math.radians(10)),
}  # fmt: skip
_SIGNS = {"left": -1.0, "right": 1.0}


def path_of(
    motions: Sequence[tuple[MotionName, float]], *, rows: int, columns: int, aspect: float, horizon: float
) -> MotionPath:
    """Return the path of motions with speeds, as `procedural.displacement` has them, on a grid of cells.

    Args:
        motions: names and speeds; they add up (rates of cameras, maps of the scene).
        rows: of the grid.
        columns: of the grid.
        aspect: height over width of the picture.
        horizon: height (y in widths) below which the ground or water begins.
    """
    x, y = cell_centers(rows, columns, aspect)
    camera = np.zeros(4, np.float32)
    cycles = np.zeros(2, np.float32)
    maps = np.zeros((MAP_CHANNELS, rows, columns), np.float32)
    for name, speed in motions:
        verb, _, way = name.partition(" ")
        if name in _CAMERA:
            camera += np.array(_CAMERA[name], np.float32) * np.float32(speed)
        elif verb == "truck":
            maps[0] += 0.13 * _SIGNS[way] * speed * (0.35 + 1.3 * _step((y - horizon) / 0.12))
        elif verb == "drift":
            maps[0] -= 0.10 * _SIGNS[way] * speed * _step(-(y - horizon) / 0.03)
        elif verb == "flow":
            maps[0] -= 0.12 * _SIGNS[way] * speed * _step((y - horizon) / 0.03)
        elif verb == "sway":
            strength = 0.010 * (1 - 0.8 * np.clip(y / 0.3 + 0.5, 0, 1))
            cycles[0] = 2.5 * speed
            maps[2:6] += _wave(strength, 9.0 * x + 5.0 * y, 0.2)
        elif verb == "ripple":
            strength = 0.005 * _step((y - horizon) / 0.03)
            cycles[1] = 3.0 * speed
            maps[6:10] += _wave(strength, 28.0 * y + 8.0 * x, 0.6)
    return MotionPath(camera, cycles, maps)


class View(NamedTuple):
    """A crop of a photograph as the network sees it.

    Args:
        features: [N,C] of `picture_features`.
        rows, columns: of its grid of cells.
        horizon: of `find_horizon`.
        aspect: height over width.
        caption: of the photograph.
    """

    features: NDArray[np.float32]
    rows: int
    columns: int
    horizon: float
    aspect: float
    caption: str


class Example(NamedTuple):
    """What the network is shown: features [n,C] of some places and a prompt; and what it should say.

    That is `rates` [6] and `places` [n,40];
    `waves` [2] tells which cycles are asked for: the others count for nothing.
    """

    features: NDArray[np.float32]
    prompt: str
    rates: NDArray[np.float32]
    places: NDArray[np.float32]
    waves: NDArray[np.float32]


def draw_view(photograph: NDArray[np.uint8], caption: str, rng: np.random.Generator) -> View:
    """Draw a crop of a photograph [H,W,3], perhaps mirrored, perhaps in another light."""
    picture = _crop(photograph, rng)
    height, width = picture.shape[:2]
    rows, columns = grid_of(width, height)
    return View(picture_features(picture), rows, columns, find_horizon(picture), height / width, caption)


def draw_example(view: View, rng: np.random.Generator, *, num_places: int) -> Example:
    """Draw motions and a prompt for them, over `num_places` places of a view or all that it has."""
    motions, prompt = draw_prompt(view.caption, rng)
    path = path_of(motions, rows=view.rows, columns=view.columns, aspect=view.aspect, horizon=view.horizon)
    rates, places = to_latents(path)
    kept = rng.permutation(len(places))[:num_places]
    waves = (path.cycles > 0).astype(np.float32)
    return Example(view.features[kept], prompt, rates, places[kept], waves)


def draw_prompt(caption: str, rng: np.random.Generator) -> tuple[list[tuple[MotionName, float]], str]:
    """Draw motions with speeds, and a prompt: their phrases, in any order, among others that name no motion."""
    motions = _draw_motions(rng)
    phrases = [phrase_of(name, speed, rng) for name, speed in motions]
    named = zip(motions, phrases, strict=True)
    phrases = [with_place(motion[0], phrase, rng) if rng.random() < 0.15 else phrase for motion, phrase in named]
    if rng.random() < 0.45 or not motions:
        phrases.append(distractor(rng))
    if rng.random() < 0.15:
        phrases.append(distractor(rng))
    if caption and rng.random() < 0.2:
        phrases.append(caption)
    if not motions and rng.random() < 0.1:
        phrases = []
    rng.shuffle(phrases)
    return (motions or [("zoom in", UNASKED_SPEED)]), _joined(phrases, rng)


def _draw_motions(rng: np.random.Generator) -> list[tuple[MotionName, float]]:
    draw = rng.random()
    groups = next((names for limit, names in _MIXTURE if draw < limit), ())
    motions: list[tuple[MotionName, float]] = []
    for names in groups:
        taken = {name.split()[0] for name, _speed in motions}
        free = [name for name in names if name.split()[0] not in taken]
        name = free[int(rng.integers(len(free)))]
        motions.append((name, speed_of(name, rng)))
    return motions


def _joined(phrases: Sequence[str], rng: np.random.Generator) -> str:
    prompt = ""
    for phrase in phrases:
        prompt = f"{prompt}{rng.choice(JOINTS)}{phrase}" if prompt else phrase
    if rng.random() < 0.3:
        prompt = prompt[:1].upper() + prompt[1:]
    if rng.random() < 0.3 and prompt:
        prompt = prompt.rstrip(".") + "."
    return prompt


def _crop(photograph: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    if rng.random() < 0.5:
        photograph = photograph[:, ::-1]
    height, width = photograph.shape[:2]
    aspect = float(rng.choice([176 / 320, 176 / 320, 3 / 4, 1.0, 16 / 9], p=[0.4, 0.3, 0.1, 0.1, 0.1]))
    widest = min(width, height / aspect)
    crop_width = float(rng.uniform(0.35, 1.0)) * widest
    crop_height = crop_width * aspect
    left, top = float(rng.uniform(0, width - crop_width)), float(rng.uniform(0, height - crop_height))
    crop = photograph[int(top) : int(top + crop_height), int(left) : int(left + crop_width)]
    if rng.random() < 0.5:  # light and color of other days
        gain = rng.uniform(0.6, 1.3, size=3) * rng.uniform(0.6, 1.2)
        crop = np.clip(crop * gain + rng.uniform(-25, 25), 0, 255).astype(np.uint8)
    rows, columns = grid_of(crop.shape[1], crop.shape[0])
    return np.asarray(cv2.resize(crop, (columns * 8, rows * 8), interpolation=cv2.INTER_AREA))


def _step(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(1 / (1 + np.exp(-values)), dtype=np.float32)


def _wave(strength: NDArray[np.float32], phase: NDArray[np.float32], upward: float) -> NDArray[np.float32]:
    sine, cosine = strength * np.cos(phase), strength * np.sin(phase)
    return np.stack([sine, upward * sine, cosine, upward * cosine]).astype(np.float32)
