"""Networks read tensor by tensor, each into the form in which it is stored: the whole is never there as it was saved.

diffusers and transformers load a network in the dtype of the work first. A file of another dtype, or LoRAs that go
into the weights, make that a copy in memory: of Wan2.2's Stage I 64 GiB, which a host that needs four bits has not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from swifti2v.errors import CheckpointError
from swifti2v.wan.adapters import AdapterWeights, fused_weight
from swifti2v.wan.checkpoint_files import (
    as_checkpoint_error,
    check_weights_loaded,
    stored_names,
    weight_files,
)
from swifti2v.wan.stage_one_weights import EXPERT_OF, network_classes, planned_adapters

if TYPE_CHECKING:
    from pathlib import Path

    from swifti2v.wan.checkpoints import ResolvedCheckpoint

LOGGER = logging.getLogger(__name__)
LARGE_NETWORKS = ("text_encoder", *EXPERT_OF)
"""Of Stage I's pipeline; its codec is a quarter of a GiB."""


@runtime_checkable
class TakesWeight(Protocol):
    """A layer that holds its weight in a form of its own, and makes that of the weight that it is given."""

    def take_weight(self, weight: Tensor, *, device: torch.device) -> None:
        """Hold `weight` ``[out, in]`` from now on, where it is; `device` is where work is done fastest."""


@dataclass(frozen=True)
class PiecewiseReader:
    """How networks are read.

    Args:
        store: arranges a network on the meta device for the form in which its weights are to be stored: it changes the
            dtype of parameters, or puts layers that take their weight (`TakesWeight`) in the place of others.
        device: where such layers work on a weight; weights stay on the host.
    """

    store: Callable[[nn.Module], object]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def read(self, network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
        """Read one network; its weights are rounded to `dtype`, that of the work, and then stored.

        Raises:
            CheckpointError: missing or damaged files, or weights that do not belong.
        """
        network = self.build(network_class, folder, dtype)
        self.fill(network, folder)
        return network

    def build(self, network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
        """Return a network on the meta device, with the dtypes that it would have been loaded in."""
        with as_checkpoint_error(folder), init_empty_weights(include_buffers=False):
            if issubclass(network_class, ModelMixin):
                network = network_class.from_config(network_class.load_config(str(folder), local_files_only=True))
                keeps = dtype != torch.float32
            else:
                network = network_class(network_class.config_class.from_pretrained(str(folder), local_files_only=True))
                keeps = dtype == torch.float16
        exact = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if keeps else set()
        for name, parameter in network.named_parameters():
            kept = bool(exact & set(name.split(".")))
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)
        return network.eval()

    def fill(self, network: nn.Module, folder: Path, adapters: Sequence[tuple[AdapterWeights, float]] = ()) -> None:
        """Read the weights of a network that `build` returned, the adapters (and their strengths) fused into them."""
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
        real = {name for name, tensor in network.state_dict().items() if not tensor.is_meta}
        found = stored_names(folder)
        self.store(network)
        with as_checkpoint_error(folder):
            for name, weight in _saved_weights(folder):
                if name not in expected:
                    continue  # named by the check below
                shape, dtype = expected[name]
                if weight.shape != shape:
                    msg = f"{name} in {folder} is {list(weight.shape)} and not {list(shape)}; get the folder again"
                    raise CheckpointError(msg)
                changed = weight.to(dtype)
                for adapter, strength in adapters:
                    changed = fused_weight(changed, name, adapter, strength=strength)
                _put(network, name, changed, device=self.device)
        _tie(network)
        added = network.state_dict().keys() - expected.keys()
        check_weights_loaded(network, found | added, folder, optional=real)


def read_stage_one_networks(
    resolved: ResolvedCheckpoint,
    reader: PiecewiseReader,
    *,
    dtype: torch.dtype,
    roles: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read text encoder and experts of Stage I with the adapters of `roles` (None: all) in them.

    Returns:
        What `load_stage_one_pipeline` takes as `networks`; networks of classes that are neither diffusers' nor
        transformers' are left to it.

    Raises:
        CheckpointError: missing or damaged files, weights that do not belong.
        AdapterError: an adapter that does not match; nothing has been read then.
    """
    folder = resolved.folder_of("stage_one")
    networks = {
        name: reader.build(network_class, folder / name, dtype)
        for name, network_class in network_classes(folder).items()
        if name in LARGE_NETWORKS and issubclass(network_class, (ModelMixin, PreTrainedModel))
    }
    planned = planned_adapters(
        {EXPERT_OF[name]: networks[name] for name in networks if name in EXPERT_OF}, resolved, roles
    )
    for name, network in networks.items():
        expert = EXPERT_OF.get(name)
        own = [(each, each.changes[expert]) for each in planned if expert is not None and expert in each.changes]
        reader.fill(network, folder / name, [(adapter, each.strength) for each, adapter in own])
        for each, adapter in own:
            for note in adapter.notes:
                LOGGER.info("%s, %s-noise expert: %s", each.file, expert, note)
    return networks


def _saved_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118 - not a mapping
                yield name, reader.get_tensor(name)


def _put(network: nn.Module, name: str, weight: Tensor, *, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = network.get_submodule(owner_name)
    if leaf == "weight" and isinstance(owner, TakesWeight):
        owner.take_weight(weight, device=device)
        return
    held = getattr(owner, leaf)
    stored = weight.to(held.dtype)
    if isinstance(held, nn.Parameter):
        stored = nn.Parameter(stored, requires_grad=held.requires_grad)
    setattr(owner, leaf, stored)


def _tie(network: nn.Module) -> None:
    """Let weights that are one be one: transformers saves UMT5's table of words under either of its names."""
    if not isinstance(network, PreTrainedModel):
        return
    tied = network._tied_weights_keys
    for name, source in (tied if isinstance(tied, dict) else {}).items():
        if network.get_parameter(source).is_meta:
            owner, _, leaf = source.rpartition(".")
            setattr(network.get_submodule(owner), leaf, network.get_parameter(name))
    network.tie_weights()
