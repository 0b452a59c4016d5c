"""Train `light` from a recipe: prepare pairs once, train through sequences of its own output, write the weights.

```
swifti2v train light recipes/light/light.yaml --data INDEX.csv --output RUN
```

Every sequence is a crop of an item, several frames long; the network's own last frame and hidden state go in, and the
gradient goes through all of them. The next step goes on where it ended, with the state it left, to the end of the item:
so errors that only many frames of its own output bring about are seen. (Sequences of three frames from a perfect start
gave a network that lost 4 dB by frame 16.) A stream begins at frame 1, from the image, or later, from the transported
frame before it, which is spoiled in half of the cases.

The loop is its own, not `engine.loop`'s: there a batch depends on its number alone, and here it depends on what the
network made in the step before. The streams are part of the checkpoint; everything else is drawn from (seed, step). So
a run that was stopped goes on as if it had not been, to the bit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from swifti2v.errors import CheckpointError, ConfigurationError
from swifti2v.light.network import LightConfig, LightNetwork, channels_last
from swifti2v.light.refine import computes_half
from swifti2v.light.weights import load_network, save_network
from swifti2v.training.engine.checkpoints import CheckpointFolder
from swifti2v.training.engine.interruption import interruption_as_request
from swifti2v.training.engine.loop import StepReport
from swifti2v.training.engine.observers import open_logs
from swifti2v.training.light.losses import psnr_of, sequence_loss
from swifti2v.training.light.pairs import PairOptions, prepare_pairs
from swifti2v.training.light.sequences import Items, Stream, read, spoiled

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from swifti2v.light.network import LightState
    from swifti2v.training.engine.observers import NumbersLog

_VALIDATION_HEIGHT, _VALIDATION_WIDTH = 64, 96  # of the cut that is validated, in pixels of the work grid


@dataclass(frozen=True)
class LightRun:
    """The recipe file.

    Args:
        num_steps: optimizer steps of the whole run.
        learning_rate: peak; linear warm-up over `warmup_steps`, times half a cosine over the whole run.
        batch_size: streams trained on at a time.
        crop: side of a cut, in pixels of the work grid (a quarter of the output's).
        length: frames of a sequence.
        temporal, spectral: weights of two terms of the loss (`losses.sequence_loss`).
        gradient_clip: largest norm of the gradient.
        ema_decay: of the averaged weights, which are the result.
        clean_share: streams drawn from undamaged items only; of the others `1 / pairs.variants` are undamaged too.
        checkpoint_every: steps between checkpoints; the averaged weights are validated and written then.
        log_every: steps between lines of ``log.jsonl``.
        seed: of weights and streams.
        network: sizes.
        pairs: the items.
    """

    num_steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    batch_size: int = 2
    crop: int = 40
    length: int = 7
    temporal: float = 0.15
    spectral: float = 0.0
    gradient_clip: float = 3.0
    ema_decay: float = 0.998
    clean_share: float = 0.35
    checkpoint_every: int = 300
    log_every: int = 50
    seed: int = 0
    network: LightConfig = field(default_factory=LightConfig)
    pairs: PairOptions = field(default_factory=PairOptions)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "crop", "length", "checkpoint_every", "log_every", "warmup_steps"):
            if getattr(self, name) < 1:
                msg = f"{name} is {getattr(self, name)}; it must be at least 1"
                raise ConfigurationError(msg, param=name, value=getattr(self, name))
        if self.crop % 2:
            msg = f"crop is {self.crop}; it must be even"
            raise ConfigurationError(msg, param="crop", value=self.crop)


def train_light(
    run: LightRun,
    *,
    index: Path,
    output: Path,
    initial: Path | None = None,
    on_item: Callable[[int, int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Path:
    """Prepare the pairs that are not there yet, train from the last checkpoint or the start, and write the weights.

    Args:
        run: the recipe.
        index: of clips and photographs.
        output: folder of the run.
        initial: folder of weights to start from.
        on_item: told how many pairs of how many are done.
        on_step: told of every step.

    Returns:
        The folder of weights, which `light.weights.load_network` reads.

    Raises:
        ConfigurationError: the index has nothing to train on.
        CheckpointError: a checkpoint, or `initial`, is damaged or of another network.
        OutputError: something cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    prepare_pairs(index, output / "pairs", run.pairs, on_item=on_item)
    training = LightTraining(run, output, initial=initial)
    training.run(on_step=on_step)
    return training.weights_folder


class LightTraining:
    """The loop over prepared pairs; resumes from what `directory` holds.

    Args:
        run: the recipe.
        directory: of the run, with the items in ``pairs``.
        initial: folder of weights to start from where there is no checkpoint.
    """

    def __init__(self, run: LightRun, directory: Path, *, initial: Path | None = None) -> None:
        self.options = run
        self.directory = directory
        self.weights_folder = directory / "weights"
        self.items, self.held_back = (Items(directory / "pairs", split) for split in ("train", "val"))
        torch.manual_seed(run.seed)
        self.network = channels_last(LightNetwork(run.network))
        if initial is not None:
            self._start_from(initial)
        self.average = {name: value.clone() for name, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), run.learning_rate, weight_decay=0, betas=(0.9, 0.99)
        )
        self.step = 0
        self.streams: list[Stream] = []
        self._autocast = computes_half(torch.device("cpu"))
        self._checkpoints = CheckpointFolder(directory)
        self._stopping = False
        self._resume()

    def run(self, *, on_step: Callable[[StepReport], None] | None = None) -> None:
        """Train to the end; errors as in `train_light`."""
        options, saved_step = self.options, self.step
        logs = open_logs(self.directory, (), resumed_step=self.step)
        window: list[dict[str, float]] = []
        try:
            with interruption_as_request(self._stop):
                while self.step < options.num_steps and not self._stopping:
                    started = time.monotonic()
                    numbers = self.train_step()
                    window.append(numbers)
                    if on_step is not None:
                        on_step(StepReport(self.step, options.num_steps, numbers, time.monotonic() - started))
                    if self.step % options.log_every == 0:
                        means = {name: sum(each[name] for each in window) / len(window) for name in numbers}
                        _write(logs, self.step, means)
                        window.clear()
                    if self.step % options.checkpoint_every == 0:
                        self._checkpoint(logs)
                        saved_step = self.step
                if saved_step != self.step or not self.weights_folder.exists():
                    self._checkpoint(logs)
        finally:
            for log in logs:
                log.close()
        if self._stopping and self.step < options.num_steps:
            msg = f"stopped after step {self.step}; start it again to go on"
            raise KeyboardInterrupt(msg)

    def train_step(self) -> dict[str, float]:
        """Take one step; return its loss and the decibels that the network gains over the transported frames."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate_at(self.step)
        batch = self._batch(np.random.default_rng((options.seed, self.step)))
        loss, given, made, state = sequence_loss(
            self.network,
            batch,
            temporal=options.temporal,
            spectral=options.spectral,
            autocast=self._autocast,
            detached=self.step % 2 == 1,
        )
        self._leave(state)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), options.gradient_clip)
        self.optimizer.step()
        self.step += 1
        decay = min(options.ema_decay, self.step / (self.step + 20))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        return {"loss": float(loss.detach()), "gained_decibels": given - made}

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step `step` (from 0)."""
        options = self.options
        warmed = min(1, (step + 1) / options.warmup_steps)
        return options.learning_rate * warmed * (0.5 * (1 + math.cos(math.pi * step / options.num_steps)) + 0.01)

    def validate(self) -> dict[str, float]:
        """Run the middle of whole items from the image with the averaged weights.

        Returns:
            By item its mean PSNR in dB; ``gained_clean`` and ``gained_damaged``: dB over the transported frames.
        """
        network = channels_last(LightNetwork(self.options.network))
        network.load_state_dict(self.average)
        found: dict[str, float] = {}
        gains: dict[str, list[float]] = {"clean": [], "damaged": []}
        for name, arrays in self.held_back.arrays.items():
            length, _, height, width = arrays["flow"].shape
            top, left = height // 4, width // 4
            tall, wide = (
                min(most, side - start) // 2 * 2
                for most, side, start in ((_VALIDATION_HEIGHT, height, top), (_VALIDATION_WIDTH, width, left))
            )
            batch = {key: value[None] for key, value in read(arrays, 0, length, top, left, tall, wide).items()}
            with torch.no_grad():
                judged = sequence_loss(network, batch, temporal=0, spectral=0, autocast=self._autocast)
            found[name.removeprefix("val-")] = psnr_of(judged.made)
            gains["clean" if name.endswith("_0") else "damaged"].append(judged.given - judged.made)
        return found | {f"gained_{kind}": sum(each) / len(each) for kind, each in gains.items() if each}

    def _batch(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cut the next sequence of every stream; one that has come to the end of its item begins elsewhere."""
        options, cuts = self.options, []
        for slot in range(options.batch_size):
            stream = self.streams[slot] if slot < len(self.streams) else None
            found = self.items.cut(stream, crop=options.crop, length=options.length) if stream else None
            if stream is None or found is None or stream.frame is None or stream.hidden is None:
                stream, found = self._begun(rng)
                self.streams[slot : slot + 1] = [stream]
            else:
                found["first"], found["hidden"] = stream.frame[None], stream.hidden
            cuts.append(found)
        return {name: torch.stack([cut[name] for cut in cuts]) for name in cuts[0]}

    def _begun(self, rng: np.random.Generator) -> tuple[Stream, dict[str, Tensor]]:
        options = self.options
        stream = self.items.draw(rng, crop=options.crop, length=options.length, clean_share=options.clean_share)
        found = self.items.cut(stream, crop=options.crop, length=options.length)
        if found is None:
            msg = f"length is {options.length}, and {stream.item} has fewer frames; lower it"
            raise ConfigurationError(msg, param="length", value=options.length)
        if stream.begin > 0 and rng.random() < 0.5:
            found["first"] = spoiled(found["first"][0], rng)[None]
        found["hidden"] = torch.zeros(options.network.hidden, options.crop, options.crop)
        return stream, found

    def _leave(self, state: LightState) -> None:
        """Keep what the network made, for the next sequence of each stream."""
        for slot, stream in enumerate(self.streams):
            stream.begin += self.options.length
            stream.frame, stream.hidden = state.frame[slot].detach().clone(), state.hidden[slot].detach().clone()

    def _stop(self) -> None:
        self._stopping = True

    def _start_from(self, initial: Path) -> None:
        network = load_network(torch.device("cpu"), initial)
        if network.config != self.options.network:
            msg = f"{initial} has a network of {network.config}, and the recipe one of {self.options.network}"
            raise CheckpointError(msg)
        self.network.load_state_dict(network.state_dict())

    def _checkpoint(self, logs: list[NumbersLog]) -> None:
        state: dict[str, Any] = {
            "step": self.step,
            "module": self.network.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "streams": [vars(stream) for stream in self.streams],
        }
        self._checkpoints.save(state)
        save_network(self.options.network, self.average, self.weights_folder)
        _write(logs, self.step, {f"validation/{name}": value for name, value in self.validate().items()})

    def _resume(self) -> None:
        state = self._checkpoints.load()
        if state is None:
            return
        try:
            self.network.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average = {name: value.clone() for name, value in state["average"].items()}
            self.streams = [Stream(**stream) for stream in state["streams"]]
            self.step = state["step"]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            msg = (
                f"{self._checkpoints.newest} is of another network or recipe ({str(error).splitlines()[0]}); "
                "resume with the recipe that wrote it, or train in a new folder"
            )
            raise CheckpointError(msg) from error


def _write(logs: list[NumbersLog], step: int, numbers: dict[str, float]) -> None:
    for log in logs:
        log.write(step, numbers)
