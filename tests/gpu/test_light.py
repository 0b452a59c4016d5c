"""`light` on a CUDA device: the frames of a CPU, and the size of the paper."""

from __future__ import annotations

import pytest
import torch

from swifti2v.light.refine import refine
from swifti2v.light.weights import load_network
from swifti2v.reference.options import ReferenceOptions

pytestmark = pytest.mark.gpu


def moving(num_frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Motion uint8 [F, h, w, 3] of a pattern that pans, and its first frame at four times the size."""
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand(1, 3, height // 8, width // 8 + num_frames, generator=generator)
    wide = torch.nn.functional.interpolate(rough, scale_factor=8.0, mode="bicubic").clamp(0, 1)[0]
    small = [wide[:, :, 2 * index : 2 * index + width] for index in range(num_frames)]
    image = torch.nn.functional.interpolate(small[0][None], scale_factor=4.0, mode="bicubic")[0].clamp(0, 1)
    return (torch.stack(small) * 255).round().byte().permute(0, 2, 3, 1).contiguous(), image * 2 - 1


@pytest.mark.parametrize("half", [False, True])
def test_the_frames_are_those_of_a_cpu(half: bool) -> None:
    motion, image = moving(9, 64, 112)
    frames = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        made = refine([motion], image.to(device), load_network(device), half=half and device.type == "cuda")
        frames.append(torch.cat([chunk.cpu() for chunk in made], dim=2))
    error = (frames[0] - frames[1]).square().mean()
    assert float(10 * torch.log10(4 / error)) > (40 if half else 50)


def test_workers_and_streams_change_nothing() -> None:
    motion, image = moving(9, 64, 112)
    device = torch.device("cuda", 0)
    network, image = load_network(device), image.to(device)
    expected: torch.Tensor | None = None
    for workers in (1, 4, 4):
        with torch.cuda.stream(torch.cuda.Stream(device)):
            made = refine([motion], image, network, options=ReferenceOptions(num_workers=workers))
            frames = torch.cat([chunk.cpu() for chunk in made], dim=2)
        assert expected is None or torch.equal(frames, expected)
        expected = frames


def test_the_size_of_the_paper_fits_into_8_gib() -> None:
    motion, image = moving(9, 352, 640)
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    for chunk in refine([motion], image.to(device), load_network(device)):
        assert chunk.shape[-2:] == (1408, 2560)
        assert chunk.isfinite().all()
    assert torch.cuda.max_memory_allocated(device) < 8 * 2**30
