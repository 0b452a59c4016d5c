"""The cards that people have: memory, and assumed rates for predictions. This project has measured none of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from swifti2v.errors import InvalidInputError
from swifti2v.memory.amounts import GIB

if TYPE_CHECKING:
    from swifti2v.memory.costs import Work
    from swifti2v.memory.networks import Quantization

DISK_BYTES_PER_SECOND = 2e9
"""Assumed: what loading a checkpoint reads from an NVMe drive."""


@dataclass(frozen=True)
class DeviceRates:
    """A card.

    Args:
        name: as it is printed.
        sold_gigabytes: the number on the box.
        memory_bytes: what the driver shows, rounded down to whole GiB.
        matmul_tflop_per_second: of large bfloat16 matrix products.
        float8_tflop_per_second: of large float8 products; None: the card has none.
        int8_tflop_per_second: of large int8 products.
        attention_tflop_per_second: of fused attention.
        convolution_tflop_per_second: of 3D convolutions, channels last.
        memory_bytes_per_second: of the card's own memory.
        host_bytes_per_second: from pinned host memory and back.
    """

    name: str
    sold_gigabytes: int
    memory_bytes: int
    matmul_tflop_per_second: float
    float8_tflop_per_second: float | None
    int8_tflop_per_second: float
    attention_tflop_per_second: float
    convolution_tflop_per_second: float
    memory_bytes_per_second: float
    host_bytes_per_second: float

    def seconds(self, work: Work, quantization: Quantization) -> float:
        """Return the predicted time of `work`; raise `InvalidInputError` if the card cannot multiply so."""
        blocks = {
            "none": self.matmul_tflop_per_second,
            "float8": self.float8_tflop_per_second,
            "int8": self.int8_tflop_per_second,
        }[quantization]
        if blocks is None:
            msg = f"{self.name} has no {quantization} products; use quantization int8 or none"
            raise InvalidInputError(msg, param="quantization", value=quantization)
        return (
            work.blocks / blocks
            + work.matmul / self.matmul_tflop_per_second
            + work.attention / self.attention_tflop_per_second
            + work.codec / self.convolution_tflop_per_second
        )


# Dense peaks in TFLOP/s (bfloat16 with float32 sums, float8, int8) and memory bandwidth are the maker's: NVIDIA's data
# sheets for data-center cards, its white papers of GA102, Ada and RTX Blackwell for the others (of smaller chips in
# proportion to their cores and clock). What of a peak is reached is assumed: on data-center cards 700, 550 and 650 of
# an H200's 989 for products, attention and convolutions; on the others 160, 150 and 80 of an RTX 4090's 165. The link
# to the host is assumed to run at 24 GB/s with PCIe 4 and at 50 with PCIe 5.
_DATA_CENTER = (700 / 989, 550 / 989, 650 / 989)
_CONSUMER = (160 / 165, 150 / 165, 80 / 165)
_PCIE_4, _PCIE_5 = 24e9, 50e9


def _card(
    name: str,
    sold_and_shown: tuple[int, int],
    bandwidth_gb: float,
    peaks: tuple[float, float | None, float],
    shares: tuple[float, float, float],
    link: float,
) -> DeviceRates:
    bfloat16, float8, int8 = peaks
    products, attention, convolution = shares
    return DeviceRates(
        name=name,
        sold_gigabytes=sold_and_shown[0],
        memory_bytes=sold_and_shown[1] * GIB,
        matmul_tflop_per_second=products * bfloat16,
        float8_tflop_per_second=None if float8 is None else products * float8,
        int8_tflop_per_second=products * int8,
        attention_tflop_per_second=attention * bfloat16,
        convolution_tflop_per_second=convolution * bfloat16,
        memory_bytes_per_second=bandwidth_gb * 1e9,
        host_bytes_per_second=link,
    )


DEVICES: tuple[DeviceRates, ...] = (
    _card("RTX 3060", (12, 12), 360, (25.5, None, 102), _CONSUMER, _PCIE_4),
    _card("RTX 3080", (10, 10), 760, (59.5, None, 238), _CONSUMER, _PCIE_4),
    _card("RTX 3090", (24, 24), 936, (71, None, 284), _CONSUMER, _PCIE_4),
    _card("RTX 4060 Ti", (16, 16), 288, (44, 88, 176), _CONSUMER, _PCIE_4 / 2),  # eight lanes
    _card("RTX 4070", (12, 12), 504, (58, 117, 233), _CONSUMER, _PCIE_4),
    _card("RTX 4080", (16, 16), 717, (97.5, 195, 390), _CONSUMER, _PCIE_4),
    _card("RTX 4090", (24, 24), 1008, (165, 330, 661), _CONSUMER, _PCIE_4),
    _card("RTX 5070 Ti", (16, 16), 896, (88, 176, 352), _CONSUMER, _PCIE_5),
    _card("RTX 5080", (16, 16), 960, (112.5, 225, 450), _CONSUMER, _PCIE_5),
    _card("RTX 5090", (32, 32), 1792, (209.5, 419, 838), _CONSUMER, _PCIE_5),
    _card("A100 40GB", (40, 40), 1555, (312, None, 624), _DATA_CENTER, _PCIE_4),
    _card("A100 80GB", (80, 79), 2039, (312, None, 624), _DATA_CENTER, _PCIE_4),
    _card("L40S", (48, 45), 864, (362, 733, 733), _DATA_CENTER, _PCIE_4),
    _card("H100", (80, 79), 3350, (989, 1979, 1979), _DATA_CENTER, _PCIE_5),
    _card("H800", (80, 79), 3350, (989, 1979, 1979), _DATA_CENTER, _PCIE_5),
    _card("H200", (141, 140), 4800, (989, 1979, 1979), _DATA_CENTER, _PCIE_5),
    _card("B200", (180, 179), 8000, (2250, 4500, 4500), _DATA_CENTER, _PCIE_5),
)
_IGNORED = re.compile(r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|hbm\d?e?|nvl|[-_ ]")


def device_rates(name: str) -> DeviceRates:
    """Return a card by a name that people type: ``rtx 4090``, ``4090``, ``NVIDIA GeForce RTX 4090``, ``a100 80``.

    Where a card comes in two sizes and the name says neither, it is the smaller one.

    Raises:
        InvalidInputError: no such card is known.
    """
    for rates in DEVICES:
        model = _normal(re.sub(r" \d+GB$", "", rates.name))
        if _normal(name) in {model, f"{model}{rates.sold_gigabytes}"}:
            return rates
    msg = f"no rates are known for {name!r}; use one of {', '.join(rates.name for rates in DEVICES)}"
    raise InvalidInputError(msg, param="gpu", value=name)


def _normal(name: str) -> str:
    return _IGNORED.sub("", name.lower()).removesuffix("gb")
