"""One network from one folder: built without weights, then filled tensor by tensor.

diffusers and transformers load a network in the dtype of the work first. Files of another dtype, LoRAs that are fused,
or weights that are stored in four bits would make that a second copy in memory: 64 GiB for Wan2.2's Stage I. Here each
tensor is read, changed by the LoRAs and stored in its final form before the next one is read; the numbers are those of
the libraries' own loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_files import as_checkpoint_error, stored_names, weight_files
from swifti2v.wan.lora import AdapterWeights, fused_weight
from swifti2v.wan.quantized_linear import QuantizedLinear

if TYPE_CHECKING:
    from pathlib import Path


def described_network(network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Return a network of `dtype` wholly on the meta device, as its configuration in `folder` describes it.

    Raises:
        CheckpointError: the configuration is missing or damaged.
    """
    with as_checkpoint_error(folder), torch.device("meta"):
        # Not diffusers' own `to`, which warns of layers that are to stay in float32: these hold nothing.
        return nn.Module.to(_configured(network_class, folder), dtype).eval()


def _stored_as_read(_network: nn.Module) -> None:
    """Leave the weights in the dtype in which they are read."""


@dataclass(frozen=True)
class NetworkReader:
    """How networks are read.

    Args:
        store: prepares a network on the meta device for the form in which its weights are to be stored
            (`quantized_linear.store_weights`): it changes the dtype of parameters, or replaces layers by
            `QuantizedLinear`.
        device: where weights are quantized; all weights stay on the host.
    """

    store: Callable[[nn.Module], object] = _stored_as_read
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
        """Return a network whose parameters are on the meta device, in the dtypes that its library would load."""
        with as_checkpoint_error(folder), init_empty_weights(include_buffers=False):
            network = _configured(network_class, folder)
        keeps_float32 = dtype != torch.float32 if isinstance(network, ModelMixin) else dtype == torch.float16
        exact = set(getattr(network, "_keep_in_fp32_modules", None) or ()) if keeps_float32 else set()
        for name, parameter in network.named_parameters():
            kept = bool(exact & set(name.split(".")))
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)
        return network.eval()

    def fill(self, network: nn.Module, folder: Path, adapters: Sequence[tuple[AdapterWeights, float]] = ()) -> None:
        """Read the weights of a network that `build` returned, and fuse the adapters, with their strengths, into them.

        Raises:
            CheckpointError: missing or damaged files, or weights that do not belong.
        """
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
        # A table that public checkpoints lack is a parameter with real zeros (`StageTwoTransformer`).
        made = {name for name, parameter in network.named_parameters() if not parameter.is_meta}
        found = stored_names(folder)
        self.store(network)
        with as_checkpoint_error(folder):
            for file in weight_files(folder):
                with safe_open(file, framework="pt") as tensors:
                    for name in filter(expected.__contains__, tensors.keys()):
                        shape, dtype = expected[name]
                        weight = tensors.get_tensor(name)
                        if weight.shape != shape:
                            msg = f"{name} in {folder} is {list(weight.shape)} and not {list(shape)}; get it again"
                            raise CheckpointError(msg)
                        changed = weight.to(dtype)
                        for adapter, strength in adapters:
                            changed = fused_weight(changed, name, adapter, strength=strength)
                        _put(network, name, changed, device=self.device)
        _tie(network)
        added = network.state_dict().keys() - expected.keys()
        _check_filled(network, found | added, folder, optional=made)


def _configured(network_class: Any, folder: Path) -> Any:
    if issubclass(network_class, ConfigMixin):
        return network_class.from_config(network_class.load_config(str(folder), local_files_only=True))
    return network_class(network_class.config_class.from_pretrained(str(folder), local_files_only=True))


def _put(network: nn.Module, name: str, weight: Tensor, *, device: torch.device) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = network.get_submodule(owner_name)
    if leaf == "weight" and isinstance(owner, QuantizedLinear):
        owner.take_weight(weight, device=device)
        return
    held = getattr(owner, leaf)
    stored = weight.to(held.dtype)
    if isinstance(held, nn.Parameter):
        stored = nn.Parameter(stored, requires_grad=held.requires_grad)
    setattr(owner, leaf, stored)


def _tie(network: nn.Module) -> None:
    """Tie shared weights: transformers saves UMT5's token table under either of its names."""
    if not isinstance(network, PreTrainedModel):
        return
    tied = network._tied_weights_keys
    for name, source in (tied if isinstance(tied, dict) else {}).items():
        if network.get_parameter(source).is_meta:
            owner, _, leaf = source.rpartition(".")
            setattr(network.get_submodule(owner), leaf, network.get_parameter(name))
    network.tie_weights()


def _check_filled(network: nn.Module, names: Collection[str], folder: Path, *, optional: Collection[str]) -> None:
    """Raise `CheckpointError` unless every weight came from the files, and every one of their tensors was used.

    Args:
        network: just filled.
        names: `stored_names` of `folder`, and what the storage form adds.
        folder: for the message.
        optional: parameters that may be absent from the files.
    """
    state = network.state_dict()
    # Tied weights are stored under one of their names.
    present = {tensor.data_ptr() for name, tensor in state.items() if name in names}
    missing = [
        name
        for name, tensor in state.items()
        if tensor.is_meta or (name not in names and name not in optional and tensor.data_ptr() not in present)
    ]
    ignored = tuple(getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ())
    unexpected = [name for name in names if name not in state and not any(word in name for word in ignored)]
    if missing or unexpected:
        example = min([*missing, *unexpected])
        msg = (
            f"the weights in {folder} do not belong to its config.json: {len(missing)} missing, "
            f"{len(unexpected)} without a place, for instance {example}; get the folder again"
        )
        raise CheckpointError(msg)
