"""What the tests of weights and products in few bits share: the kinds of products, an output, and its error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from torch import Tensor

    from swifti2v.wan.quantized_products import Quantization

CPU = torch.device("cpu")
KINDS: tuple[Quantization, ...] = ("float8", "int8")
each_kind = pytest.mark.parametrize("kind", KINDS)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def wan_output(network: Any) -> Tensor:
    """Return what diffusers' own transformer of 48 channels makes of four latent frames."""
    torch.manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(1, 48, 4, 4, 6), torch.tensor([500.0]), torch.randn(1, 5, 32)).sample
