"""A step of Stage II asks nothing of the device and waits for nothing: seen on the meta device, which cannot answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swifti2v.sampling.segmented import sample_segments
from swifti2v.sampling.solvers import renoise
from swifti2v.segments import plan_segments
from swifti2v.wan.condition import predict_targets
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    import pytest
    from torch import Tensor

    from swifti2v.sampling.segmented import Window


class Uploads(TorchDispatchMode):
    """Notes what goes from the host to the device, and whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[tuple[int, ...]] = []
        self.passing: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            device = options.get("device")
            if device is not None and torch.device(device).type == "meta":
                (self.passing if options.get("non_blocking") else self.waited).append(tuple(args[0].shape))
        return func(*args, **options)


def test_no_step_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        network = StageTwoTransformer(
            num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=16, ffn_dim=16, num_layers=1
        ).eval()
        network.frame_kind_table = torch.nn.Parameter(network.frame_kind_table.detach().to("meta"))
        frames = [torch.empty(1, 48, 1, 4, 4) for _ in range(5)]
        text = torch.empty(1, 3, 8)

    def denoise(window: Window, targets: Tensor, sigma: float) -> Tensor:
        return predict_targets(
            network,
            segment=window.segment,
            reference=window.reference,
            targets=targets,
            sigma=sigma,
            prompt_embeds=text,
        )

    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _made_on_the_host(getattr(torch, name)))
    plan = plan_segments(5, segment_size=2, neighbors_before=1)
    with Uploads() as uploads:
        for _ in sample_segments(frames, plan, denoise=denoise, sigmas=(0.5, 0.25, 0.0), seed=0, solver=renoise):
            pass
    assert uploads.waited == []
    assert {(3,), (4,)} <= set(uploads.passing)  # windows of the anchor, a neighbor and two targets


def _made_on_the_host(make: Any) -> Any:
    """Refuse numbers for the device: PyTorch makes them on the host and copies them, out of sight of a mode."""

    def made(data: Any, *arguments: Any, **options: Any) -> Any:
        assert isinstance(data, torch.Tensor) or torch.device(options.get("device") or "cpu").type == "cpu"
        return make(data, *arguments, **options)

    return made
