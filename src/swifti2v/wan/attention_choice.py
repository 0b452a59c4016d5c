"""Which implementation of attention a network uses, among those that diffusers knows and this machine has."""

from __future__ import annotations

import warnings
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend, dispatch_attention_fn

from swifti2v.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import nn

BACKENDS = {
    "native": "native",
    "cudnn": "_native_cudnn",
    "flash": "flash",
    "flash3": "_flash_3",
    "sage": "sage",
    "xformers": "xformers",
}
"""Our names for diffusers' (``AttentionBackendName``)."""
EXACT = ("native", "cudnn", "flash", "flash3")
"""Those that `auto` tries: their results differ by rounding only. `sage` rounds queries and keys to 8 bits, so it must
be named."""
TRIAL_TOKENS = 8192
TRIAL_RUNS = 3


def check_attention_name(name: str) -> None:
    """Raise `InvalidInputError` unless `name` is `auto` or one of `BACKENDS`."""
    if name != "auto" and name not in BACKENDS:
        msg = f"attention {name!r} is not known; use auto, {', '.join(BACKENDS)}"
        raise InvalidInputError(msg, param="attention", value=name)


def set_attention(networks: Iterable[Any], name: str, *, device: torch.device) -> str:
    """Let diffusers networks, as they were loaded, use an implementation of attention, and return its name.

    Args:
        networks: models of diffusers with attention processors.
        name: of `BACKENDS`; `auto` measures the exact ones that are installed, on a CUDA device, and is `native`
            elsewhere.
        device: where the networks work.

    Raises:
        InvalidInputError: the name is unknown, or what it needs is not installed or does not run on `device`.
    """
    check_attention_name(name)
    chosen = list(networks)
    if name == "auto":
        name = _fastest(chosen, device) if device.type == "cuda" else "native"
    else:
        _try(name, device, heads=1, width=64, tokens=64)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        for network in chosen if name != "native" or active != "native" else ():
            network.set_attention_backend(BACKENDS[name])
    finally:
        # diffusers makes the choice the default of every other network in the process as well.
        _AttentionBackendRegistry.set_active_backend(active)
    return name


def fastest(seconds_of: Callable[[str], float], names: Sequence[str]) -> str:
    """Return the name whose run takes the least; those that raise `InvalidInputError` are left out."""
    found: dict[str, float] = {}
    for name in names:
        try:
            found[name] = seconds_of(name)
        except InvalidInputError:
            continue
    return min(found, key=lambda name: found[name], default="native")


def _fastest(networks: Sequence[nn.Module], device: torch.device) -> str:
    config: Any = networks[0].config
    heads, width = config.num_attention_heads, config.attention_head_dim
    return fastest(lambda name: _try(name, device, heads=heads, width=width, tokens=TRIAL_TOKENS), EXACT)


def _try(name: str, device: torch.device, *, heads: int, width: int, tokens: int) -> float:
    """Return the seconds of one attention; raise `InvalidInputError` if it cannot be had here."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.randn(1, tokens, heads, width, device=device, dtype=dtype)
    best = float("inf")
    try:
        with attention_backend(BACKENDS[name]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns several times before the error
            for _ in range(TRIAL_RUNS):
                started = perf_counter()
                dispatch_attention_fn(query, query, query)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best = min(best, perf_counter() - started)
    except (RuntimeError, ValueError, ImportError, TypeError, NotImplementedError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        others = ", ".join(other for other in ("auto", "native") if other != name)
        msg = f"attention {name!r} cannot be used on {device} ({reason}); install what it needs, or use {others}"
        raise InvalidInputError(msg, param="attention", value=name) from error
    return best
