"""Names in LoRA files: which module of a network each key means, and which part of its change the tensor is.

A key is read in three steps. Its suffix says which *part* it is (down, up, alpha, an additive difference, ...).
Prefixes of the tools that wrote it, and components of wrappers such as ``_orig_mod``, are taken off. What is left must
be a module of the network at hand, in diffusers' or in Wan's own naming, with dots, with underscores, or with both
mixed. Names are looked up among the network's own parameters, so an underscored name is never guessed (``self_attn``
has an underscore of its own).

Formats: native names with ``lora_down/up`` or ``lora_A/B`` (LightX2V, ComfyUI, DiffSynth), diffusers, kohya and musubi
(``lora_unet_``, also with two underscores), LyCORIS, raw PEFT, and ``.diff`` keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from swifti2v.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Expert = Literal["high", "low"]
ExpertChoice = Literal["high", "low", "both"]

# Wan's own name of each module of diffusers' class: applied in order to a diffusers name.
_TO_NATIVE: tuple[tuple[str, str], ...] = (
    (r"^(blocks\.\d+)\.attn1\b", r"\1.self_attn"),
    (r"^(blocks\.\d+)\.attn2\b", r"\1.cross_attn"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.to_out\.0$", ".o"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.norm_added_k$", ".norm_k_img"),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj$", r"\1.ffn.0"),
    (r"^(blocks\.\d+)\.ffn\.net\.2$", r"\1.ffn.2"),
    (r"^(blocks\.\d+)\.norm2$", r"\1.norm3"),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
    (r"^scale_shift_table$", "head.modulation"),
)
# Of the tools that wrote the file, flattened; several may stand one after the other.
_PREFIXES = (
    "base_model_model_",
    "diffusion_model_",
    "lora_transformer_",
    "lora_unet_",
    "lora_",
    "lycoris_",
    "transformer_",
    "pipe_",
    "dit_",
    "unet_",
    "module_",
    "model_",
)
# torch.compile, FSDP and activation checkpointing put these between the components of a name.
_WRAPPERS = re.compile(r"(^|[._])(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._])+")

# `.lora_A.default.weight`: PEFT puts the adapter's name between; `.lora_A` alone is met without `.weight`.
_NAMED = r"(?:\.(?!weight$|bias$)[^.]+)?"
_PARTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("up_bias", rf"\.lora_(?:up|B){_NAMED}\.bias$"),
        ("down", rf"\.lora_(?:down|A){_NAMED}(?:\.weight)?$"),
        ("up", rf"\.lora_(?:up|B){_NAMED}(?:\.weight)?$"),
        ("down", r"(?:\.lora|_lora|\.lora_linear_layer)\.down\.weight$"),
        ("up", r"(?:\.lora|_lora|\.lora_linear_layer)\.up\.weight$"),
        ("alpha", r"\.alpha$"),
        ("magnitude", rf"\.(?:dora_scale|lora_magnitude_vector{_NAMED}(?:\.weight)?)$"),
        *((name, rf"\.{name}{_NAMED}$") for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
        *((name, rf"\.{name}{_NAMED}$") for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")),
        *((name, rf"\.{name}{_NAMED}$") for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")),
        ("diff", r"\.(?:diff|w_norm)$"),
        ("diff_bias", r"\.(?:diff_b|b_norm)$"),
        ("diff_modulation", r"\.diff_m$"),
    )
)
OTHER_METHODS = re.compile(r"\.(lora_mid|hada_t|lokr_t|oft_|boft_|glora_|a1\.|b1\.)")
"""Parts of methods that are not supported: Tucker decompositions, OFT, BOFT, GLoRA."""

# Wan2.1's CLIP branch. LoRA files extracted for Wan2.2 hold these keys although Wan2.2 has no such modules
# (LightX2V issues 1246 and 417: harmless), so they are left out where the network lacks them, and reported.
_IMAGE_BRANCH = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_[qkv]_proj|norm_added_[qk]|image_embedder)(?:[._]|$)"
)
# ai-toolkit writes `.transformer_1.` (high noise) and `.transformer_2.` (low noise) right after its prefix.
_EXPERT_IN_KEY = re.compile(
    r"^((?:diffusion_model|transformer|base_model\.model|lora_unet|lycoris)[._]+)?transformer_([12])[._]"
)


class ModuleNames:
    """Every name that a LoRA file may use for a module or a lone parameter of one network.

    Args:
        model: diffusers' `WanTransformer3DModel` or a subclass; with or without PEFT layers, perhaps on the meta
        device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model_name = type(model).__name__
        self.shapes: dict[str, torch.Size] = {
            name: parameter.shape
            for raw_name, parameter in model.named_parameters()
            if (name := _without_peft(raw_name)) is not None
        }
        self.has_image_branch = any(_IMAGE_BRANCH.search(name) for name in self.shapes)
        self._flat: dict[str, str] = {}
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            target = module if leaf in ("weight", "bias") else name
            self._flat[flattened(target)] = target
            self._flat.setdefault(flattened(native_name(target)), target)

    def find(self, stem: str) -> str | None:
        """Return the name of the module or lone parameter that `stem`, a key without its suffix, means; or None."""
        rest = flattened(stem)
        while rest not in self._flat:
            prefix = next((prefix for prefix in _PREFIXES if rest.startswith(prefix)), None)
            if prefix is None:
                return None
            rest = rest.removeprefix(prefix).lstrip("_")
        return self._flat[rest]

    def locate(self, key: str) -> tuple[str, str] | None:
        """Return the module or lone parameter and the part that `key` stands for; None if there is none here."""
        split = split_key(key)
        if split is None:
            return None
        stem, part = split
        if part == "diff_modulation":
            target, part = self.find(f"{stem}.modulation"), "diff"
        else:
            target = self.find(stem)
        if target is None:
            return None
        # A lone parameter (modulation) can be changed by a difference only; a module needs the parameter it changes.
        needed = {"diff_bias": f"{target}.bias", "up_bias": f"{target}.bias"}.get(part, f"{target}.weight")
        if needed in self.shapes or (part == "diff" and target in self.shapes):
            return target, part
        return None

    def lacks_image_branch_of(self, key: str) -> bool:
        """Return whether `key` is of the CLIP image branch, and the network has none."""
        return not self.has_image_branch and bool(_IMAGE_BRANCH.search(key)) and split_key(key) is not None


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the stem that names a module and the part it is (`down`, `up`, `alpha`, ...), or return None."""
    key = _WRAPPERS.sub(r"\1", key)
    for part, pattern in _PARTS:
        match = pattern.search(key)
        if match is not None and match.start() > 0:
            return key[: match.start()], part
    return None


def route_experts(state_dict: Mapping[str, Tensor]) -> dict[Expert, dict[str, Tensor]] | None:
    """Split a file that holds both experts of Wan2.2-A14B (ai-toolkit); None if its keys name no expert.

    Returns:
        Keys without the expert's name, by expert; `transformer_1` is the high-noise one.

    Raises:
        AdapterError: some keys name an expert and others do not.
    """
    routed: dict[Expert, dict[str, Tensor]] = {}
    others: list[str] = []
    # diffusers names a pipeline's transformers `transformer.` and `transformer_2.`; one alone does not tell the expert.
    by_component = any(key.startswith("transformer_2.") for key in state_dict)
    for raw_key, tensor in state_dict.items():
        key = _WRAPPERS.sub(r"\1", raw_key)
        match = _EXPERT_IN_KEY.match(key)
        if match is not None:
            expert: Expert = "high" if match[2] == "1" else "low"
            routed.setdefault(expert, {})[(match[1] or "") + key[match.end() :]] = tensor
        elif by_component and key.startswith("transformer."):
            routed.setdefault("high", {})[key] = tensor
        else:
            others.append(key)
    if not routed:
        return None
    if others:
        msg = (
            f"{len(others)} of {len(state_dict)} keys name no expert although the others do "
            f"({some_of(others)}); split the file into one for each expert"
        )
        raise AdapterError(msg)
    return routed


def native_name(name: str) -> str:
    """Return the name that Wan's own code gives to a module of diffusers (`blocks.0.attn1.to_q`)."""
    for pattern, replacement in _TO_NATIVE:
        name = re.sub(pattern, replacement, name)
    return name


def flattened(name: str) -> str:
    """Return a dotted name with underscores, as kohya writes it."""
    return name.replace(".", "_")


def some_of(keys: list[str]) -> str:
    """Return the first of `keys`, for a message."""
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown}, ..."


def _without_peft(name: str) -> str | None:
    """Return a parameter's name as it was before PEFT wrapped its module; None for PEFT's own parameters."""
    components = name.split(".")
    if any(component.startswith("lora_") for component in components):
        return None
    return ".".join(component for component in components if component != "base_layer")
