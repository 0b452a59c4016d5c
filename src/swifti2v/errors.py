"""One tree of exceptions. Each is also the standard-library error that a caller would expect in its place.

Messages are one line, say what is wrong with which value, and end with what to do about it.
"""

from __future__ import annotations


class SwiftI2VError(Exception):
    """Base of every error that this package raises on purpose.

    Args:
        *args: the message.
        param: name of the argument, field or option that is wrong, where there is one.
        value: what was given for it.
    """

    def __init__(self, *args: object, param: str | None = None, value: object = None) -> None:
        super().__init__(*args)
        self.param = param
        self.value = value


class InvalidInputError(SwiftI2VError, ValueError):
    """An argument has a value that cannot be used: a size, a number of frames, a prompt, an option."""


class ImageInputError(InvalidInputError):
    """The input image is missing, unreadable, truncated, animated or too large."""


class VideoInputError(InvalidInputError):
    """An input video is missing, unreadable, truncated or of the wrong shape."""


class ConfigurationError(SwiftI2VError, ValueError):
    """A configuration file or mapping has an unknown key or a value of the wrong type."""


class CheckpointError(SwiftI2VError, ValueError):
    """A checkpoint is missing, corrupt, incomplete, or not of the layout that the loader reads."""


class AdapterError(CheckpointError):
    """A LoRA file does not match the network, wholly or in part."""


class OutputError(SwiftI2VError, OSError):
    """A result cannot be written: no permission, no space, no such folder."""


class WorkDirectoryError(SwiftI2VError, ValueError):
    """A work directory holds another run than the one that was asked for, or is damaged."""


class LatentCacheError(SwiftI2VError, ValueError):
    """A latent cache is stale (made by another codec or with other settings), incomplete or damaged."""


class TrainingError(SwiftI2VError, RuntimeError):
    """Training cannot go on: a loss or gradient that is not finite, processes that disagree."""


class JobError(SwiftI2VError, LookupError):
    """A job does not exist, has expired, or is in a state that does not allow what was asked."""


class QueueFullError(SwiftI2VError, RuntimeError):
    """The queue takes no more jobs for now."""


class MemoryBudgetError(SwiftI2VError, ValueError):
    """No plan fits into the memory budget; the message says which budget would."""


class DeviceLostError(SwiftI2VError, RuntimeError):
    """The card of this process has failed; only another process can use it again, if any."""


class GenerationCancelled(SwiftI2VError):  # noqa: N818 - not a failure: the name says what happened, as asyncio's CancelledError does
    """The caller asked to stop; everything finished before that is kept."""
