"""Which weights of Stage II are trained, and how they are put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from swifti2v.errors import ConfigurationError
from swifti2v.runner.loading import trained_refiner
from swifti2v.training.engine.distributed import whole
from swifti2v.training.engine.writing import writing
from swifti2v.training.step_cost import LORA_TARGETS
from swifti2v.wan.checkpoints import load_stage_two_transformer, resolve
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from swifti2v.wan.checkpoints import Part

PARTS_LOADED: tuple[Part, ...] = ("stage_two",)
ADAPTER = "default"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INPUT_WEIGHTS = ("patch_embedding.", "frame_kind_table")
"""What no low-rank update can stand for: the channels of the reference and the kinds of frames begin at zero."""


@dataclass(frozen=True)
class NetworkOptions:
    """What of the transformer is trained.

    Args:
        lora_rank: 0 trains every weight; above, a LoRA of this rank on `lora_targets` and the input layer in full.
        lora_alpha: None: the rank, so that the update counts once.
        lora_targets: endings of the names of the layers.
        gradient_checkpointing: compute each block's activations twice: a third more time, a fraction of the memory.
        frozen_dtype: of weights that are not trained; bfloat16 needs the loop's `bfloat16`, which a CPU may lack.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    gradient_checkpointing: bool = True
    frozen_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.lora_rank < 0 or (self.lora_rank and not self.lora_targets):
            msg = f"lora_rank is {self.lora_rank} on {len(self.lora_targets)} targets; use 0, or a rank and targets"
            raise ConfigurationError(msg)


def load_network(checkpoint: str | Path, options: NetworkOptions) -> StageTwoTransformer:
    """Load Stage II of a checkpoint for training; stock Wan weights are widened for the reference, by zeros.

    Trained weights are float32; under a LoRA the frozen ones are of `frozen_dtype`.

    Raises:
        CheckpointError: see `load_stage_two_transformer`.
    """
    transformer = _loaded(checkpoint, _frozen_dtype(options) if options.lora_rank else torch.float32)
    if options.lora_rank:
        _add_adapter(transformer, options)
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train()


def load_teacher(checkpoint: str | Path, options: NetworkOptions) -> StageTwoTransformer:
    """Load Stage II of a checkpoint with all its weights frozen, in `frozen_dtype`."""
    return _loaded(checkpoint, _frozen_dtype(options)).requires_grad_(requires_grad=False).eval()


def plain_state(transformer: StageTwoTransformer, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the weights by the names that `StageTwoTransformer` has without a LoRA, its update added, on the CPU.

    Under sharding every process has to call it; those with ``keep=False`` get nothing.
    """
    gathered = whole(transformer.state_dict(), keep=keep)
    if not keep:
        return {}
    layers = ((name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer))
    scales = {name: module.scaling[ADAPTER] for name, module in layers}
    plain: dict[str, Tensor] = {}
    for name, tensor in gathered.items():
        if ".lora_" in name:
            continue
        layer, base, ending = name.rpartition(".base_layer.")
        if not base:
            plain[name] = tensor
        elif ending == "weight":
            down, up = (gathered[f"{layer}.lora_{part}.{ADAPTER}.weight"].float() for part in "AB")
            plain[f"{layer}.weight"] = (tensor.float() + scales[layer] * (up @ down)).to(tensor.dtype)
        else:
            plain[f"{layer}.{ending}"] = tensor
    return plain


def save_network(transformer: StageTwoTransformer, folder: Path, *, keep: bool = True) -> None:
    """Write the network as diffusers does, its LoRA merged; see `plain_state` for `keep`.

    Raises:
        OutputError: it cannot be written; an older one stays as it was.
    """
    state = plain_state(transformer, keep=keep)
    if not keep:
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        transformer.save_config(folder)
        partial = folder / f".{WEIGHTS_NAME}.part"
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
        partial.replace(folder / WEIGHTS_NAME)


def _loaded(checkpoint: str | Path, dtype: torch.dtype) -> StageTwoTransformer:
    resolved = resolve(checkpoint, parts=PARTS_LOADED)
    refiner = trained_refiner(resolved)
    transformer = load_stage_two_transformer(resolved, dtype=dtype, refiner=refiner)
    if refiner == "concat":
        return transformer
    return StageTwoTransformer.from_wan(transformer, reference_channels=transformer.config.out_channels)


def _frozen_dtype(options: NetworkOptions) -> torch.dtype:
    return torch.bfloat16 if options.frozen_dtype == "bfloat16" else torch.float32


def _add_adapter(transformer: StageTwoTransformer, options: NetworkOptions) -> None:
    transformer.requires_grad_(requires_grad=False)
    alpha = options.lora_alpha or options.lora_rank
    targets = list(options.lora_targets)
    transformer.add_adapter(LoraConfig(r=options.lora_rank, lora_alpha=alpha, target_modules=targets), ADAPTER)
    for name, parameter in transformer.named_parameters():
        if name.startswith(INPUT_WEIGHTS):
            parameter.requires_grad_(requires_grad=True)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
