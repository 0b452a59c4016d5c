"""The dimensions of saved networks, read from their `config.json` files; no weights are opened."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from swifti2v.errors import CheckpointError, ConfigurationError
from swifti2v.memory.budget import PipelineDimensions
from swifti2v.memory.codec_cost import WanCodecDimensions
from swifti2v.memory.transform_cost import BlockTransformDimensions, MotionCodecDimensions
from swifti2v.memory.transformer_cost import TextEncoderDimensions, TransformerDimensions, config_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from swifti2v.memory.codec_cost import CodecCost

CODECS: dict[str, Callable[[Mapping[str, Any]], CodecCost]] = {
    "AutoencoderKLWan": WanCodecDimensions.from_config,
    "BlockTransformCodec": BlockTransformDimensions.from_config,
    "MotionCodec": MotionCodecDimensions.from_config,
}


def codec_from_config(config: Mapping[str, Any]) -> CodecCost:
    """Return the dimensions of the codec of this `config.json`; raise `ConfigurationError` for an unknown class."""
    name = config_value(config, "_class_name")
    if name not in CODECS:
        msg = f"no cost is known for a codec of class {name!r}; known are {', '.join(sorted(CODECS))}"
        raise ConfigurationError(msg)
    return CODECS[name](config)


def read_pipeline_dimensions(
    stage_one: Path, stage_two_transformer: Path, stage_two_codec: Path, **run: Any
) -> PipelineDimensions:
    """Read the networks of both stages.

    Args:
        stage_one: a `WanImageToVideoPipeline` as diffusers saves it: text_encoder, transformer, transformer_2, vae.
        stage_two_transformer: folder of the transformer.
        stage_two_codec: folder of the codec.
        run: other fields of `PipelineDimensions`: text_tokens, reference_factor, ...

    Raises:
        CheckpointError: a `config.json` is missing or is not JSON.
        ConfigurationError: a value is missing, or a codec is of a class whose cost is not known.
    """
    return PipelineDimensions(
        text_encoder=TextEncoderDimensions.from_config(_read(stage_one / "text_encoder")),
        stage_one=TransformerDimensions.from_config(_read(stage_one / "transformer")),
        stage_one_codec=codec_from_config(_read(stage_one / "vae")),
        stage_two=TransformerDimensions.from_config(_read(stage_two_transformer)),
        stage_two_codec=codec_from_config(_read(stage_two_codec)),
        num_experts=2 if (stage_one / "transformer_2" / "config.json").is_file() else 1,
        **run,
    )


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror}; give a whole checkpoint"
        raise CheckpointError(msg) from error
    except ValueError as error:
        msg = f"{path} is not JSON ({error}); it is damaged: get it again"
        raise CheckpointError(msg) from error
    if not isinstance(config, dict):
        msg = f"{path} is not a JSON object; it is damaged: get it again"
        raise CheckpointError(msg)
    return config
