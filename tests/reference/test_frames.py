from __future__ import annotations

import pytest
import torch

from swifti2v.errors import InvalidInputError, VideoInputError
from swifti2v.reference.frames import check_image, in_chunks, single_frames


def numbered(count: int) -> list[torch.Tensor]:
    return [torch.full((1, 2, 2), float(index)) for index in range(count)]


def test_chunks_are_those_of_the_latent_frames_and_keep_every_frame_in_order() -> None:
    chunks = list(in_chunks(numbered(13), 4))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]
    assert torch.cat(chunks, dim=2)[0, 0, :, 0, 0].tolist() == list(range(13))


def test_chunks_are_lazy() -> None:
    taken = []

    def frames():
        for frame in numbered(9):
            taken.append(frame)
            yield frame

    chunks = in_chunks(frames(), 4)
    next(chunks)
    assert len(taken) == 1
    next(chunks)
    assert len(taken) == 5


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_number_of_frames_that_does_not_divide_names_those_that_do(count: int) -> None:
    with pytest.raises(VideoInputError, match=r"4k\+1"):
        list(in_chunks(numbered(count), 4))


def test_pieces_of_any_length_become_the_same_frames() -> None:
    video = torch.randint(0, 256, (9, 4, 6, 3), dtype=torch.uint8)
    for lengths in ([9], [1, 8], [2, 3, 4], [1] * 9, [4, 0, 5]):
        frames = list(single_frames(video.split(lengths)))
        assert torch.equal(torch.stack(frames), video)


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [torch.zeros(0, 4, 4, 3, dtype=torch.uint8)][:0],
        [torch.zeros(1, 4, 4, 3)],
        [torch.zeros(1, 3, 4, 4, dtype=torch.uint8)],
        [torch.zeros(4, 4, 3, dtype=torch.uint8)],
        [torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, 4, 8, 3, dtype=torch.uint8)],
    ],
)
def test_motion_of_another_kind_is_refused(pieces: list[torch.Tensor]) -> None:
    with pytest.raises(VideoInputError):
        list(single_frames(pieces))


@pytest.mark.parametrize(
    "image", [torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)]
)
def test_images_of_another_kind_are_refused(image: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"\[3, H, W\]"):
        check_image(image)
