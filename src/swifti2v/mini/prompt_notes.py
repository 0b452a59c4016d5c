"""What `mini` will not do with a prompt, said before the work; and what came of it, said after Stage I.

Whole words count, in the forms that the model was trained with (`swifti2v.mini.words`): a panda is no pan, and flowers
do not flow. A verb that people and things share with the camera (turn, look, move, push, pull, roll, wave) counts only
beside the camera, or beside what it needs ("push in").
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_VIEW = r"\b(?:camera|view|shot|picture|image|frame)\b"
_SIDE = r"\b(?:left|right)\b"
_FAR = r"[^,.;]{0,40}?"  # between a subject and its verb, within a part of a sentence


class KnownMotion(NamedTuple):
    """A kind of motion: its name, the patterns that ask for it, and the ways of which one should be given."""

    name: str
    patterns: tuple[str, ...]
    ways: tuple[str, ...] = ()
    default: str = ""


KNOWN_MOTIONS: tuple[KnownMotion, ...] = (
    KnownMotion(
        "pan",
        (
            r"\bpan(?:s|ning|ned)\b",
            r"(?<!frying )\bpan\b(?! (?:on|of|with|full)\b)",
            rf"{_VIEW}{_FAR}\b(?:turn|look)(?:s|ing)?\b{_FAR}{_SIDE}",
        ),
        ("left", "right"),
        "right",
    ),
    KnownMotion(
        "tilt",
        (r"\btilt(?:s|ing)?\b", rf"{_VIEW}{_FAR}\blook(?:s|ing)?\b{_FAR}\b(?:up|down)"),
        ("up", "down", "upwards", "downwards", "upward", "downward"),
        "up",
    ),
    KnownMotion(
        "zoom",
        (
            r"\bzoom(?:s|ing|ed)?\b(?! lens)",
            r"\bpush(?:es|ing)?[ -](?:\w+ly )?(?:in|forward)\b",
            r"\bpull(?:s|ing)?[ -](?:\w+ly )?(?:out|back)\b",
            r"\bdoll(?:y|ies|ying)\b",
            rf"{_VIEW}{_FAR}\b(?:mov|push|pull)(?:e|es|s|ing)?\b{_FAR}\b(?:in|closer|forward|forwards|back|backward|backwards|out)\b",
        ),
        ("in", "out", "back", "backward", "backwards", "closer", "forward", "forwards"),
        "in",
    ),
    KnownMotion(
        "rotate",
        (
            r"\brotat(?:e|es|ing|ion)\b",
            r"\b(?:roll|turn)(?:s|ing)?\b (?:\w+ly )?(?:counter|anti)?-?clockwise\b",
            rf"{_VIEW}{_FAR}\b(?:rolls?|rolling)\b",
        ),
        ("clockwise", "counterclockwise", "anticlockwise", "counter-clockwise", "anti-clockwise"),
        "clockwise",
    ),
    KnownMotion(
        "truck",
        (
            r"\btrucking\b",
            rf"\btruck\b (?:\w+ly )?(?:to the )?{_SIDE}",
            r"\btracking shot\b",
            rf"{_VIEW}{_FAR}\b(?:trucks|tracks|slides|sideways)\b",
            rf"{_VIEW}{_FAR}\b(?:moves|moving)\b{_FAR}{_SIDE}",
        ),
        ("left", "right"),
        "right",
    ),
    KnownMotion(
        "sway",
        (
            r"\bsway(?:s|ing)?\b",
            rf"\b(?:leaves|branch|branches|grass|trees?|plants?|flowers|reeds)\b{_FAR}\bmov(?:e|es|ing)\b"
            rf"{_FAR}\b(?:wind|breeze)\b",
        ),
    ),
    KnownMotion(
        "ripple",
        (
            r"\bripples?\b",
            r"\brippling\b",
            r"\bwaves\b (?:\w+ly )?(?:on|in|across|of|move)\b",
            r"\b(?:gentle|small|slow|quick|fast|rapid|the) waves\b",
        ),
    ),
    KnownMotion(
        "drift",
        (r"\bdrift(?:s|ing)?\b", rf"\b(?:clouds?|sky|mist|fog)\b{_FAR}\b(?:mov|float)(?:e|es|s|ing)?\b"),
        ("left", "right"),
        "right",
    ),
    KnownMotion(
        "flow",
        (r"\bflow(?:s|ing)?\b", rf"\b(?:river|water|stream)\b{_FAR}\bmov(?:es|ing)\b"),
        ("left", "right"),
        "right",
    ),
    KnownMotion(
        "still",
        (
            r"\bstill\b(?! (?:life|water|lake|wet|young))",
            r"\bstatic (?:camera|shot)\b",
            rf"{_VIEW}{_FAR}\b(?:static|not move|stays still)\b",
            r"\bfixed camera\b",
            r"\bno (?:camera )?(?:motion|movement)\b",
            r"\bnothing moves\b",
        ),
    ),
)  # fmt: skip

DECLINED: tuple[tuple[str, str], ...] = (
    ("dolly zoom", r"\b(?:dolly|trombone)[ -]zooms?\b|\bvertigo (?:effect|shot)\b|\bzolly\b"),
    ("orbit", r"\borbit(?:s|ing)?\b|\barc shot\b|\bcamera (?:\w+ly )?circles\b"),
    ("crane", r"\bcrane (?:shot|up|down)\b|\bpedestal (?:up|down)\b|\bboom (?:shot|up|down)\b"),
    ("hand-held camera", r"\bhand-?held\b|\bcamera (?:\w+ly )?shak(?:es|ing)\b"),
)
"""What asks for depth or shaking, which `mini` has not learned: a name and a pattern."""

NEARLY_NOTHING = 0.004
"""Widths of the picture that a clip must move to be seen to move: a pixel and a quarter of 320."""
_PARTS = re.compile(r"[,.;:!?\n]+|\b(?:and then|and|while|as|then|with)\b")
_MOST_PARTS = 3
_LONGEST_PART = 48


def motions_of(text: str) -> list[KnownMotion]:
    """Return the kinds of motion that a text asks for by words that `mini` knows, in the order of `KNOWN_MOTIONS`."""
    lowered = _without_declined(" ".join(text.lower().split()))
    return [motion for motion in KNOWN_MOTIONS if any(re.search(pattern, lowered) for pattern in motion.patterns)]


def notes_of_prompt(prompt: str) -> tuple[str, ...]:
    """Say what of a prompt will do nothing, a sentence each; nothing where there is nothing to say.

    An empty prompt is the caller's to speak of.
    """
    text = " ".join(prompt.lower().split())
    if not text:
        return ()
    notes = [*_notes_of_script(prompt)]
    declined = [name for name, pattern in DECLINED if re.search(pattern, text)]
    if declined:
        notes.append(f"mini has not learned {_listed(declined)}: these words do nothing that can be relied on")
    known = motions_of(prompt)
    if not known:
        names = ", ".join(motion.name for motion in KNOWN_MOTIONS)
        notes.append(
            f"mini knows no motion in this prompt and makes a slow zoom in; in plain English, it knows {names}"
        )
        return tuple(notes)
    ignored = [part for part in _parts(text) if _is_ignored(part)]
    if ignored:
        shown = [
            f'"{part[:_LONGEST_PART]}{"..." if len(part) > _LONGEST_PART else ""}"' for part in ignored[:_MOST_PARTS]
        ]
        more = f" and {len(ignored) - _MOST_PARTS} more" if len(ignored) > _MOST_PARTS else ""
        names = ", ".join(motion.name for motion in known)
        notes.append(f"ignored: {', '.join(shown)}{more}; what mini does with this prompt is: {names}")
    notes.extend(_notes_of_ways(text, known))
    return tuple(notes)


def notes_of_motion(travel: float, share: float, num_frames: int) -> tuple[str, ...]:
    """Say what came of a prompt.

    Args:
        travel: greatest displacement over the clip, in widths of the picture (`PlannedMotion.travel`).
        share: of the asked speed at which it happens.
        num_frames: of the clip.
    """
    notes = []
    if travel < NEARLY_NOTHING and num_frames > 1:
        notes.append(f"the motion found is nearly nothing: {100 * travel:.2f}% of the width in {num_frames} frames")
    if share < 0.999:
        notes.append(
            f"at the asked speed {num_frames} frames would leave the picture: motion is slowed to {share:.2f} of it"
        )
    return tuple(notes)


def _notes_of_script(prompt: str) -> list[str]:
    letters = [letter for letter in prompt if letter.isalpha()]
    foreign = [letter for letter in letters if not unicodedata.name(letter, "").startswith("LATIN")]
    if not letters:
        return ["mini knows English words only, and this prompt has none"]
    if len(foreign) == len(letters):
        return ["mini knows English words only: a prompt in another script is not understood"]
    return ["mini knows English words only: what stands in another script does nothing"] if foreign else []


def _notes_of_ways(text: str, known: list[KnownMotion]) -> list[str]:
    words = set(re.findall(r"[a-z-]+", text))
    undirected = [motion for motion in known if motion.ways and not words & set(motion.ways)]
    return [f"no direction is given for {motion.name}: {motion.default} is taken" for motion in undirected]


def _is_ignored(part: str) -> bool:
    return not motions_of(part) and bool(re.search(r"[^\W\d_]", part)) and not _only_speed(part)


def _only_speed(part: str) -> bool:
    """Whether a part only says how fast or which way: it belongs to its neighbor."""
    said = {
        "slowly",
        "gently",
        "slightly",
        "quickly",
        "fast",
        "rapidly",
        "very",
        "slow",
        "smooth",
        "smoothly",
        "steady",
    }
    ways = {way for motion in KNOWN_MOTIONS for way in motion.ways} | {"to", "the", "then"}
    return set(part.split()) <= said | ways


def _parts(text: str) -> list[str]:
    return [part for piece in _PARTS.split(text) if (part := piece.strip())]


def _without_declined(text: str) -> str:
    for _name, pattern in DECLINED:
        text = re.sub(pattern, " ", text)
    return text


def _listed(names: list[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
