"""Placed networks give the numbers of resident ones, and are where the placement says they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from swifti2v.memory.placement import Pace, PlacedNetworks

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusers import WanTransformer3DModel
    from transformers import UMT5EncoderModel

    from swifti2v.memory.ways import Placement

CPU = torch.device("cpu")


def wan_output(network: WanTransformer3DModel) -> torch.Tensor:
    torch.manual_seed(1)
    latents, text = torch.randn(1, 48, 2, 4, 6), torch.randn(1, 5, 32)
    with torch.no_grad():
        (sample,) = network(latents, torch.tensor([3.0]), text, return_dict=False)
    return sample


@pytest.mark.parametrize("placement", ["resident", "loaded", "streamed"])
def test_the_output_is_that_of_the_resident_network_and_again_after_release(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], placement: Placement
) -> None:
    network = tiny_wan_dit(num_layers=3)
    expected = wan_output(network)
    networks = PlacedNetworks(CPU)
    networks.place(network, placement, group="one")
    assert torch.equal(wan_output(network), expected)
    networks.send_away()
    assert torch.equal(wan_output(network), expected)
    networks.release()
    assert torch.equal(wan_output(network), expected)
    assert not any(hasattr(module, "_hf_hook") for module in network.modules())
    hooks = [module._diffusers_hook.hooks for module in network.modules() if hasattr(module, "_diffusers_hook")]
    assert not any(hooks)


def test_streamed_blocks_pass_through_the_device_one_by_one(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.hooks.group_offloading import ModuleGroup

    network = tiny_wan_dit(num_layers=3)
    held: list[int] = []
    on_device: set[int] = set()
    come, go = ModuleGroup.onload_, ModuleGroup.offload_

    def onload(group: ModuleGroup) -> None:
        on_device.add(id(group))
        held.append(len(on_device))
        come(group)

    def offload(group: ModuleGroup) -> None:
        on_device.discard(id(group))
        go(group)

    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    networks = PlacedNetworks(CPU)
    networks.place(network, "streamed", group="one")
    wan_output(network)
    assert len(held) > 3  # each block, and what is around the blocks
    assert max(held) <= 2


def test_the_host_waits_for_the_block_before_the_last(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device has still to read stays there: unless the host waits, that may be every block."""
    calls: list[tuple[str, int]] = []

    class Event:
        """Stands for a CUDA event, and says what is done with it."""

        def __init__(self) -> None:
            self.number = sum(name == "end" for name, _ in calls)

        def record(self, stream: str) -> None:
            calls.append((stream, self.number))

        def synchronize(self) -> None:
            calls.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "end" if device == second else "elsewhere")
    second = torch.device("cuda:1")
    network = tiny_wan_dit(num_layers=3)
    handles = Pace(second).keep(network)
    for _ in range(2):
        wan_output(network)
    assert calls[:2] == [("end", 0), ("end", 1)]
    assert calls[2:] == [call for block in range(2, 6) for call in (("wait", block - 2), ("end", block))]
    for handle in handles:
        handle.remove()
    wan_output(network)
    assert len(calls) == 10


def test_a_text_encoder_streams_by_layer(tiny_text_encoder: UMT5EncoderModel) -> None:
    ids = torch.arange(9).view(1, -1)
    with torch.no_grad():
        expected = tiny_text_encoder(ids).last_hidden_state
        networks = PlacedNetworks(CPU)
        networks.place(tiny_text_encoder, "streamed", group="text", by_leaf=True)
        assert torch.equal(tiny_text_encoder(ids).last_hidden_state, expected)
        networks.release()
        assert torch.equal(tiny_text_encoder(ids).last_hidden_state, expected)


def test_loaded_networks_take_turns_by_group(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = PlacedNetworks(torch.device("meta"))  # a device that is not the host
    placed = {name: tiny_wan_dit(num_layers=1) for name in ("first", "second", "beside second")}
    for name, network in placed.items():
        networks.place(network, "loaded", group=name.removeprefix("beside "))
        # What has been on a meta device has lost its numbers, and comes back empty.
        monkeypatch.setattr(network, "to", lambda device, of=network: of.to_empty(device=device))

    def call(name: str) -> set[str]:
        network = placed[name]
        network._hf_hook.pre_forward(network)
        return {name for name, network in placed.items() if next(network.parameters()).is_meta}

    assert call("first") == {"first"}
    assert call("second") == {"second"}
    assert call("beside second") == {"second", "beside second"}
    assert call("first") == {"first"}


def test_a_network_that_has_come_in_part_leaves_too(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full device: a module moves its own parameters, the first in its list, after those of its parts."""
    network = tiny_wan_dit(num_layers=2)
    networks = PlacedNetworks(torch.device("meta"))
    networks.place(network, "loaded", group="one")
    moved: list[torch.Size] = []

    def arrives(tensor: torch.Tensor) -> torch.Tensor:
        if len(moved) == 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        moved.append(tensor.shape)
        return tensor.to("meta")

    monkeypatch.setattr(network, "to", lambda _device: network._apply(arrives))
    with pytest.raises(torch.OutOfMemoryError):
        network._hf_hook.pre_forward(network)
    assert any(parameter.is_meta for parameter in network.parameters())
    monkeypatch.setattr(network, "to", lambda device: network.to_empty(device=device))
    networks.release()
    assert not any(parameter.is_meta for parameter in network.parameters())


def test_what_pytorch_has_reserved_is_given_back_when_the_networks_have_left(
    tiny_wan_dit: Callable[..., WanTransformer3DModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries and the driver, whose memory is their own, would find none of it in a run that follows."""
    network = tiny_wan_dit(num_layers=1)
    networks = PlacedNetworks(torch.device("cuda"))
    networks.place(network, "loaded", group="one")
    hooked: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: hooked.append(hasattr(network, "_hf_hook")))
    networks.release()
    assert hooked == [False]


def test_inputs_come_along_on_every_call(tiny_wan_dit: Callable[..., WanTransformer3DModel]) -> None:
    network = tiny_wan_dit(num_layers=1)
    networks = PlacedNetworks(torch.device("meta"))
    networks.place(network, "loaded", group="one")
    for _ in range(2):
        (given,), named = network._hf_hook.pre_forward(network, torch.ones(2), text=torch.ones(3))
        assert given.is_meta
        assert named["text"].is_meta
