"""The arithmetic of the fidelity table on clips made here."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from benchmarks.fidelity import VARIANTS, KnownClip, crop_row, known_clip, means, scores, table, variant_frames
from swifti2v.evaluation.metrics import high_frequency_energy
from swifti2v.geometry import Size
from swifti2v.mini.transform_codec import BlockTransformCodec
from swifti2v.settings import GenerationSettings

SIZE = Size(192, 192)


def settings(reference: str) -> GenerationSettings:
    return GenerationSettings(size=SIZE, num_frames=5, fps=16, refiner="concat", reference=reference)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """Five frames of a texture that slides by two pixels a frame."""
    rng = np.random.default_rng(1)
    texture = cv2.GaussianBlur(rng.uniform(0, 255, (SIZE.height, SIZE.width + 16, 3)), (0, 0), 1.0)
    texture = ((texture - texture.min()) / np.ptp(texture) * 255).astype(np.uint8)
    return np.stack([texture[:, 2 * t : 2 * t + SIZE.width] for t in range(5)])


def numbers(psnr: float, ratio: float = 0.9, there: float = 30.0, first: float = 40.0) -> dict[str, float]:
    return {"psnr": psnr, "high_frequency_ratio": ratio, "psnr_unexplained": there, "psnr_first_frame": first}


def results(**changes: dict[str, float]) -> dict[str, dict]:
    clip = {"bicubic": numbers(30), "reference": numbers(36), "codec": numbers(35), "stage_two": numbers(35, there=31)}
    return {"clip": {"unexplained_share": 0.25, **clip, **changes}}


def test_psnr_where_unexplained_pools_the_places_of_all_frames() -> None:
    truth = np.full((4, 8, 8, 3), 100, dtype=np.uint8)
    places = np.zeros((4, 8, 8), dtype=bool)
    places[1:3, :2] = True
    frames = truth.copy()
    frames[1, :2] += np.uint8(10)
    frames[2, :2] += np.uint8(20)
    clip = KnownClip(truth, truth, [], [], places, {})
    found = scores(list(frames), clip, [1.0] * 4)
    assert found["psnr_unexplained"] == pytest.approx(-10 * math.log10((10**2 + 20**2) / 2 / 255**2))
    assert found["psnr_first_frame"] == 100
    nowhere = KnownClip(truth, truth, [], [], np.zeros_like(places), {})
    assert math.isnan(scores(list(frames), nowhere, [1.0] * 4)["psnr_unexplained"])


def test_transport_comes_nearer_to_a_sliding_truth_than_bicubic(truth: np.ndarray) -> None:
    clip = known_clip(truth, settings("transport"))
    parts = SimpleNamespace(stage_two=SimpleNamespace(codec=None))
    energies = [high_frequency_energy(frame) for frame in truth]
    made = {v: list(variant_frames(v, clip, parts, settings("transport"), None)) for v in ("bicubic", "reference")}
    found = {variant: scores(frames, clip, energies) for variant, frames in made.items()}
    assert found["reference"]["psnr"] > found["bicubic"]["psnr"] + 3
    assert found["bicubic"]["high_frequency_ratio"] < found["reference"]["high_frequency_ratio"] < 1.1
    assert found["reference"]["psnr_first_frame"] == 100
    row = crop_row("slide", clip, {"bicubic": made["bicubic"][4], "stage_two": made["reference"][4]}, 4)
    assert row.dtype == np.uint8
    assert row.shape[1] > 4 * 320


def test_replace_is_bicubic_but_for_the_first_frame(truth: np.ndarray) -> None:
    clip = known_clip(truth, settings("replace"))
    assert all(torch.equal(one, other) for one, other in zip(clip.bicubic, clip.reference, strict=True))
    assert clip.unexplained.shape == truth.shape[:3]
    assert not clip.unexplained[0].any()


def test_stage_two_is_given_the_reference_and_its_latents_are_decoded(truth: np.ndarray) -> None:
    """A refiner that hands back what it was given is the coded reference."""
    codec = BlockTransformCodec((192, 192, 192, 192))
    with torch.no_grad():
        for basis in torch.split(codec.transform.basis, 192, dim=1):
            basis.copy_(torch.eye(192))

    def refine(chunks, _settings, *, prompt_embeds):
        assert prompt_embeds is None
        return (SimpleNamespace(latents=latent) for latent in codec.encode_stream(chunks))

    parts = SimpleNamespace(device=torch.device("cpu"), stage_two=SimpleNamespace(codec=codec, refine=refine))
    chosen = settings("transport")
    clip = known_clip(truth, chosen)
    frames = {v: np.stack(list(variant_frames(v, clip, parts, chosen, None))) for v in VARIANTS}
    assert np.array_equal(frames["codec"], frames["stage_two"])
    assert np.abs(frames["codec"].astype(int) - frames["reference"]).max() <= 1


def test_means_and_table() -> None:
    both = results() | {"other": results(stage_two=numbers(37, first=50.0))["clip"]}
    assert means(both)["stage_two"]["psnr"] == pytest.approx(36)
    lines = table(both, "transport").splitlines()
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "36.00 / 0.90" in lines[-1]
