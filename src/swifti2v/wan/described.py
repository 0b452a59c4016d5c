"""Networks as their configurations describe them, without weights: on PyTorch's meta device.

Who runs one stage asks the other for its geometry, its dimensions and its checks, and never for its numbers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, WanImageToVideoPipeline

from swifti2v.wan.checkpoint_files import as_checkpoint_error
from swifti2v.wan.checkpoints import STAGE_TWO_CODECS, class_name_in
from swifti2v.wan.stage_one_weights import network_classes
from swifti2v.wan.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from swifti2v.wan.checkpoints import ResolvedCheckpoint


def described_stage_one(resolved: ResolvedCheckpoint, *, dtype: torch.dtype) -> WanImageToVideoPipeline:
    """Return Stage I's pipeline with its tokenizer and scheduler, and networks of `dtype` without weights.

    Raises:
        CheckpointError: missing or damaged files.
    """
    folder = resolved.folder_of("stage_one")
    networks = {
        name: _described(network_class, folder / name, dtype) for name, network_class in network_classes(folder).items()
    }
    with as_checkpoint_error(folder):
        return WanImageToVideoPipeline.from_pretrained(str(folder), local_files_only=True, **networks)


def described_stage_two(resolved: ResolvedCheckpoint, *, dtype: torch.dtype) -> tuple[StageTwoTransformer, nn.Module]:
    """Return Stage II's transformer and codec, of `dtype` and without weights.

    Raises:
        CheckpointError: missing or damaged files.
    """
    entry, folder = resolved.index.stage_two, resolved.folder_of("stage_two")
    transformer: StageTwoTransformer = _described(StageTwoTransformer, folder / entry.transformer_subfolder, dtype)
    codec = folder / entry.vae_subfolder
    name = class_name_in(codec)
    return transformer, _described(getattr(import_module(STAGE_TWO_CODECS.get(name, "diffusers")), name), codec, dtype)


def _described(network_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    with as_checkpoint_error(folder), torch.device("meta"):
        if issubclass(network_class, ConfigMixin):
            network = network_class.from_config(network_class.load_config(str(folder), local_files_only=True))
        else:
            network = network_class(network_class.config_class.from_pretrained(str(folder), local_files_only=True))
        # Not diffusers' own `to`, which warns of layers that are to stay in float32: these hold nothing.
        return torch.nn.Module.to(network, dtype).eval()
