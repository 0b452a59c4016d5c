"""Segment-wise sampling with a toy denoiser that mixes the frames of its window."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch

from swifti2v.errors import GenerationCancelled, InvalidInputError
from swifti2v.sampling.schedules import FEW_STEP_SIGMAS, shifted_sigmas
from swifti2v.sampling.segmented import Window, derived_seed, frame_noise, sample_segments
from swifti2v.sampling.solvers import euler, renoise
from swifti2v.segments import FrameKind, max_window, plan_segments

SHAPE = (1, 2, 1, 3, 4)
SIGMAS = (*FEW_STEP_SIGMAS, 0.0)


def make_reference(num_latent_frames: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator) for _ in range(num_latent_frames)]


def mix(context: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Predict from every frame of the window: full attention in small."""
    everything = torch.cat([context, x], dim=2)
    return torch.tanh(x + everything.mean(dim=2, keepdim=True) * (1 + sigma)) + 0.1 * x.cumsum(dim=2)


def denoise(window: Window, x: torch.Tensor, sigma: float) -> torch.Tensor:
    context = window.reference.clone()
    context[:, :, window.segment.target_slice] = 0
    return mix(context + 0.5 * window.reference, x, sigma)


def generate(reference, plan, **changes) -> torch.Tensor:
    settings = {"denoise": denoise, "sigmas": SIGMAS, "seed": 7} | changes
    return torch.cat([targets for _, targets in sample_segments(iter(reference), plan, **settings)], dim=2)


@pytest.mark.parametrize("sigmas", [SIGMAS, shifted_sigmas(5, shift=5.0, start=0.6)])
def test_one_segment_that_covers_the_clip_equals_full_sequence_sampling(sigmas):
    reference = make_reference(8)
    z_ref = torch.cat(reference, dim=2)
    noise = torch.cat([frame_noise(7, j, SHAPE) for j in range(1, 8)], dim=2)
    slots = z_ref.clone()
    slots[:, :, 1:] = 0
    start = (1 - sigmas[0]) * z_ref[:, :, 1:] + sigmas[0] * noise

    whole = euler(lambda x, sigma: mix(slots + 0.5 * z_ref, x, sigma), start, sigmas)
    segmented = generate(reference, plan_segments(8, segment_size=7), sigmas=sigmas)
    if sigmas[0] == 1.0:
        assert torch.equal(segmented, whole)
    else:
        torch.testing.assert_close(segmented, whole, atol=1e-6, rtol=0)


def test_without_neighbors_or_mixing_the_cut_does_not_matter():
    reference = make_reference(11)
    results = [
        generate(
            reference,
            plan_segments(11, segment_size=size, neighbors_before=0),
            denoise=lambda window, x, sigma: torch.tanh(x + window.reference[:, :, window.segment.target_slice]),
        )
        for size in (1, 3, 4, 10)
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("anchor", [True, False])
def test_windows_hold_finished_neighbors_before_and_the_reference_after(anchor):
    reference = make_reference(9)
    plan = plan_segments(9, segment_size=2, neighbors_before=2, neighbors_after=2, anchor=anchor)
    windows: dict[int, Window] = {}

    def watch(window, x, sigma):
        windows[window.segment.index] = window
        return denoise(window, x, sigma)

    done = {0: reference[0]}
    for segment, targets in sample_segments(reference, plan, denoise=watch, sigmas=SIGMAS, seed=7):
        window = windows[segment.index]
        for place, (index, kind) in enumerate(zip(segment.window, segment.kinds, strict=True)):
            z_ref = window.reference[:, :, place : place + 1]
            is_done = kind in (FrameKind.ANCHOR, FrameKind.FINISHED)
            assert torch.equal(z_ref, done[index] if is_done else reference[index])
        done |= {j: targets[:, :, i : i + 1].clone() for i, j in enumerate(segment.targets)}
        targets.zero_()  # the caller may do what it likes with its piece
    assert sorted(done) == list(range(9))


def test_the_start_is_the_reference_noised_to_the_first_sigma():
    reference = make_reference(4)
    starts = []

    def watch(window, x, sigma):
        starts.append((x, sigma))
        return x

    generate(reference, plan_segments(4), denoise=watch, sigmas=(0.4, 0.0))
    ((x, sigma),) = starts
    noise = torch.cat([frame_noise(7, j, SHAPE) for j in (1, 2, 3)], dim=2)
    assert sigma == 0.4
    torch.testing.assert_close(x, 0.6 * torch.cat(reference[1:], dim=2) + 0.4 * noise)


def test_segments_that_see_no_other_can_be_made_in_any_order():
    """Without anchor and neighbors, changing one frame of the reference changes its own segment only."""
    plan = plan_segments(10, segment_size=3, neighbors_before=0, anchor=False)
    reference = make_reference(10)
    before = generate(reference, plan)
    for changed in (0, 5):
        other = list(reference)
        other[changed] = other[changed] + 1
        after = generate(other, plan)
        same = [torch.equal(before[:, :, j - 1], after[:, :, j - 1]) for j in range(1, 10)]
        own = next((segment.targets for segment in plan if changed in segment.targets), range(0))
        assert same == [j not in own for j in range(1, 10)]


@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize(("size", "before", "after"), [(3, 1, 0), (2, 1, 1), (1, 0, 3), (5, 3, 2)])
def test_only_the_window_of_the_reference_is_alive(size, before, after, anchor):
    alive: list[weakref.ref[torch.Tensor]] = []
    peaks = []

    def source():
        for j in range(60):
            frame = torch.full(SHAPE, float(j))
            alive.append(weakref.ref(frame))
            yield frame
            del frame

    def watch(window, x, sigma):
        peaks.append(sum(ref() is not None for ref in alive))
        return x

    plan = plan_segments(60, segment_size=size, neighbors_before=before, neighbors_after=after, anchor=anchor)
    for _ in sample_segments(source(), plan, denoise=watch, sigmas=(1.0, 0.0), seed=0):
        pass
    assert max(peaks) <= max_window(size, before, after, anchor=anchor) + 1
    assert len(peaks) == len(plan)


class Counted(torch.Tensor):
    """A tensor that, with all that is computed from it, can be counted while it is alive."""

    made: ClassVar[list[weakref.ref[torch.Tensor]]] = []  # a WeakSet would compare tensors with ==

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, cls):
            cls.made.append(weakref.ref(result))
        return result

    @classmethod
    def live_bytes(cls) -> int:
        with torch._C.DisableTorchFunctionSubclass():
            storages = [tensor.untyped_storage() for ref in cls.made if (tensor := ref()) is not None]
            return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("anchor", [True, False])
def test_memory_does_not_grow_with_the_length(anchor):
    frame_bytes = torch.zeros(SHAPE).nbytes

    def peak(num_latent_frames: int) -> float:
        peaks = []

        def watch(window, x, sigma):
            peaks.append(Counted.live_bytes() / frame_bytes)
            return x + 1

        source = ((torch.zeros(SHAPE) + j).as_subclass(Counted) for j in range(num_latent_frames))
        plan = plan_segments(num_latent_frames, segment_size=3, neighbors_before=1, anchor=anchor)
        for _ in sample_segments(source, plan, denoise=watch, sigmas=SIGMAS, seed=0):
            pass
        return max(peaks)

    short, long = peak(13), peak(61)
    assert short > 0
    assert long == short
    # the frames held, a window of them; the piece yielded last, the noisy targets, their next state
    assert long <= 2 * max_window(3, 1, 0, anchor=anchor) + 3 * 3


def test_the_reference_is_read_no_further_than_the_window():
    read = []

    def source():
        for j, frame in enumerate(make_reference(13)):
            read.append(j)
            yield frame

    plan = plan_segments(13, segment_size=3, neighbors_after=1)
    for segment, _ in sample_segments(source(), plan, denoise=denoise, sigmas=SIGMAS, seed=0):
        assert read[-1] == segment.window[-1]


@pytest.mark.parametrize("num_finished", [0, 1, 2, 4])
@pytest.mark.parametrize(("solver", "anchor"), [(euler, True), (renoise, True), (euler, False)])
def test_a_resumed_run_ends_in_the_same_bytes(num_finished, solver, anchor):
    reference = make_reference(12)
    plan = plan_segments(12, segment_size=3, neighbors_before=2, neighbors_after=1, anchor=anchor)
    settings = {"denoise": denoise, "sigmas": SIGMAS, "seed": 7, "solver": solver}
    stored = {segment.index: targets for segment, targets in sample_segments(reference, plan, **settings)}
    made = []

    def finished(segment):
        return stored[segment.index] if segment.index < num_finished else None

    def watch(window, x, sigma):
        made.append(window.segment.index)
        return denoise(window, x, sigma)

    resumed = sample_segments(reference, plan, **(settings | {"denoise": watch}), finished=finished)
    for segment, targets in resumed:
        assert torch.equal(targets, stored[segment.index])
    assert sorted(set(made)) == list(range(num_finished, len(plan)))


def test_noise_depends_on_seed_frame_and_step_only():
    base = frame_noise(3, 5, SHAPE)
    assert torch.equal(base, frame_noise(3, 5, SHAPE))
    for other in (frame_noise(4, 5, SHAPE), frame_noise(3, 6, SHAPE), frame_noise(3, 5, SHAPE, step=1)):
        assert not torch.equal(base, other)
    # (1, 23) and (12, 3) must not meet, as they would if the numbers were only written one after the other
    assert derived_seed(1, 23) != derived_seed(12, 3)
    # torch's CPU generator reads 32 bits only, so these must differ in them
    low_bits = {derived_seed(seed, frame) & 0xFFFFFFFF for seed in range(50) for frame in range(50)}
    assert len(low_bits) == 2500


def test_noise_is_unit_gaussian_and_uncorrelated_between_frames():
    noise = torch.stack([frame_noise(0, j, (1, 4, 1, 32, 32)).flatten() for j in range(8)])
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.06  # 4 / sqrt(4096)


def test_the_noise_a_segment_starts_from_does_not_depend_on_the_segment_size():
    reference = make_reference(13)

    def starts(size):
        seen = {}

        def watch(window, x, sigma):
            if sigma == SIGMAS[0]:
                seen.update({j: x[:, :, i] for i, j in enumerate(window.segment.targets)})
            return x

        generate(reference, plan_segments(13, segment_size=size), denoise=watch)
        return seen

    one, three = starts(1), starts(3)
    assert sorted(one) == sorted(three) == list(range(1, 13))
    assert all(torch.equal(one[j], three[j]) for j in one)


def test_steps_are_reported_and_an_exception_stops_at_once():
    plan = plan_segments(9, segment_size=3)
    steps, calls = [], []

    def on_step(segment, step, num_steps):
        steps.append((segment.index, step, num_steps))
        if segment.index == 1 and step == 2:
            raise GenerationCancelled

    def watch(window, x, sigma):
        calls.append(window.segment.index)
        return x

    run = sample_segments(make_reference(9), plan, denoise=watch, sigmas=SIGMAS, seed=0, on_step=on_step)
    first, _ = next(run)
    with pytest.raises(GenerationCancelled):
        next(run)
    assert steps == [(0, 0, 4), (0, 1, 4), (0, 2, 4), (0, 3, 4), (1, 0, 4), (1, 1, 4), (1, 2, 4)]
    assert calls == [0] * 4 + [1] * 3
    assert first.index == 0


def test_gradients_are_off_inside_and_as_before_outside():
    weight = torch.ones((), requires_grad=True)
    for _, targets in sample_segments(
        make_reference(7), plan_segments(7), denoise=lambda w, x, s: x * weight, sigmas=SIGMAS, seed=0
    ):
        assert not targets.requires_grad
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("length", [0, 1, 5, 6])
def test_a_reference_that_is_too_short_is_an_error(length):
    with pytest.raises(InvalidInputError, match=f"ended after {length} latent frames but the plan has 7"):
        generate(make_reference(length), plan_segments(7))


def test_a_reference_that_is_too_long_is_an_error():
    with pytest.raises(InvalidInputError, match="more than the 7 latent frames"):
        generate(make_reference(8), plan_segments(7))


def test_an_image_needs_no_segment_and_reads_nothing():
    def source():
        pytest.fail("read")
        yield

    assert list(sample_segments(source(), plan_segments(1), denoise=denoise, sigmas=SIGMAS, seed=0)) == []


def test_bad_sigmas_are_an_error_at_the_call():
    with pytest.raises(InvalidInputError, match=r"append 0\.0"):
        sample_segments([], (), denoise=denoise, sigmas=FEW_STEP_SIGMAS, seed=0)


@pytest.mark.parametrize("bad", [torch.zeros(1, 2, 2, 3, 4), torch.zeros(1, 2, 1, 3, 5), torch.zeros(2, 1, 3, 4)])
def test_a_frame_of_another_shape_is_an_error(bad):
    reference = make_reference(4)
    reference[2] = bad
    with pytest.raises(InvalidInputError, match="latent frame 2 of the reference"):
        generate(reference, plan_segments(4))


def test_a_stored_result_of_another_shape_is_an_error():
    with pytest.raises(InvalidInputError, match="stored result of segment 0"):
        generate(make_reference(4), plan_segments(4), finished=lambda segment: torch.zeros(1, 2, 2, 3, 4))
