"""What a device can do, for predictions. None of these rates was measured by this project."""

from __future__ import annotations

from dataclasses import dataclass

from swifti2v.errors import InvalidInputError


@dataclass(frozen=True)
class DeviceRates:
    """Assumed rates of a card with fused kernels.

    Args:
        name: as users write it.
        matmul_tflop_per_second: of large bfloat16 products.
        float8_tflop_per_second: of large float8 products; the same share of the maker's peak (1,979 and 330 TFLOP/s,
            dense) as bfloat16's.
        attention_tflop_per_second: of fused attention.
        convolution_tflop_per_second: of 3D convolutions, channels last.
        host_bytes_per_second: from pinned host memory and back.
    """

    name: str
    matmul_tflop_per_second: float
    float8_tflop_per_second: float
    attention_tflop_per_second: float
    convolution_tflop_per_second: float
    host_bytes_per_second: float


DEVICES = {
    rates.name: rates
    for rates in (
        DeviceRates("h200", 700, 1400, 550, 650, 50e9),
        DeviceRates("h800", 700, 1400, 550, 650, 50e9),
        DeviceRates("rtx4090", 160, 320, 150, 80, 24e9),
    )
}


def device_rates(name: str) -> DeviceRates:
    """Return the rates of a named card; raise `InvalidInputError` for another name."""
    if name not in DEVICES:
        msg = f"no rates are known for {name!r}; use one of {', '.join(DEVICES)}"
        raise InvalidInputError(msg)
    return DEVICES[name]
