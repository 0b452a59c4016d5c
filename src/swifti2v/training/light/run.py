"""Trains `light` through sequences of its own output; resumes exactly.

``python train.py --data DIR --output DIR --steps N [--warm-start FILE] [--spectral 0.3]``. Every sequence is a crop
of an item of `pairs.py`, several frames long; the network's own last frame and hidden state go in, and the gradient goes
through all of them. The next step goes on where it ended, with the state it left, to the end of the item: so errors that
only many frames of its own output bring about are seen. (Sequences of three frames from a perfect start gave a network
that lost 4 dB by frame 16.) A stream begins at frame 1, from the image, or later, from the transported frame before it,
which is spoiled in half of the cases.

Loss, in decibels: ``10 log10(mean squared error)`` per frame and sample, plus `temporal` times the same of the change of
the error along the motion (which is what flickers), plus `spectral` times the mean absolute logarithm of the local
high-frequency energy over the truth's.

All randomness is drawn from (seed, step), so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swifti2v.light.inputs import GRID
from swifti2v.light.network import LightConfig, LightNetwork, LightState, aligned

EMA = 0.998
CLEAN_SHARE = 0.35
"""Sequences drawn from undamaged items only; of the others a quarter is undamaged too."""


class Items:
    """The items of a split, mapped into memory."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folders = sorted(path for path in folder.glob(f"{split}-*") if path.suffix != ".part")
        self.arrays = [{p.stem: np.load(p, mmap_mode="r") for p in folder.glob("*.npy")} for folder in self.folders]
        # `pairs.py` leaves the variant 0 of each source undamaged.
        self.clean = [index for index, folder in enumerate(self.folders) if folder.name.endswith("_0")]
        self.by_name = {folder.name: arrays for folder, arrays in zip(self.folders, self.arrays, strict=True)}

    def draw(self, rng: np.random.Generator, crop: int, length: int) -> dict[str, Any]:
        """Return where a new stream begins: item, first frame, place and flips; half of them begin from the image."""
        index = int(rng.choice(self.clean)) if rng.random() < CLEAN_SHARE else int(rng.integers(len(self.arrays)))
        count, height, width = self.arrays[index]["flow"].shape[0], *self.arrays[index]["flow"].shape[-2:]
        return {
            "item": self.folders[index].name,
            "begin": 0 if rng.random() < 0.5 else int(rng.integers(0, count - length + 1)),
            "top": int(rng.integers(0, height - crop + 1)),
            "left": int(rng.integers(0, width - crop + 1)),
            "flips": tuple(bool(flip) for flip in rng.random(3) < 0.5),
        }

    def cut(self, stream: dict[str, Any], crop: int, length: int) -> dict[str, Tensor] | None:
        """Return the next `length` frames of a stream, or None at its end."""
        arrays = self.by_name[stream["item"]]
        if stream["begin"] + length > len(arrays["flow"]):
            return None
        return read(arrays, stream["begin"], length, stream["top"], stream["left"], crop, crop, flips=stream["flips"])


def spoiled(first: Tensor, rng: np.random.Generator) -> Tensor:
    """Return a frame [3, H, W] as a long run might have spoiled it: too sharp or too soft, its colors off."""
    blurred = F.avg_pool2d(F.pad(first[None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0]
    sharper = first + float(rng.uniform(-0.7, 1.2)) * (first - blurred)
    offsets = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.03), (1, 3, 3, 3)).astype(np.float32))
    return sharper + F.interpolate(offsets, size=first.shape[-2:], mode="bilinear", align_corners=False)[0]


def read(arrays, begin, length, top, left, high, wide, *, flips=(False, False, False)) -> dict[str, Tensor]:
    """Cut a sequence out of the arrays of an item; sizes in pixels of the work grid."""

    def cut(name: str, scale: int, first: int, last: int) -> np.ndarray:
        return arrays[name][first:last, :, top * scale : (top + high) * scale, left * scale : (left + wide) * scale]

    end = begin + length
    found = {
        "truth": cut("truth", GRID, begin, end + 1).astype(np.float32) / 127.5 - 1,
        "base": cut("base", GRID, max(begin - 1, 0), end).astype(np.float32) / 127.5 - 1,
        "detail": cut("detail", GRID, max(begin - 1, 0), end).astype(np.float32) / 127.5,
        "evidence": cut("evidence", 1, max(begin - 1, 0), end).astype(np.float32) / 254,
        "flow": cut("flow", 1, begin, end).astype(np.float32),
    }
    if begin == 0:
        found["first"] = found["truth"][:1].copy()
    else:
        confidence = (found["evidence"][:1, :1] * 2).repeat(GRID, 2).repeat(GRID, 3)
        found["first"] = found["base"][:1] + confidence * found["detail"][:1]
        for name in ("base", "detail", "evidence"):
            found[name] = found[name][1:]
    if flips[0]:
        found = {name: values[..., ::-1] for name, values in found.items()}
        found["flow"] = found["flow"] * np.float32([-1, 1])[:, None, None]
    if flips[1]:
        found = {name: values[..., ::-1, :] for name, values in found.items()}
        found["flow"] = found["flow"] * np.float32([1, -1])[:, None, None]
    if flips[2] and high == wide:
        found = {name: values.swapaxes(-1, -2) for name, values in found.items()}
        found["flow"] = found["flow"][:, ::-1]
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}


def high_pass(picture: Tensor) -> Tensor:
    """Return luma less its Gaussian blur of 2 pixels: [B, 1, H, W]."""
    luma = (picture * picture.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True)
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float32) / 2) ** 2)
    taps = taps / taps.sum()
    blurred = F.conv2d(F.pad(luma, (5, 5, 5, 5), mode="reflect"), taps.view(1, 1, 1, -1))
    return luma - F.conv2d(blurred, taps.view(1, 1, -1, 1))


def decibels(error: Tensor) -> Tensor:
    return 10 * torch.log10(error + 2e-5)


def sequence_loss(
    network: LightNetwork,
    batch: dict[str, Tensor],
    *,
    temporal: float,
    spectral: float,
    autocast: bool,
    detached: bool = False,
):
    """Return the loss and, for the log, the mean decibels of the transported frames and of the network's."""
    length = batch["flow"].shape[1]
    state = LightState(batch["first"][:, 0], batch.get("hidden", network.initial_state(batch["first"][:, 0]).hidden))
    earlier_error = None
    total, made, given = 0.0, 0.0, 0.0
    for index in range(length):
        base, detail, evidence, flow = (batch[name][:, index] for name in ("base", "detail", "evidence", "flow"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if detached:
                state = LightState(state.frame.detach(), state.hidden)
            state = network.step(base, detail, evidence, flow, state)
        truth = batch["truth"][:, index + 1]
        error = state.frame - truth
        squared = error.square().mean(dim=(1, 2, 3))
        loss = decibels(squared).mean()
        made += float(loss.detach())
        with torch.no_grad():
            confidence = F.interpolate(evidence[:, :1] * 2, scale_factor=4.0, mode="bilinear", align_corners=False)
            given += float(decibels((base + confidence * detail - truth).square().mean(dim=(1, 2, 3))).mean())
        if temporal > 0 and earlier_error is not None:
            seen = (evidence[:, 1:2] < 0.25).float()
            moved = aligned(
                earlier_error, F.interpolate(flow, scale_factor=4.0, mode="nearest") * GRID, mode="bilinear"
            )
            weight = F.interpolate(seen, scale_factor=4.0, mode="nearest")
            change = ((error - moved).square() * weight).mean(dim=(1, 2, 3))
            loss = loss + temporal * decibels(change).mean()
        if temporal > 0:
            earlier_error = error
        if spectral > 0:
            mine, true = (F.avg_pool2d(high_pass(p).square(), 32, 16) + 4e-5 for p in (state.frame, truth))
            loss = loss + spectral * 10 / np.log(10) * (mine / true).log().abs().mean()
        total = total + loss
    return total / length, given / length, made / length, state


@torch.no_grad()
def validate(network: LightNetwork, items: Items) -> dict[str, float]:
    """Run whole items from the image and return mean PSNR (dB) by item, of transport and of the network."""
    result = {}
    for folder, arrays in zip(items.folders, items.arrays, strict=True):
        count, height, width = arrays["flow"].shape[0], *arrays["flow"].shape[-2:]
        top, left, high, wide = height // 4, width // 4, min(64, height), min(96, width)
        high, wide = min(high, height - top) // 2 * 2, min(wide, width - left) // 2 * 2
        batch = {k: v[None] for k, v in read(arrays, 0, count, top, left, high, wide).items()}
        _, given, made, _ = sequence_loss(network, batch, temporal=0, spectral=0, autocast=True)
        result[folder.name.removeprefix("val-")] = (round(6.0206 - given, 2), round(6.0206 - made, 2))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm-start", type=Path)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, default=40)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--temporal", type=float, default=0.15)
    parser.add_argument("--spectral", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=300, help="steps between checkpoints")
    parser.add_argument("--config", type=json.loads, default={})
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    items, held = Items(arguments.data, "train"), Items(arguments.data, "val")
    network = LightNetwork(LightConfig(**arguments.config)).to(memory_format=torch.channels_last)
    if arguments.warm_start:
        network.load_state_dict(torch.load(arguments.warm_start, weights_only=False)["ema"])
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), arguments.rate, weight_decay=0, betas=(0.9, 0.99))
    step, spent = 0, 0.0
    streams: dict[int, dict[str, Any]] = {}
    checkpoint = arguments.output / "latest.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        average, step, spent = saved["ema"], saved["step"], saved["seconds"]
        streams = saved.get("streams", {})
    print(
        f"{sum(p.numel() for p in network.parameters())} parameters, {len(items.arrays)} items, step {step}", flush=True
    )
    begun, sums = time.time() - spent, np.zeros(3)
    while step < arguments.steps:
        share = step / arguments.steps
        rate = float(arguments.rate * min(1, (step + 1) / 50) * (0.5 * (1 + np.cos(np.pi * share)) + 0.01))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = np.random.default_rng((arguments.seed, step))
        cuts = []
        for slot in range(arguments.batch):
            stream = streams.get(slot)
            found = items.cut(stream, arguments.crop, arguments.length) if stream else None
            if stream is None or found is None:
                stream = streams[slot] = items.draw(rng, arguments.crop, arguments.length)
                found = items.cut(stream, arguments.crop, arguments.length)
                assert found is not None
                if stream["begin"] > 0 and rng.random() < 0.5:
                    found["first"] = spoiled(found["first"][0], rng)[None]
                found["hidden"] = torch.zeros(network.config.hidden, arguments.crop, arguments.crop)
            else:
                found["first"], found["hidden"] = stream["frame"][None], stream["hidden"]
            cuts.append(found)
        batch = {name: torch.stack([cut[name] for cut in cuts]) for name in cuts[0]}
        loss, given, made, state = sequence_loss(
            network,
            batch,
            temporal=arguments.temporal,
            spectral=arguments.spectral,
            autocast=True,
            detached=step % 2 == 1,
        )
        for slot in range(arguments.batch):
            streams[slot]["begin"] += arguments.length
            streams[slot]["frame"], streams[slot]["hidden"] = (
                state.frame[slot].detach().clone(),
                state.hidden[slot].detach().clone(),
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        step += 1
        decay = min(EMA, step / (step + 20))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        sums += (given - made, made, float(loss.detach()))
        if step % 50 == 0:
            print(
                f"{time.time() - begun:.0f} s step {step} gain {sums[0] / 50:.2f} loss {sums[2] / 50:.3f}", flush=True
            )
            with (arguments.output / "curve.csv").open("a") as file:
                file.write(f"{step},{time.time() - begun:.0f},{sums[0] / 50:.4f},{sums[2] / 50:.4f}\n")
            sums[:] = 0
        if step % arguments.every == 0 or step == arguments.steps:
            saved = {
                "network": network.state_dict(), "ema": average, "optimizer": optimizer.state_dict(), "step": step,
                "seconds": time.time() - begun, "config": asdict(network.config), "streams": streams,
            }  # fmt: skip
            torch.save(saved, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            judge = LightNetwork(network.config).to(memory_format=torch.channels_last)
            judge.load_state_dict(average)
            found = validate(judge, held)
            gains = {
                kind: np.mean([m - g for name, (g, m) in found.items() if name.endswith(kind)]) for kind in ("_0", "_1")
            }
            print(f"  validation: clean {gains['_0']:+.2f} damaged {gains['_1']:+.2f} {found}", flush=True)


if __name__ == "__main__":
    main()
