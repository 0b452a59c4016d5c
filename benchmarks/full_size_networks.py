"""Every network of the wan2.2 preset at full size with random weights: cost does not depend on their values."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast

    from swifti2v.memory.limits import MemoryLimits
    from swifti2v.runner.parts import Parts
    from swifti2v.wan.taehv import LightDecoder
    from swifti2v.wan.transformer import StageTwoTransformer

EXPERT = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 36,
    "out_channels": 16,
    "ffn_dim": 13824,
    "num_layers": 40,
}
TI2V_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "ffn_dim": 14336,
    "num_layers": 30,
}
VAE21: dict[str, Any] = {"base_dim": 96, "z_dim": 16}
VAE22: dict[str, Any] = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "in_channels": 12,
    "out_channels": 12,
    "is_residual": True,
    "patch_size": 2,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
    "scale_factor_spatial": 16,
}


@contextmanager
def built_on(device: str | torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Make new networks on a device in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def expert(device: str) -> WanTransformer3DModel:
    """One expert of Stage I."""
    from diffusers import WanTransformer3DModel

    with built_on(device):
        return WanTransformer3DModel(**EXPERT).eval()


def stage_two(device: str) -> StageTwoTransformer:
    """Stage II with the reference as channels."""
    from swifti2v.wan.transformer import StageTwoTransformer

    with built_on(device):
        return StageTwoTransformer(**(TI2V_5B | {"in_channels": 96}), reference_channels=48).eval()


def stage_two_of_diffusers(device: str) -> WanTransformer3DModel:
    """The same network as diffusers has it: modulation per token."""
    from diffusers import WanTransformer3DModel

    with built_on(device):
        return WanTransformer3DModel(**(TI2V_5B | {"in_channels": 96})).eval()


def codec(settings: dict[str, Any], device: str) -> AutoencoderKLWan:
    """`VAE21` or `VAE22`."""
    from diffusers import AutoencoderKLWan

    with built_on(device):
        return AutoencoderKLWan(**settings).eval()


def light_decoder(device: str, *, wide: bool = False) -> LightDecoder:
    """TAEHV's decoder of Wan2.2's latents: ``taew2_2``, or ``taew2_2_super``."""
    from swifti2v.wan.taehv import LightDecoder, LightDecoderNetwork, LightLayout

    widths = (512, 256, 128, 64) if wide else (256, 128, 64, 64)
    with built_on(device):
        return LightDecoder(LightDecoderNetwork(LightLayout(48, widths, patch_size=2, is_wide=wide)).eval())


def parts(device: str, memory: MemoryLimits | None, *, light: bool = False) -> Parts:
    """Both stages, as a checkpoint would give them; with limits the weights wait in host memory."""
    from swifti2v.geometry import Size
    from swifti2v.runner.parts import Parts
    from swifti2v.settings import GenerationSettings
    from swifti2v.stage_one import StageOne
    from swifti2v.stage_two import StageTwo
    from swifti2v.wan.streaming import open_codec

    home = device if memory is None else "cpu"
    return Parts(
        name="random weights",
        stage_one=StageOne(_stage_one_pipeline(device, home)),
        stage_two=StageTwo(stage_two(device).to(home), open_codec(codec(VAE22, device).to(home))),
        defaults=GenerationSettings(size=Size(2560, 1408), num_frames=81, fps=16, refiner="concat"),
        device=torch.device(device),
        memory=memory,
        decoder=light_decoder(device) if light else None,
    )


def _stage_one_pipeline(device: str, home: str) -> WanImageToVideoPipeline:
    from diffusers import WanImageToVideoPipeline
    from transformers import UMT5Config, UMT5EncoderModel

    from swifti2v.schedulers import FixedSigmaScheduler

    text = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    with built_on(device):
        # Each goes home before the next is made: together they may be more than the device holds.
        encoder = UMT5EncoderModel(text).eval().to(home)
    return WanImageToVideoPipeline(
        tokenizer=character_tokenizer(),
        text_encoder=encoder,
        vae=codec(VAE21, device).to(home),
        scheduler=FixedSigmaScheduler(),
        transformer=expert(device).to(home),
        transformer_2=expert(device).to(home),
        boundary_ratio=0.9,
    )


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A character tokenizer with T5's special tokens; prompts are padded to 512 tokens whatever they say."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
