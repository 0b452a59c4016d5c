"""The choice among implementations of attention: what is named is used, what is missing is refused."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from swifti2v.errors import InvalidInputError
from swifti2v.wan import attention_choice
from swifti2v.wan.attention_choice import BACKENDS, EXACT, check_attention_name, fastest, set_attention

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def used_by(network: Any) -> set[str | None]:
    return {block.attn1.processor._attention_backend for block in network.blocks}


def test_names() -> None:
    for name in ("auto", *BACKENDS):
        check_attention_name(name)
    assert set(EXACT) < set(BACKENDS)
    with pytest.raises(InvalidInputError):
        check_attention_name("Flash")
    assert set_attention([], "auto", device=CPU) == "native"  # without a GPU


@pytest.mark.parametrize("name", ["flash", "flash3", "sage", "xformers"])
def test_a_package_that_is_missing_is_named_with_a_way_out(tiny_wan_dit: Callable[..., Any], name: str) -> None:
    """None of these packages can be had on a machine without a GPU."""
    network = tiny_wan_dit()
    with pytest.raises(InvalidInputError, match=f"attention '{name}' cannot be used on cpu .*or use auto, native"):
        set_attention([network], name, device=CPU)
    assert used_by(network) == {None}


def test_one_network_is_set_and_the_process_is_left_as_it_was(
    tiny_wan_dit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "math", "_native_math")  # another one that a CPU has
    network, other = tiny_wan_dit(), tiny_wan_dit()
    latents, text = torch.randn(1, 48, 2, 4, 6), torch.randn(1, 5, 32)

    def output(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of(latents, torch.tensor([3.0]), text, return_dict=False)[0]

    expected = output(network)
    before, _ = _AttentionBackendRegistry.get_active_backend()
    assert set_attention([network], "math", device=CPU) == "math"
    assert used_by(network) == {"_native_math"}
    assert used_by(other) == {None}
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    torch.testing.assert_close(output(network), expected)
    assert torch.equal(output(other), expected)


def test_a_trial_that_fails_says_so_once(
    tiny_wan_dit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PyTorch warns of each kernel that it has not, and of each that was not to be had."""

    def refuse(*_arguments: Any, **_options: Any) -> None:
        warnings.warn("cuDNN attention kernel not used because:", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(attention_choice, "dispatch_attention_fn", refuse)
    with pytest.raises(InvalidInputError, match=r"'cudnn' cannot be used on cpu \(No available kernel"):
        set_attention([tiny_wan_dit()], "cudnn", device=CPU)
    assert not recwarn.list


def test_the_fastest_of_those_that_run_is_taken() -> None:
    seconds = {"native": 3.0, "cudnn": 2.0, "flash3": 1.0}

    def measure(name: str) -> float:
        if name == "flash3":
            raise InvalidInputError("not installed")
        return seconds[name]

    assert fastest(measure, list(seconds)) == "cudnn"
    assert fastest(measure, ["flash3"]) == "native"
