"""Networks of the two stages and what they need around them: codec, text, adapters, checkpoints, condition."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import on demand what diffusers looks for where `StageTwoTransformer` is part of a saved pipeline.

    It finds the loader of a class through the names beside it, hence `ModelMixin`.
    """
    if name == "ModelMixin":
        from diffusers import ModelMixin

        return ModelMixin
    if name == "StageTwoTransformer":
        from swifti2v.wan.transformer import StageTwoTransformer

        return StageTwoTransformer
    raise AttributeError(name)
