"""`light` as a stream: any motion size, bounded memory, the same frames after a stop, a gain over transport."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.light.refine import FinishedSegment, refine
from swifti2v.light.weights import load_network
from swifti2v.reference.options import ReferenceOptions
from swifti2v.reference.transport import transport_with_confidence

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swifti2v.light.network import LightNetwork

TWO_WORKERS = ReferenceOptions(num_workers=2)


def whole(motion: Any, image: torch.Tensor, network: LightNetwork, **options: Any) -> torch.Tensor:
    """All frames, [3, F, H, W]."""
    chosen = {"options": TWO_WORKERS, "half": False} | options
    return torch.cat(list(refine(motion, image, network, **chosen)), dim=2)[0]


@pytest.fixture(scope="module")
def expected(motion: torch.Tensor, image: torch.Tensor, network: LightNetwork) -> torch.Tensor:
    return whole([motion], image, network)


def psnr(made: torch.Tensor, truth: np.ndarray) -> float:
    goal = torch.from_numpy(truth).permute(3, 0, 1, 2).float() / 127.5 - 1
    return float(10 * torch.log10(4 / (made - goal)[:, 1:, 8:-8, 8:-40].square().mean()))


def test_frame_0_is_the_image_and_levels_are_of_eight_bits(expected: torch.Tensor, image: torch.Tensor) -> None:
    assert expected.shape == (3, 29, 96, 160)
    assert torch.equal(expected[:, 0], image)
    levels = (expected + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.parametrize("workers", [1, 5])
@pytest.mark.parametrize("pieces", [[1] * 29, [3, 17, 9]])
def test_pieces_and_workers_change_nothing(
    motion: torch.Tensor,
    image: torch.Tensor,
    network: LightNetwork,
    expected: torch.Tensor,
    workers: int,
    pieces: list[int],
) -> None:
    made = whole(motion.split(pieces), image, network, options=ReferenceOptions(num_workers=workers))
    assert torch.equal(made, expected)


def test_memory_does_not_grow_with_length(motion: torch.Tensor, image: torch.Tensor, network: LightNetwork) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def frames(count: int) -> Iterator[torch.Tensor]:
        for index in range(count):
            frame = motion[index % 2][None].clone()
            alive.append(weakref.ref(frame))
            yield frame

    most = {}
    for count in (29, 57):
        alive.clear()
        most[count] = 0
        for _chunk in refine(frames(count), image, network, options=TWO_WORKERS, half=False):
            gc.collect()
            most[count] = max(most[count], sum(reference() is not None for reference in alive))
    assert most[57] <= most[29] < 20


@pytest.mark.parametrize("stop", [1, 5, 6, 8])  # chunks read
def test_a_stopped_run_goes_on_to_the_same_frames(
    motion: torch.Tensor, image: torch.Tensor, network: LightNetwork, expected: torch.Tensor, stop: int
) -> None:
    kept: dict[int, FinishedSegment] = {}
    made_again: list[int] = []
    pieces = refine(
        [motion],
        image,
        network,
        options=TWO_WORKERS,
        half=False,
        on_segment=lambda each: kept.update({each.index: each}),
    )
    for _ in range(stop):
        next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    before = dict(kept)
    made = whole([motion], image, network, finished=before.get, on_segment=lambda each: made_again.append(each.index))
    assert torch.equal(made, expected)
    assert made_again == [index for index in range(3) if index not in before]  # 28 frames: 12, 12 and 4


def test_segment_size_is_that_of_the_segments(motion: torch.Tensor, image: torch.Tensor, network: LightNetwork) -> None:
    sizes: list[int] = []
    whole([motion], image, network, segment_size=2, on_segment=lambda each: sizes.append(len(each.frames)))
    assert sizes == [8, 8, 8, 4]


@pytest.mark.parametrize("size", [(80, 48), (50, 30), (40, 24), (32, 19)])
def test_any_motion_size_gains_over_enlarging(truth: np.ndarray, image: torch.Tensor, size: tuple[int, int]) -> None:
    """Reductions of 2, 3.2, 4 and 5, with the weights that ship."""
    small = np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in truth[:13]])
    made = whole([torch.from_numpy(small)], image, load_network(torch.device("cpu")))
    enlarged = np.stack([cv2.resize(frame, (160, 96), interpolation=cv2.INTER_CUBIC) for frame in small])
    plain = torch.from_numpy(enlarged).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert psnr(made, truth[:13]) > psnr(plain, truth[:13]) + 1


def test_it_gains_over_transport(truth: np.ndarray, motion: torch.Tensor, image: torch.Tensor) -> None:
    made = whole([motion], image, load_network(torch.device("cpu")))
    transported = torch.cat([chunk.frames for chunk in transport_with_confidence([motion], image)], dim=2)[0]
    assert psnr(made, truth) > psnr(transported, truth)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (96, 64), (160, 96)])
def test_sizes_are_multiples_of_32(network: LightNetwork, width: int, height: int) -> None:
    generator = torch.Generator().manual_seed(0)
    motion = torch.randint(0, 256, (5, height // 4, width // 4, 3), dtype=torch.uint8, generator=generator)
    made = whole([motion], torch.zeros(3, height, width), network)
    assert made.shape == (3, 5, height, width)
    assert made.isfinite().all()


def test_what_cannot_be_refined_is_refused(motion: torch.Tensor, image: torch.Tensor, network: LightNetwork) -> None:
    with pytest.raises(InvalidInputError):
        refine([motion], image[None], network)
    for bad in ([], [motion.float()], [motion[:4]], [motion[:2], motion[2:5, :20]]):
        with pytest.raises(VideoInputError):
            whole(bad, image, network)
