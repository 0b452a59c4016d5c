"""The networks of a pipeline as their `config.json` files describe them: what a plan needs to know of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from swifti2v.errors import CheckpointError, ConfigurationError, InvalidInputError
from swifti2v.geometry import CodecGeometry, Size, motion_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from swifti2v.settings import Quantization

Stage = Literal["stage_one", "stage_two"]

STAGE_TWO = "swifti2v.wan.transformer:StageTwoTransformer"
EXPERT = "diffusers:WanTransformer3DModel"
WAN_CODEC = "diffusers:AutoencoderKLWan"
TEXT_ENCODER = "transformers:UMT5EncoderModel"
LIGHT_DECODER = "swifti2v.wan.taehv:LightDecoderNetwork"
MINI_CODEC = "swifti2v.mini.transform_codec:BlockTransformCodec"

_TEXT_ENCODER_KEYS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "feed_forward_proj"),
)
_WITHOUT_COST = ("latents_mean", "latents_std")


@dataclass(frozen=True)
class Network:
    """A network by its class, ``module:name``, and its configuration as JSON: what its cost depends on, and no more."""

    class_path: str
    config_json: str

    @classmethod
    def of(cls, class_path: str, config: Mapping[str, Any]) -> Network:
        """Take from `config` what decides a cost."""
        if class_path == TEXT_ENCODER:
            kept = {name: config[name] for name in _TEXT_ENCODER_KEYS}
        else:
            kept = {name: value for name, value in config.items() if name[0] != "_" and name not in _WITHOUT_COST}
        return cls(class_path, json.dumps(kept, sort_keys=True))

    @property
    def class_name(self) -> str:
        """Name of the class."""
        return self.class_path.split(":")[1]

    @property
    def digest(self) -> str:
        """Eight characters that tell this configuration from others."""
        return hashlib.sha256(f"{self.class_name} {self.config_json}".encode()).hexdigest()[:8]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration."""
        config: dict[str, Any] = json.loads(self.config_json)
        return config

    @property
    def is_wan_codec(self) -> bool:
        """Whether this is a codec whose frames can be cut into tiles."""
        return self.class_path == WAN_CODEC

    def geometry(self, transformer: Network | None = None) -> CodecGeometry:
        """Of a codec, with the patches of the `transformer` of its latents."""
        config = self.config  # where it says nothing: diffusers' own defaults, which the codec of `mini` shares
        patch = 1 if transformer is None else transformer.config.get("patch_size", (1, 2, 2))[1]
        return CodecGeometry(config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4), patch)


@dataclass(frozen=True)
class PipelineNetworks:
    """The networks of both stages, and what of a checkpoint their cost depends on besides.

    Args:
        stage_one: one expert of Stage I.
        num_experts: experts of Stage I that take turns; each has its own weights.
        text_tokens: length to which prompts are padded.
        reference_reduction: output size over the size of the motion reference.
        max_reference_area: pixels in a frame of the motion reference at most; None: no limit.
        window_frames: longest clip that Stage I makes at once, in pixel frames.
        overlap_frames: pixel frames that a later window of Stage I shares with the one before it.
        light_decoder: decodes in place of Stage II's codec; None: the codec decodes.
        quantization: of the transformers, whatever the storage of the other weights.
        compute_dtype: of the work; the codec of Stage I always works in float32.
        stage_one_kind: "path" is Stage I of `mini`, which takes some megabytes of the host and no part in a plan.
        stages: those whose weights are held; a plan is made for those of them in `planned`.
    """

    text_encoder: Network
    stage_one: Network
    stage_one_codec: Network
    stage_two: Network
    stage_two_codec: Network
    num_experts: int = 2
    text_tokens: int = 512
    reference_reduction: float = 4.0
    max_reference_area: int | None = None
    window_frames: int = 81
    overlap_frames: int = 5
    light_decoder: Network | None = None
    quantization: Quantization = "none"
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    stage_one_kind: Literal["wan", "path"] = "wan"
    stages: tuple[Stage, ...] = ("stage_one", "stage_two")

    @property
    def planned(self) -> tuple[Stage, ...]:
        """The stages that a plan is made for."""
        return tuple(stage for stage in self.stages if stage == "stage_two" or self.stage_one_kind == "wan")

    @property
    def stage_one_geometry(self) -> CodecGeometry:
        """Of Stage I's latents."""
        return self.stage_one_codec.geometry(self.stage_one)

    @property
    def stage_two_geometry(self) -> CodecGeometry:
        """Of Stage II's latents."""
        return self.stage_two_codec.geometry(self.stage_two)

    def reference_size(self, size: Size) -> Size:
        """Return the size of the motion reference of an output of `size`."""
        multiple = self.stage_one_geometry.size_multiple
        return motion_size(
            size, reduction=self.reference_reduction, max_area=self.max_reference_area, multiple=multiple
        )

    def with_light_decoder(self) -> PipelineNetworks:
        """Return the same pipeline with TAEHV's decoder; raise `InvalidInputError` if its codec is not Wan's."""
        codec = self.stage_two_codec
        if not codec.is_wan_codec:
            msg = (
                "light decoders are for the latents of Wan's codecs, and this checkpoint has another; use decoder exact"
            )
            raise InvalidInputError(msg, param="decoder", value="light")
        geometry = self.stage_two_geometry
        layout = {
            "num_channels": codec.config["z_dim"],
            "widths": (256, 128, 64, 64),
            "frame_factors": (1, 2, 2),
            "patch_size": geometry.spatial // 8,
            "is_wide": False,
        }
        return replace(self, light_decoder=Network.of(LIGHT_DECODER, layout))


PATH: dict[str, Any] = {
    "text_encoder": Network(TEXT_ENCODER, "{}"),
    "stage_one": Network(EXPERT, "{}"),
    "stage_one_codec": Network(WAN_CODEC, "{}"),
    "num_experts": 0,
    "stage_one_kind": "path",
}
"""Fields of `PipelineNetworks` for Stage I of `mini`: only the geometry of its networks is asked, and that is Wan's."""


def read_networks(
    stage_one: Path, stage_two_transformer: Path, stage_two_codec: Path, *, kind: str = "wan", **others: Any
) -> PipelineNetworks:
    """Read the configurations in the folders of a checkpoint; no weights are opened.

    Args:
        stage_one: folder of a `WanImageToVideoPipeline` as diffusers saves it; not looked into for another `kind`.
        stage_two_transformer: folder of the transformer.
        stage_two_codec: folder of the codec.
        kind: of Stage I, see `StageOneEntry`.
        others: further fields of `PipelineNetworks`.

    Raises:
        CheckpointError: a `config.json` is missing or is not JSON.
        ConfigurationError: a codec of Stage II is of a class that is not known.
    """
    components = _read(stage_one / "model_index.json") if (stage_one / "model_index.json").is_file() else {}
    codec = _read(stage_two_codec / "config.json")
    codecs = {path.split(":")[1]: path for path in (WAN_CODEC, MINI_CODEC)}
    if codec.get("_class_name") not in codecs:
        msg = f"codec {codec.get('_class_name')!r} of Stage II is not known; known are {', '.join(sorted(codecs))}"
        raise ConfigurationError(msg, param="_class_name", value=codec.get("_class_name"))

    def of_stage_one(name: str, usual: str) -> Network:
        module, class_name = components.get(name) or usual.split(":")
        return Network.of(f"{module}:{class_name}", _read(stage_one / name / "config.json"))

    def described() -> dict[str, Any]:
        return {
            "text_encoder": of_stage_one("text_encoder", TEXT_ENCODER),
            "stage_one": of_stage_one("transformer", EXPERT),
            "stage_one_codec": of_stage_one("vae", WAN_CODEC),
            "num_experts": 2 if (stage_one / "transformer_2" / "config.json").is_file() else 1,
        }

    return PipelineNetworks(
        **(PATH if kind == "path" else described()),
        stage_two=Network.of(STAGE_TWO, _read(stage_two_transformer / "config.json")),
        stage_two_codec=Network.of(codecs[codec["_class_name"]], codec),
        **others,
    )


def _read(path: Path) -> dict[str, Any]:
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


_A14B: dict[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
}
_TI2V_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 96,
    "out_channels": 48,
    "reference_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}
_UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
}
_VAE22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
WAN22 = PipelineNetworks(
    text_encoder=Network.of(TEXT_ENCODER, _UMT5_XXL),
    stage_one=Network.of(EXPERT, _A14B),
    stage_one_codec=Network.of(WAN_CODEC, {"base_dim": 96, "z_dim": 16}),
    stage_two=Network.of(STAGE_TWO, _TI2V_5B),
    stage_two_codec=Network.of(WAN_CODEC, _VAE22),
)
"""Wan2.2-I2V-A14B, and Stage II widened from Wan2.2-TI2V-5B for the reference as channels."""
