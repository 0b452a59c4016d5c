"""Conditional segment-wise generation (paper, figure CSG): denoise a window at a time, write the result back.

Memory holds the frames that the current and later windows still need, the anchor if they see it, whatever the length
of the clip.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from swifti2v.errors import InvalidInputError
from swifti2v.sampling.schedules import check_sigmas
from swifti2v.sampling.solvers import Solver, euler
from swifti2v.segments import Segment


@dataclass(frozen=True)
class Window:
    """What a segment sees; W = ``len(segment.window)`` latent frames in time order.

    Args:
        segment: which frames these are.
        reference: [B,C,W,h,w]; z_ref of the window's frames, where finished frames hold the result written back. So it
            is the context too: anchor and finished neighbors hold finished latents, unrefined ones the reference.
    """

    segment: Segment
    reference: Tensor


WindowDenoiser = Callable[[Window, Tensor, float], Tensor]
"""``(window, x_targets [B,C,M,h,w], sigma) -> x0`` of the targets, same shape."""

OnSegmentStep = Callable[[Segment, int, int], None]
"""``(segment, step_index, num_steps)``, after each step (0-based). An exception raised in it stops at once."""


def derived_seed(seed: int, *path: int) -> int:
    """Return a seed for one part of a run, independent between parts; in [0, 2**64).

    The CPU generator of torch reads only the low 32 bits of a seed, so neighboring numbers are hashed, not added.
    """
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def frame_noise(
    seed: int,
    latent_frame: int,
    shape: Sequence[int],
    *,
    step: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return unit Gaussian noise of one latent frame: a function of (seed, latent frame, step) alone.

    So it does not change with the segment size, with a resumed run, or with the device (it is drawn on the CPU).

    Args:
        seed: of the run.
        latent_frame: index j in the clip.
        shape: of the frame, [B,C,1,h,w].
        step: 0 for the initial noise, i for what a re-noising solver adds at ``sigmas[i]``.
        device: where the result goes.

    Returns:
        float32 of `shape`.
    """
    generator = torch.Generator("cpu").manual_seed(derived_seed(seed, latent_frame, step))
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32)
    return noise.to(device or "cpu", non_blocking=True)


def nothing_finished(segment: Segment) -> None:
    """Say that no segment is stored: the `finished` of a run that is not resumed."""
    del segment


def sample_segments(
    reference: Iterable[Tensor],
    plan: Sequence[Segment],
    *,
    denoise: WindowDenoiser,
    sigmas: Sequence[float],
    seed: int,
    solver: Solver = euler,
    finished: Callable[[Segment], Tensor | None] = nothing_finished,
    on_step: OnSegmentStep | None = None,
) -> Iterator[tuple[Segment, Tensor]]:
    """Denoise the segments of a plan in order and yield each as soon as it is done.

    A segment starts from ``(1 - sigmas[0]) * z_ref + sigmas[0] * noise``; its result replaces the reference of its
    frames for every later window ("update" in the paper). Gradients are off.

    Args:
        reference: latent frames of z_ref [B,C,1,h,w] float32, frame 0 (the anchor) first, read no further ahead than
            the window at hand needs.
        plan: from `swifti2v.segments.plan_segments`; may be empty (a clip of one frame), then nothing is read.
        denoise: the clean prediction of a window's targets.
        sigmas: strictly descending in [0, 1], the last 0.0.
        seed: of `frame_noise`.
        solver: `euler`, `renoise` or another `Solver`.
        finished: stored targets [B,C,M,h,w] of a resumed run, which are written back and yielded without denoising;
            None for a segment that has to be made.
        on_step: called after each step; to cancel, raise in it.

    Yields:
        (segment, its targets [B,C,M,h,w]), in the order of the plan.

    Raises:
        InvalidInputError: at the call, for a schedule that is not one; while iterating, for a reference that is
            shorter or longer than the plan, or a frame or stored result of another shape.
    """
    values = check_sigmas(sigmas)
    return _sample(
        _ReferenceWindow(reference, plan), plan, partial(_denoise, denoise, values, seed, solver, on_step), finished
    )


def _sample(
    frames: _ReferenceWindow,
    plan: Sequence[Segment],
    make: Callable[[Window], Tensor],
    finished: Callable[[Segment], Tensor | None],
) -> Iterator[tuple[Segment, Tensor]]:
    for segment in plan:
        frames.advance(segment)
        stored = finished(segment)
        targets = frames.accept(segment, stored) if stored is not None else make(frames.window(segment))
        frames.write_back(segment, targets)
        yield segment, targets
        del targets  # or they would live on while the next segment is made, 130 MB at 2560x1408
    if plan:
        frames.check_exhausted()


def _denoise(
    denoise: WindowDenoiser,
    sigmas: tuple[float, ...],
    seed: int,
    solver: Solver,
    on_step: OnSegmentStep | None,
    window: Window,
) -> Tensor:
    segment, device = window.segment, window.reference.device
    shape = window.reference[:, :, :1].shape

    def noise(step: int) -> Tensor:
        return torch.cat([frame_noise(seed, j, shape, step=step, device=device) for j in segment.targets], dim=2)

    with torch.no_grad():
        start = noise(0).to(window.reference)
        if sigmas[0] < 1:
            start = torch.lerp(window.reference[:, :, segment.target_slice], start, sigmas[0])
        return solver(
            partial(denoise, window),
            start,
            sigmas,
            noise=noise,
            on_step=partial(on_step, segment) if on_step is not None else None,
        )


class _ReferenceWindow:
    """The frames of z_ref that are alive: those that the current or a later window needs."""

    def __init__(self, reference: Iterable[Tensor], plan: Sequence[Segment]) -> None:
        self._source = iter(reference)
        self._frames: dict[int, Tensor] = {}
        self._shape: tuple[int, ...] = ()
        self._num_read = 0
        self._keeps_anchor = any(segment.anchor for segment in plan)
        self._total = max((segment.targets.stop for segment in plan), default=0)
        first = [min((*segment.before, *segment.targets)) for segment in plan]
        earliest = reversed(list(itertools.accumulate(reversed(first), min)))
        self._first_needed = {segment.index: start for segment, start in zip(plan, earliest, strict=True)}

    def advance(self, segment: Segment) -> None:
        """Forget the frames that no window needs any more, and read up to the end of this one."""
        first_needed = self._first_needed[segment.index]
        for index in [index for index in self._frames if not self._is_needed(index, first_needed)]:
            del self._frames[index]
        while self._num_read <= segment.window[-1]:
            frame = next(self._source, None)
            if frame is None:
                msg = (
                    f"the reference ended after {self._num_read} latent frames but the plan has {self._total}; "
                    f"plan the segments of this clip or give all of its frames"
                )
                raise InvalidInputError(msg)
            self._check_frame(frame)
            if self._is_needed(self._num_read, first_needed):
                self._frames[self._num_read] = frame
            self._num_read += 1

    def window(self, segment: Segment) -> Window:
        reference = torch.cat([self._frames[index] for index in segment.window], dim=2)
        # Frames and window share their memory while the network runs, which is when memory is short.
        for place, index in enumerate(segment.window):
            self._frames[index] = reference[:, :, place : place + 1]
        return Window(segment, reference)

    def accept(self, segment: Segment, stored: Tensor) -> Tensor:
        """Return a stored result on the device of the reference; raise if it is not one of this segment."""
        expected = (*self._shape[:2], len(segment.targets), *self._shape[3:])
        if tuple(stored.shape) != expected:
            msg = (
                f"the stored result of segment {segment.index} has shape {tuple(stored.shape)}, not {expected}; "
                f"remove it or start in an empty work directory"
            )
            raise InvalidInputError(msg)
        return stored.to(self._frames[segment.targets.start])

    def write_back(self, segment: Segment, targets: Tensor) -> None:
        # Copies, because the caller gets `targets` and may change it, and because a view would keep all M frames alive.
        for place, index in enumerate(segment.targets):
            self._frames[index] = targets[:, :, place : place + 1].clone()

    def check_exhausted(self) -> None:
        if next(self._source, None) is not None:
            msg = f"the reference has more than the {self._total} latent frames of the plan; plan the whole clip"
            raise InvalidInputError(msg)

    def _is_needed(self, index: int, first_needed: int) -> bool:
        return index >= first_needed or (index == 0 and self._keeps_anchor)

    def _check_frame(self, frame: Tensor) -> None:
        shape = self._shape = self._shape or tuple(frame.shape)
        if len(shape) != 5 or shape[2] != 1 or tuple(frame.shape) != shape:
            msg = (
                f"latent frame {self._num_read} of the reference has shape {tuple(frame.shape)}; "
                f"every frame must be [B,C,1,h,w] like the first ({shape})"
            )
            raise InvalidInputError(msg)
