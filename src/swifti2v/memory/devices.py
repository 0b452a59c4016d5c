"""What a device can do, for predictions. None of these rates was measured by this project."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from swifti2v.memory.budget import Products


@dataclass(frozen=True)
class DeviceRates:
    """Assumed rates of a card with fused kernels.

    Of the makers' dense peaks (NVIDIA's data sheets, and the white papers of GA102 and Ada), in TFLOP/s:

    ======== ======== ====== =====
    card     bfloat16 float8  int8
    ======== ======== ====== =====
    H200          989  1,979 1,979
    H800          989  1,979 1,979
    A100          312      -   624
    RTX 4090      165    330   661
    RTX 3090       71      -   284
    ======== ======== ====== =====

    Args:
        name: as users write it.
        matmul_tflop_per_second: of large bfloat16 products.
        float8_tflop_per_second: of large float8 products; the same share of the maker's peak as bfloat16's. None: the
            card has none.
        int8_tflop_per_second: of large int8 products, likewise.
        attention_tflop_per_second: of fused attention; of the A100 and the RTX 3090 the share of the peak that it is
            of the newer card of their kind, and so for convolutions.
        convolution_tflop_per_second: of 3D convolutions, channels last.
        host_bytes_per_second: from pinned host memory and back.
    """

    name: str
    matmul_tflop_per_second: float
    float8_tflop_per_second: float | None
    int8_tflop_per_second: float
    attention_tflop_per_second: float
    convolution_tflop_per_second: float
    host_bytes_per_second: float

    def products_tflop_per_second(self, products: Products) -> float:
        """Return the rate of the linear layers of a block; raise `InvalidInputError` if the card has no such ones."""
        rate = {
            "none": self.matmul_tflop_per_second,
            "float8": self.float8_tflop_per_second,
            "int8": self.int8_tflop_per_second,
        }[products]
        if rate is None:
            msg = f"{self.name} has no {products} products; use quantization int8 or none"
            raise InvalidInputError(msg)
        return rate


DEVICES = {
    rates.name: rates
    for rates in (
        DeviceRates("h200", 700, 1400, 1400, 550, 650, 50e9),
        DeviceRates("h800", 700, 1400, 1400, 550, 650, 50e9),
        DeviceRates("a100", 220, None, 440, 170, 205, 24e9),
        DeviceRates("rtx4090", 160, 320, 640, 150, 80, 24e9),
        DeviceRates("rtx3090", 69, None, 276, 65, 34, 24e9),
    )
}


def device_rates(name: str) -> DeviceRates:
    """Return the rates of a named card; raise `InvalidInputError` for another name."""
    if name not in DEVICES:
        msg = f"no rates are known for {name!r}; use one of {', '.join(DEVICES)}"
        raise InvalidInputError(msg)
    return DEVICES[name]
