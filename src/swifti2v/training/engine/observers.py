"""Where the numbers of a run go: a file of JSON lines always, TensorBoard where it is installed, others when asked."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

from swifti2v.errors import ConfigurationError
from swifti2v.training.engine.writing import writing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Tracker = Literal["tensorboard", "wandb", "trackio"]
LOG_NAME = "log.jsonl"


class NumbersLog(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record `numbers` of `step`."""
        ...

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class JsonLinesLog:
    """One JSON object per line: ``{"step": 20, "loss": 0.5, ...}``, seven digits.

    What a killed run wrote after the checkpoint from which this one goes on is dropped, a torn last line included.
    """

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self._path = path
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= resumed_step]
            if kept != lines:
                partial = path.with_name(f".{path.name}.part")
                partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                partial.replace(path)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append a line; raise `OutputError` if that is not possible."""
        entry = {"step": step} | {name: float(f"{value:.7g}") for name, value in numbers.items()}
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Nothing is held open between lines."""


class TensorBoardLog:
    """Event files for TensorBoard, in ``RUN/tensorboard``."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # Its thread may write later, from another working directory.
        self._writer: Any = writer(str(folder.resolve()), purge_step=resumed_step + 1)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class HostedLog:
    """Weights & Biases or trackio, which have the same three calls; where they send it is their configuration."""

    def __init__(self, tracker: Literal["wandb", "trackio"], folder: Path) -> None:
        self._module: Any = import_module(tracker)
        # The folder tells the run from others, so that a resumed one goes on with the same curves: trackio knows a run
        # by its name, wandb by its id.
        identity = {"name": folder.name}
        if tracker == "wandb":
            identity["id"] = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._module.init(project="swifti2v", resume="allow", **identity)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers."""
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        """End the run there."""
        self._module.finish()


def open_logs(folder: Path, trackers: Sequence[Tracker], *, resumed_step: int) -> list[NumbersLog]:
    """Open the logs of a run; TensorBoard also without being asked, if it is installed.

    Raises:
        ConfigurationError: a tracker that was asked for is not installed.
    """
    logs: list[NumbersLog] = [JsonLinesLog(folder / LOG_NAME, resumed_step=resumed_step)]
    for name in trackers:
        if find_spec(name) is None:
            msg = f"the recipe asks for {name}, which is not installed: pip install {name}, or leave it out"
            raise ConfigurationError(msg)
    if find_spec("tensorboard") is not None:
        logs.append(TensorBoardLog(folder / "tensorboard", resumed_step=resumed_step))
    return logs + [HostedLog(name, folder) for name in trackers if name != "tensorboard"]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
