"""Whether a change to training left its numbers alone: the losses of short runs, from any commit, as JSON.

Only the command line is used, so that the same script runs against an older commit, whose `src` is named first::

    PYTHONPATH=OLD/src python benchmarks/same_losses.py > old.json
    PYTHONPATH=NEW/src python benchmarks/same_losses.py --against old.json

Each run takes 20 steps on moving blobs with the embedded model: its own Stage II from nothing (`mini`), a refiner over
a latent cache with its own context and validation (`refiner`), both kinds of distillation, and the refiner stopped and
resumed halfway. ``--checkpoint`` names another folder than the embedded model of the commit, where that has changed.
Losses are those of ``log.jsonl`` (seven digits); ``weights`` are the SHA-256 of the averaged weights, bit for bit.
Two minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import runpy
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from swifti2v.geometry import Size
from swifti2v.media.video_writer import VideoWriter

STEPS = 20
SIZE = Size(160, 128)
LOOP = {"num_steps": STEPS, "warmup_steps": 2, "checkpoint_every": STEPS, "log_every": 1, "bfloat16": False}
NETWORK = {"gradient_checkpointing": False, "frozen_dtype": "float32"}
FLOW = {"own_context_share": 0.5, "own_context_segments": 2, "prompt_dropped_share": 0.5}
DISTILLATION = {"num_student_steps": 2, "flow": FLOW | {"own_context_segments": 1}}


def training_losses(folder: Path, checkpoint: str | None = None) -> dict[str, dict[str, Any]]:
    """Run every training in `folder`; return losses, validations and weights by the name of the run.

    Args:
        folder: an empty one, for videos, caches and runs.
        checkpoint: of the embedded model; None: the one beside the imported package.
    """
    import swifti2v

    start = checkpoint or str(Path(swifti2v.__file__).parent / "presets" / "mini")
    videos = folder / "videos"
    _write_videos(videos)
    mini = {
        "loop": LOOP,
        "model": {
            "num_channels": 48, "width": 128, "num_layers": 1, "ffn_width": 64, "local_detail_width": 32,
            "batch_size": 2, "crops": [[8, 8]], "own_context_share": 0.5, "own_context_segments": 2, "segment_size": 2,
        },
        "pairs": {"num_frames": 17, "procedural_per_photograph": 0},
    }  # fmt: skip
    _train(folder, "stage-two", mini, "--data", videos / "index.csv", "--output", folder / "mini")
    encoding = {"unchanged": True, "modes": ["transport"], "transition": None}
    selection = {"width": SIZE.width, "height": SIZE.height, "max_aspect": 1.0, "clips": {"num_frames": 25}}
    cache = folder / "cache"
    transition = {"checkpoint": start, "videos": selection, "encoding": encoding}
    _train(folder, "transition", transition, "--data", videos, "--output", cache)
    validation = {"num_samples": 1, "num_steps": 1}
    refine: dict[str, Any] = {"checkpoint": start, "network": NETWORK, "batch_size": 2, "validation": validation}
    refiner = refine | {"loop": LOOP | {"validate_every": 10, "gradient_accumulation": 2}, "flow": FLOW}
    _train(folder, "stage-two", refiner, "--cache", cache, "--output", folder / "refiner")
    for seconds in (1.0, 1e9):  # stopped by the clock after some steps, then to the end
        hurried = refiner | {"loop": refiner["loop"] | {"max_seconds": seconds}}
        _train(folder, "stage-two", hurried, "--cache", cache, "--output", folder / "resumed")
    trajectory = refine | {"loop": LOOP, "distillation": DISTILLATION | {"teacher_steps_per_step": 2}}
    _train(folder, "distill", trajectory, "--cache", cache, "--output", folder / "trajectory")
    matching = DISTILLATION | {"objective": "distribution_matching", "critic_steps_per_step": 2}
    matched = refine | {"loop": LOOP, "distillation": matching}
    _train(folder, "distill", matched, "--cache", cache, "--output", folder / "matching")
    runs = {"mini": folder / "mini" / "stage_two"}
    runs |= {name: folder / name for name in ("refiner", "resumed", "trajectory", "matching")}
    return {name: _outcome(run) for name, run in runs.items()}


def _write_videos(folder: Path) -> None:
    """Four videos of blobs that slide, with captions, and an index of them and of two photographs."""
    folder.mkdir(parents=True)
    lines = ["file,kind,caption,width,licence_tier"]
    for seed in range(4):
        coarse = np.random.default_rng(seed).integers(0, 255, (16, 20, 3), dtype=np.uint8)
        wide = cv2.resize(coarse, (SIZE.width + 160, SIZE.height + 40), interpolation=cv2.INTER_CUBIC)
        with VideoWriter(folder / f"{seed}.mp4", size=SIZE, fps=16) as writer:
            writer.write(
                np.stack([wide[t : t + SIZE.height, (2 + seed) * t : (2 + seed) * t + SIZE.width] for t in range(30)])
            )
        (folder / f"{seed}.txt").write_text("blobs pan left\n")
        lines.append(f"{seed}.mp4,clip,blobs pan left,{SIZE.width},A")
        if seed < 2:
            cv2.imwrite(str(folder / f"{seed}.png"), wide)
            lines.append(f"{seed}.png,photo,blobs,{wide.shape[1]},A")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")


def _train(folder: Path, command: str, recipe: dict[str, Any], *arguments: object) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    sys.argv = ["swifti2v", "train", command, str(path), *map(str, arguments)]
    try:
        with redirect_stdout(sys.stderr):
            runpy.run_module("swifti2v.cli.main", run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise


def _outcome(run: Path) -> dict[str, Any]:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (weights,) = (path for path in run.rglob("diffusion_pytorch_model.safetensors") if path.parent.name != "vae")
    timeless = ("seconds", "per_second", "mfu")
    return {
        "losses": [entry["loss"] for entry in entries if "loss" in entry],
        "numbers": [{name: value for name, value in entry.items() if not name.endswith(timeless)} for entry in entries],
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Print the outcome of every run; with ``--against`` compare it and exit with 1 where anything differs."""
    parser = argparse.ArgumentParser(description="Losses of short trainings, to compare commits.")
    parser.add_argument("--checkpoint", help="folder of the embedded model (default: that of the imported package)")
    parser.add_argument("--against", type=Path, help="JSON of another commit, to compare with")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = training_losses(Path(folder), given.checkpoint)
    if given.against is None:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    expected = json.loads(given.against.read_text())
    same = {name: found.get(name) == outcome for name, outcome in expected.items()}
    for name, is_same in same.items():
        sys.stdout.write(f"{name}: {'identical' if is_same else 'DIFFERENT'} losses and weights\n")
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
