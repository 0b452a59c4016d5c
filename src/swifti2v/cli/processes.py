"""A command in several processes on one machine, as torchrun starts them: the first speaks and writes, all work.

Without torchrun there is one process, and nothing here imports torch.
"""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import typer

from swifti2v.errors import GenerationCancelled, InvalidInputError, SwiftI2VError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")

EXIT_ERROR = 2


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a command, seen from one of them.

    Args:
        rank: of this one.
        count: of all.
        device: of this one; None: as asked for.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and writes files."""
        return self.rank == 0

    def together(self, action: Callable[[], Result]) -> Result:
        """Do something in every process and wait for all; where it fails in one, all end, and one says why.

        Raises:
            SwiftI2VError: what `action` raised, where there is one process.
            typer.Exit: `action` failed in some process.
        """
        if self.count == 1:
            return action()
        import torch.distributed as dist

        error: SwiftI2VError | None = None
        try:
            result = action()
        except SwiftI2VError as raised:
            error = raised
        failed: list[bool] = [False] * self.count
        dist.all_gather_object(failed, error is not None)
        if not any(failed):
            return result
        if error is not None and failed.index(True) == self.rank:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        # torchrun ends all processes with the first; that one has said its word by then.
        dist.barrier()
        raise typer.Exit(EXIT_ERROR)

    @contextmanager
    def work_directory(self, given: Path | None) -> Iterator[Path | None]:
        """Yield a work directory for this process: the given one or a copy, as all must go on from the same state."""
        if given is None or self.count == 1:
            yield given
            return
        with TemporaryDirectory(prefix="swifti2v-") as temporary:
            own = given if self.is_first else Path(temporary) / "work"
            self.together(lambda: None if self.is_first else shutil.copytree(given, own))
            yield own


@contextmanager
def launched_processes() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun has started; without it, be the only one.

    Raises:
        InvalidInputError: they are on several machines, or more than there are CUDA cards.
        GenerationCancelled: another process has ended.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ProcessGroup()
        return
    _check_launch(int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    import torch

    from swifti2v.training.engine.distributed import joined_processes

    try:
        with joined_processes() as joined:
            yield ProcessGroup(joined.rank, joined.count, str(joined.device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in ("closed by peer", "NCCL", "Gloo", "gloo")):
            raise
        msg = "another process of this run has ended; its own message says why"
        raise GenerationCancelled(msg) from error


def _check_launch(count: int, here: int) -> None:
    import torch

    if count != here:
        msg = f"{count} processes were started and {here} are on this machine; start all of them on one"
        raise InvalidInputError(msg)
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        cards = torch.cuda.device_count()
        msg = f"{count} processes were started for {cards} CUDA cards; use torchrun --nproc-per-node {cards}"
        raise InvalidInputError(msg)
