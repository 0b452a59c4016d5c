"""What a caller may choose about the hybrid reference."""

from __future__ import annotations

from dataclasses import dataclass

from swifti2v.errors import InvalidInputError
from swifti2v.settings import GenerationSettings, ReferenceMode


@dataclass(frozen=True)
class ReferenceOptions:
    """How the hybrid reference is made. The defaults were measured on clips with known truth (`docs/log.md`).

    Args:
        mode: `replace`, the paper's: the upsampled motion reference with its first frame replaced by the image;
            `transport`, ours: besides, the image's detail carried along the motion.
        flow_scale: size at which the optical flow is computed, as a fraction of the output size, in (0, 1]. Against
            0.5 at 1280x704, 0.25 takes 0.6 times as long and loses 0.3 dB; 1.0 takes 2.6 times as long, gains 0.2 dB.
        confidence_width: mean absolute difference (in [0, 1] gray) of the warped and the actual reference at which the
            confidence in a place has fallen to 1/e. Forgiving: brightness that drifts is no reason to lose detail.
        mismatch_width: the same for the difference relative to the local contrast: what tells wrong texture from noise.
        band_sigma: in pixels of the motion reference. 0 carries only what is finer than the motion reference's pixels.
            Above 0, its own finest detail (a Gaussian high-pass of this sigma) is taken from the image too, which
            removes noise: 0.5 costs 0.1 dB when the reference is clean and gains 1.2 dB at noise of sigma 0.03;
            1.0 costs 0.5 dB and gains 2.5 dB.
        num_workers: frames worked on at once; 0 means one per CPU core, at most 8.

    Raises:
        InvalidInputError: a number is out of its range, or the mode is unknown.
    """

    mode: ReferenceMode = GenerationSettings.reference
    flow_scale: float = GenerationSettings.flow_scale
    confidence_width: float = 0.09
    mismatch_width: float = 0.7
    band_sigma: float = 0.5
    num_workers: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "mode": (self.mode in ("replace", "transport"), "'replace' or 'transport'"),
            "flow_scale": (0 < self.flow_scale <= 1, "above 0 and at most 1"),
            "confidence_width": (self.confidence_width > 0, "above 0"),
            "mismatch_width": (self.mismatch_width > 0, "above 0"),
            "band_sigma": (self.band_sigma >= 0, "0 or more"),
            "num_workers": (self.num_workers >= 0, "0 or more"),
        }
        for name, (is_valid, words) in ranges.items():
            if not is_valid:
                value = getattr(self, name)
                msg = f"{name} is {value!r}; it must be {words}"
                raise InvalidInputError(msg, param=name, value=value)
