"""The words that `mini` knows: what it is trained on, and what a prompt is checked against.

A motion is named by a phrase with a place for an adverb of speed. Phrases that do not name a motion stand beside them,
so that the network learns whole words: a panda is no pan, and flowers do not flow.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

MotionName = Literal[
    "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "rotate clockwise",
    "rotate counterclockwise", "truck left", "truck right", "sway", "ripple", "drift left", "drift right",
    "flow left", "flow right", "still",
]  # fmt: skip

# A star marks where an adverb may stand.
_SIDES = {"left": "right", "right": "left"}
_PAN = (
    "* pan *{side}*", "the camera * pans {side}*", "the camera * pans to the {side}*", "camera * panning {side}*",
    "the camera * turns to the {side}*", "the camera * turns {side}*", "the view * pans {side}*",
    "pan to the {side}*", "panning {side}*", "panning shot to the {side}*", "a & pan to the {side}", "a & pan {side}",
    "a & {side} pan", "the camera * looks to the {side}*", "the shot * pans {side}*", "camera * pans {side}*",
    "the camera is * panning {side}*",
)  # fmt: skip
_TRUCK = (
    "* truck {side}*", "the camera * moves sideways to the {side}*", "the camera * trucks {side}*",
    "trucking {side}*", "the camera * moves {side}*", "the camera * slides to the {side}*",
    "the camera * tracks {side}*", "a & truck {side}", "a & tracking shot to the {side}", "camera * trucking {side}*",
    "the camera * moves to the {side}*",
)  # fmt: skip
_TILT = (
    "* tilt {way}*", "the camera * tilts {way}*", "the camera * looks {way}*", "camera * tilting {way}wards*",
    "a & tilt {way}", "tilting {way}*", "camera * tilts {way}*", "the view * tilts {way}*",
    "the camera * tilts {way}wards*", "camera * tilting {way}*", "the camera is * tilting {way}*",
)  # fmt: skip
_DRIFT = (
    "clouds * drift {side}*", "the clouds * drift {side}*", "the clouds * drift to the {side}*",
    "the clouds * move {side}*", "the sky * drifts to the {side}*", "* drift {side}*", "clouds * drifting {side}*",
    "clouds * moving to the {side}*", "the clouds are * drifting to the {side}*", "clouds * float to the {side}*",
    "the mist * drifts {side}*",
)  # fmt: skip
_FLOW = (
    "* flow {side}*", "the river * flows {side}*", "the water * flows to the {side}*", "the water * flows {side}*",
    "water * flowing {side}*", "the stream * flows to the {side}*", "the river is * flowing {side}*",
    "the water * moves {side}*", "river * flowing to the {side}*",
)  # fmt: skip


def _sided(templates: tuple[str, ...], side: str) -> tuple[str, ...]:
    return tuple(template.replace("{side}", side).replace("{way}", side) for template in templates)


TEMPLATES: dict[MotionName, tuple[str, ...]] = {
    "pan left": _sided(_PAN, "left"),
    "pan right": _sided(_PAN, "right"),
    "tilt up": _sided(_TILT, "up"),
    "tilt down": _sided(_TILT, "down"),
    "zoom in": (
    "* zoom in*", "the camera * zooms in*", "the camera * moves closer*", "* push in*", "* dolly in*", "zooming in*",
    "a & zoom in", "the camera * pushes in*", "the camera * moves forward*", "camera * zooming in*", "a & push-in",
    "the camera * dollies in*", "the view * zooms in*", "the shot * zooms in*", "camera * zooms in*", "a & dolly in",
    "the camera * moves in*", "the camera is * zooming in*", "the camera * pushes forward*",
    ),
    "zoom out": (
    "* zoom out*", "the camera * zooms out*", "the camera * pulls back*", "* pull out*", "* dolly out*",
    "zooming out*", "a & zoom out", "the camera * pulls out*", "the camera * moves back*", "camera * zooming out*",
    "a & pull-back", "the camera * dollies out*", "the view * zooms out*", "the shot * zooms out*",
    "camera * zooms out*", "the camera * moves backwards*",
    "the camera is * zooming out*", "* pull back*",
    ),
    "rotate clockwise": (
    "* rotate clockwise*", "the picture * rotates clockwise*", "the view * rolls clockwise*",
    "a & clockwise rotation", "the camera * rotates clockwise*", "rotating clockwise*",
    "the camera * rolls clockwise*", "* roll clockwise*", "the image * rotates clockwise*",
    "the picture * turns clockwise*", "rotation clockwise*",
    ),
    "rotate counterclockwise": (
    "* rotate counterclockwise*", "the picture * rotates counterclockwise*", "the view * rolls counterclockwise*",
    "a & counterclockwise rotation", "the camera * rotates counterclockwise*", "rotating counterclockwise*",
    "the camera * rolls counterclockwise*", "* roll counterclockwise*", "the image * rotates counterclockwise*",
    "the picture * turns counterclockwise*", "the picture * rotates anticlockwise*", "rotation counterclockwise*",
    "* rotate anticlockwise*",
    ),
    "truck left": _sided(_TRUCK, "left"),
    "truck right": _sided(_TRUCK, "right"),
    "sway": (
    "* sway*", "the trees * sway in the wind*", "leaves * swaying*", "the grass * sways in the breeze*",
    "trees * swaying in the wind*", "the leaves * sway*", "branches * sway*", "the plants * sway in the wind*",
    "flowers * swaying in the breeze*", "the tree * sways*", "grass * swaying*", "the leaves * move in the wind*",
    "the flowers * sway*", "palm trees * sway*", "the reeds are * swaying*",
    ),
    "ripple": (
    "* ripple*", "the water * ripples*", "small waves on the water", "the water is * rippling*",
    "ripples on the lake", "the lake * ripples*", "waves on the lake", "the sea * ripples*", "water * rippling*",
    "gentle waves", "the surface of the water * ripples*", "waves on the sea", "& waves on the water",
    "the waves * move*",
    ),
    "drift left": _sided(_DRIFT, "left"),
    "drift right": _sided(_DRIFT, "right"),
    "flow left": _sided(_FLOW, "left"),
    "flow right": _sided(_FLOW, "right"),
    "still": (
    "still", "the camera does not move", "static camera", "nothing moves", "static shot", "a still picture",
    "the camera stays still", "no motion", "no camera movement", "fixed camera", "the camera is static",
    ),
}  # fmt: skip
"""How a motion is asked for; ``*`` is a place for an adverb of speed, ``&`` one for an adjective."""

UNDIRECTED: dict[MotionName, tuple[str, ...]] = {
    "pan right": ("* pan*", "the camera * pans*", "the camera * pans across*", "a & pan", "camera * panning*"),
    "tilt up": ("* tilt*", "the camera * tilts*", "a & tilt"),
    "zoom in": ("* zoom*", "the camera * zooms*", "a & zoom"),
    "rotate clockwise": ("* rotate*", "the camera * rotates*", "the picture * rotates*", "the view * rotates*"),
    "truck right": ("the camera * moves sideways*", "the camera * trucks*", "a & tracking shot"),
    "drift right": (
        "clouds * drift*", "the clouds * drift*", "the clouds * move*", "drifting clouds", "clouds * moving*",
    ),
    "flow right": ("the river * flows*", "the water * flows*", "flowing water", "water * flowing*", "a flowing river"),
}  # fmt: skip
"""The direction that is taken where a prompt gives none."""

SPEED_WORDS: tuple[tuple[float, tuple[str, ...], tuple[str, ...]], ...] = (
    (0.5, ("slowly", "gently", "slightly"), ("slow", "gentle")),
    (1.0, (), ("smooth", "steady")),
    (1.8, ("quickly", "fast", "rapidly"), ("fast", "quick", "rapid")),
)
"""Speed, its adverbs, its adjectives. 1 is the speed of a prompt that says nothing of it."""

_SUBJECTS = (
    "a panda", "a man", "a woman", "the dog", "a cat", "the child", "the movie star", "an old fisherman", "a bird",
    "the horse", "a crowd", "the girl", "a robot", "the boy", "a dancer", "the bee", "a dragon", "the monkey",
    "two people", "a couple", "the chef", "a soldier", "the frog", "a company", "the pandas", "a Spaniard",
)  # fmt: skip
_ACTS = (
    "eats bamboo", "smiles", "walks", "runs along the beach", "dances", "blinks", "laughs", "jumps", "sleeps",
    "waves", "turns around", "looks up", "looks at us", "sits down", "reads a book", "drinks tea", "talks", "swims",
    "flies away", "sings", "opens the door", "turns the head to the left", "moves a hand", "walks to the right",
    "pulls a rope", "cooks", "pushes a cart", "looks down", "rolls a ball", "lights a lamp", "stands up",
    "paints a wall", "breathes", "looks left",
)  # fmt: skip
_EVENTS = (
    "flowers bloom", "petals fall", "snow falls", "smoke rises", "a candle burns", "the sun rises", "rain falls",
    "leaves fall", "fireworks explode", "a flag waves", "birds fly", "a car drives by", "the fire flickers",
    "steam rises", "a flower opens", "the ball rolls", "a boat sails", "the moon rises", "stars twinkle",
    "the hair moves", "a butterfly lands", "the lights flicker", "sunset", "the flower blooms", "fish swim",
    "a train passes", "time lapse", "the snow melts",
)  # fmt: skip
_THINGS = (
    "a panda", "a frying pan on a stove", "a still life with fruit", "rolling hills", "a flower field",
    "the company office", "a spanish village", "a tilted tower", "a house on the left", "a tree on the right",
    "an upright piano", "a zoo", "a red truck", "a parked truck", "a swan", "a moving van", "a lake below a mountain",
    "a mountain", "a portrait of a woman", "trees", "clouds over a valley", "a river in a valley", "a sea of fog",
    "a beach", "water", "grass", "the sky", "leaves", "a japanese garden", "cinematic", "photorealistic",
    "beautiful light", "4k", "high quality", "golden hour", "a city street", "an old castle", "a jacket of down",
    "the inside of a church", "a static radio", "a driftwood fire", "a lookout", "pancakes", "a pushbutton",
    "the movie theater", "a pullover", "a flowerpot", "a turnip", "a wavelength chart", "a company of soldiers",
)  # fmt: skip
_UNKNOWN = (
    "a dolly zoom", "dolly zoom", "the camera orbits the statue", "orbit", "orbit around the house", "an arc shot",
    "crane shot", "crane up", "hand-held camera", "the camera shakes", "vertigo effect", "the camera circles",
    "la camera va a sinistra", "die Kamera schwenkt nach links", "la c\u00e1mara se acerca",
    "\u6444\u50cf\u673a\u5411\u5de6",
    "\u043a\u0430\u043c\u0435\u0440\u0430 \u0434\u0432\u0438\u0436\u0435\u0442\u0441\u044f", "\u30ba\u30fc\u30e0",
    "zoom lens", "asdf", "boom shot", "...",
)  # fmt: skip
_PLACES = (
    "the lake", "the panda", "the mountains", "the valley", "a snowy field", "the city", "the forest", "her face",
    "the house", "the old town", "the river", "the flower", "the sea", "the beach", "the scene", "the garden",
    "the subject", "the car",
)  # fmt: skip
_TO_PLACES = {
    "pan": (" over", " across", " along", " past"), "tilt": (" over", " to", " toward", " from"),
    "zoom": (" on", " on", " to", " from", " toward"),
    "truck": (" along", " past", " across"), "drift": (" over", " across", " above"), "flow": (" past", " through"),
    "sway": (" by", " near"), "ripple": (" by", " near", " on"), "rotate": (" around", " above"),
}  # fmt: skip
JOINTS = (", ", " and ", " while ", ". ", ", while ", "; ", " as ", ", and ", ", then ")


def speed_of(name: str, rng: np.random.Generator) -> float:
    """Draw a speed."""
    return float(rng.choice([entry[0] for entry in SPEED_WORDS], p=[0.3, 0.42, 0.28])) if name != "still" else 1.0


def phrase_of(name: MotionName, speed: float, rng: np.random.Generator) -> str:
    """Draw a phrase for a motion at a speed of `SPEED_WORDS`."""
    undirected = UNDIRECTED.get(name, ())
    choices = list(undirected if undirected and rng.random() < 0.12 else TEMPLATES[name])
    _speed, adverbs, adjectives = min(SPEED_WORDS, key=lambda entry: abs(math.log(entry[0] / speed)))
    if adverbs:
        choices = [choice for choice in choices if "*" in choice or "&" in choice] or choices
    template = str(rng.choice(choices))
    if "&" in template:
        adjective = str(rng.choice(adjectives)) if adverbs or rng.random() < 0.3 else ""
        return _tidy(template.replace("&", adjective))
    places = [match.start() for match in re.finditer(r"\*", template)]
    if adverbs and places:
        place = places[-1] if rng.random() < 0.5 else int(rng.choice(places))
        adverb = str(rng.choice(adverbs))
        if rng.random() < 0.06:
            adverb = f"very {adverb}"
        template = f"{template[:place]} {adverb} {template[place + 1 :]}"
    return _tidy(template.replace("*", " "))


def with_place(name: MotionName, phrase: str, rng: np.random.Generator) -> str:
    """Add where a motion goes or happens, which changes nothing of it."""
    words = _TO_PLACES.get(name.split()[0])
    return f"{phrase}{rng.choice(words)} {rng.choice(_PLACES)}" if words else phrase


def distractor(rng: np.random.Generator) -> str:
    """Draw a phrase that names no motion `mini` knows."""
    draw = rng.random()
    if draw < 0.08:
        return str(rng.choice(_UNKNOWN))
    if draw < 0.35:
        return f"{rng.choice(_SUBJECTS)} {rng.choice(_ACTS)}"
    return str(rng.choice(_EVENTS if draw < 0.6 else _THINGS))


def all_phrases() -> list[str]:
    """Every phrase, for the tokenizer."""
    everything = [*TEMPLATES.values(), *UNDIRECTED.values()]
    speeds = [word for _speed, adverbs, adjectives in SPEED_WORDS for word in (*adverbs, *adjectives)]
    phrases = [_tidy(re.sub(r"[*&]", " ", template)) for templates in everything for template in templates]
    acts = [f"{subject} {act}" for subject in _SUBJECTS for act in _ACTS[::3]]
    return [*phrases, *speeds, *acts, *_ACTS, *_EVENTS, *_THINGS, *_UNKNOWN, *_PLACES]


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace("a anti", "an anti")
