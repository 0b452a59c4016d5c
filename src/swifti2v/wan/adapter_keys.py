"""What the keys of a LoRA file mean: from any of the formats met in the wild to one internal form.

A key is read in three steps: the suffix says which *part* it is (down, up, alpha, an additive difference), prefixes of
the tools that wrote it are taken off, and what is left must be a name of a module of the network at hand, in
diffusers' or in Wan's own naming, with dots or with underscores. Names come from the network's own parameters, so an
underscored name is looked up, never guessed by replacing characters (``self_attn`` has an underscore of its own).

Formats: native names with ``lora_down/up`` or ``lora_A/B`` (LightX2V, ComfyUI, DiffSynth), diffusers, kohya and
musubi (``lora_unet_``, also with two underscores), LyCORIS, raw PEFT, and ``.diff`` keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from swifti2v.errors import AdapterError

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
_DOTTED_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "model.",
    "transformer.",
    "pipe.dit.",
    "dit.",
    "unet.",
    "module.",
)
_UNDERSCORED_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_")
_INNER_UNDERSCORED_PREFIXES = ("diffusion_model_", "transformer_", "unet_", "model_")

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
        ("diff", r"\.(?:diff|w_norm)$"),
        ("diff_bias", r"\.(?:diff_b|b_norm)$"),
        ("diff_modulation", r"\.diff_m$"),
    )
)
_OTHER_METHODS = re.compile(r"\.(dora_scale|lora_magnitude_vector|lora_mid|hada_|lokr_|oft_|boft_|glora_|a1\.|b1\.)")

# Wan2.1's CLIP branch. LoRA files extracted for Wan2.2 hold these keys although Wan2.2 has no such modules
# (LightX2V issues 1246 and 417: harmless), so they are left out where the network lacks them, and said.
_IMAGE_BRANCH = re.compile(
    r"(?:^|[._])(?:k_img|v_img|norm_k_img|img_emb|add_[qkv]_proj|norm_added_[qk]|image_embedder)(?:[._]|$)"
)


@dataclass(frozen=True, eq=False)
class LoraDelta:
    """A low-rank change of one weight: ``scale * up @ down``.

    Args:
        down: ``[rank, in]``, or ``[rank, in, *kernel]`` for a convolution.
        up: ``[out, rank]``, or with a kernel of ones for a convolution.
        scale: alpha / rank (alpha / sqrt(rank) for rs-LoRA), 1 where the file gives no alpha.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return self.down.shape[0]

    def dense(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return the change as a float32 tensor of the weight's `shape`, computed in float32 on `device`."""
        down = self.down.flatten(1).to(device, torch.float32)
        up = self.up.flatten(1).to(device, torch.float32)
        with torch.autocast(device.type, enabled=False):
            return (up @ down).mul_(self.scale).view(shape)


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """A LoRA file, read for one network.

    Args:
        deltas: low-rank changes, by module name (diffusers' naming); they change the module's `weight`.
        diffs: additive changes, by parameter name (diffusers' naming), of the parameter's shape.
        notes: what was left out on purpose, one sentence each.
    """

    deltas: Mapping[str, LoraDelta]
    diffs: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlphaRule:
    """How a LoRA's scale follows from its rank where the file's own `.alpha` keys do not say it.

    Args:
        alpha: for every module, or None: unknown, and the scale is 1.
        alpha_pattern: PEFT's exceptions, regular expression of a module name -> alpha.
        rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732) instead of alpha / rank.
    """

    alpha: float | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def scale(self, module: str, rank: int, file_alpha: float | None) -> float:
        """Scale of the LoRA of `module`; raise `AdapterError` if rs-LoRA is asked for and alpha is not known."""
        alpha = file_alpha if file_alpha is not None else self._alpha_of(module)
        if alpha is None:
            if self.rslora:
                msg = "the LoRA is to be scaled as rs-LoRA but its file gives no alpha; pass alpha="
                raise AdapterError(msg)
            return 1.0
        if not (math.isfinite(alpha) and alpha > 0):
            msg = f"alpha of {module} is {alpha}; it must be a positive number: the LoRA file is damaged"
            raise AdapterError(msg)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _alpha_of(self, module: str) -> float | None:
        # PEFT's rule: the pattern is the whole name or what follows a dot.
        for pattern, alpha in self.alpha_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return self.alpha


class ModuleNames:
    """Every name that a LoRA file may use for a module or a lone parameter of one network."""

    def __init__(self, model: nn.Module) -> None:
        self.model_name = type(model).__name__
        self.shapes: dict[str, torch.Size] = {
            name: parameter.shape
            for raw_name, parameter in model.named_parameters()
            if (name := _without_peft(raw_name)) is not None
        }
        self.has_image_branch = any(_IMAGE_BRANCH.search(name) for name in self.shapes)
        self._dotted: dict[str, str] = {}
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            target = module if leaf in ("weight", "bias") else name
            self._dotted[target] = target
            self._dotted.setdefault(native_name(target), target)
        self._underscored = {alias.replace(".", "_"): target for alias, target in self._dotted.items()}

    def find(self, stem: str) -> str | None:
        """Name of the module or lone parameter that `stem` (a key without its suffix) means, or None."""
        rest = stem
        while True:
            if rest in self._dotted:
                return self._dotted[rest]
            prefix = next((prefix for prefix in _DOTTED_PREFIXES if rest.startswith(prefix)), None)
            if prefix is None:
                break
            rest = rest.removeprefix(prefix)
        prefix = next((prefix for prefix in _UNDERSCORED_PREFIXES if rest.startswith(prefix)), None)
        if prefix is None:
            return None
        rest = rest.removeprefix(prefix).lstrip("_")
        for inner in ("", *_INNER_UNDERSCORED_PREFIXES):
            if rest.startswith(inner) and rest.removeprefix(inner) in self._underscored:
                return self._underscored[rest.removeprefix(inner)]
        return None


def split_key(key: str) -> tuple[str, str] | None:
    """Split a key into the stem that names a module and the part it is (`down`, `up`, `alpha`, ...), or return None."""
    for part, pattern in _PARTS:
        match = pattern.search(key)
        if match is not None and match.start() > 0:
            return key[: match.start()], part
    return None


def normalise(state_dict: Mapping[str, Tensor], model: nn.Module, *, rule: AlphaRule | None = None) -> AdapterWeights:
    """Read the tensors of a LoRA file for `model`, all of them.

    Args:
        state_dict: keys of any supported format; one expert only (`swifti2v.wan.adapters.route_experts`).
        model: diffusers' `WanTransformer3DModel` or a subclass; with or without PEFT layers.
        rule: the scale where the file has no `.alpha` keys.

    Raises:
        AdapterError: a key is left over, a pair is incomplete, a shape does not match, nothing matches.
    """
    names = ModuleNames(model)
    parts, notes = _collect(state_dict, names)
    deltas: dict[str, LoraDelta] = {}
    diffs: dict[str, Tensor] = {}
    for target, tensors in parts.items():
        delta = _delta_of(target, tensors, names, rule or AlphaRule())
        if delta is not None:
            deltas[target] = delta
        for parameter, diff in _diffs_of(target, tensors, delta, names):
            diffs[parameter] = diffs[parameter] + diff if parameter in diffs else diff
    if not deltas and not diffs:
        msg = f"the file holds no LoRA weights for {names.model_name}; use a LoRA made for Wan transformers"
        raise AdapterError(msg)
    return AdapterWeights(deltas=deltas, diffs=diffs, notes=notes)


def _collect(
    state_dict: Mapping[str, Tensor], names: ModuleNames
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    parts: dict[str, dict[str, Tensor]] = {}
    left_over: list[str] = []
    ignored: list[str] = []
    for key, tensor in state_dict.items():
        place = _place(key, names)
        if place is None:
            spurious = not names.has_image_branch and _IMAGE_BRANCH.search(key) and split_key(key)
            (ignored if spurious else left_over).append(key)
            continue
        target, part = place
        if part in parts.setdefault(target, {}):
            msg = f"{key} is a second {part} for {target}: the file holds several LoRAs; split it into one file each"
            raise AdapterError(msg)
        if not (tensor.is_floating_point() or part == "alpha") or not bool(torch.isfinite(tensor.float()).all()):
            msg = f"{key} holds {tensor.dtype} values that are not finite numbers; the file is damaged: get it again"
            raise AdapterError(msg)
        parts[target][part] = tensor
    if left_over:
        raise AdapterError(_left_over_message(left_over, len(state_dict), names.model_name))
    if not ignored:
        return parts, ()
    note = (
        f"left out {len(ignored)} keys of the CLIP image branch, which this network does not have: {_some_of(ignored)}"
    )
    return parts, (note,)


def _place(key: str, names: ModuleNames) -> tuple[str, str] | None:
    """Return the target and the part that `key` stands for; None if it belongs to nothing here."""
    split = split_key(key)
    if split is None:
        return None
    stem, part = split
    if part == "diff_modulation":
        target, part = names.find(f"{stem}.modulation"), "diff"
    else:
        target = names.find(stem)
    if target is None:
        return None
    # A lone parameter (modulation) can be changed by a difference only; a module needs the parameter it changes.
    needed = {"diff_bias": f"{target}.bias", "up_bias": f"{target}.bias"}.get(part, f"{target}.weight")
    if needed in names.shapes or (part == "diff" and target in names.shapes):
        return target, part
    return None


def _delta_of(target: str, tensors: Mapping[str, Tensor], names: ModuleNames, rule: AlphaRule) -> LoraDelta | None:
    if not tensors.keys() & {"down", "up", "alpha", "up_bias"}:
        return None
    if missing := {"down", "up"} - tensors.keys():
        has, lacks = ", ".join(sorted(tensors)), ", ".join(sorted(missing))
        msg = f"the LoRA of {target} has {has} but lacks {lacks}; the file is incomplete: get it again"
        raise AdapterError(msg)
    down, up = tensors["down"], tensors["up"]
    weight = names.shapes[f"{target}.weight"]
    fits = (
        min(down.ndim, up.ndim) >= 2
        and up.flatten(1).shape == (weight[0], down.shape[0])
        and down.flatten(1).shape[1] == math.prod(weight[1:])
        and (down.ndim == 2 or down.shape[1:] == weight[1:])
        and ("alpha" not in tensors or tensors["alpha"].numel() == 1)
    )
    if not fits:
        msg = (
            f"the LoRA of {target} has down {list(down.shape)} and up {list(up.shape)}, which do not fit its weight "
            f"{list(weight)}; use a LoRA made for a network of this size"
        )
        raise AdapterError(msg)
    alpha = tensors["alpha"].item() if "alpha" in tensors else None
    return LoraDelta(down=down, up=up, scale=rule.scale(target, down.shape[0], alpha))


def _diffs_of(
    target: str, tensors: Mapping[str, Tensor], delta: LoraDelta | None, names: ModuleNames
) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    if "diff" in tensors:
        found.append((target if target in names.shapes else f"{target}.weight", tensors["diff"]))
    if "diff_bias" in tensors:
        found.append((f"{target}.bias", tensors["diff_bias"]))
    if "up_bias" in tensors and delta is not None:
        # PEFT scales the bias of the up matrix with the matrix (`lora_bias=True`).
        found.append((f"{target}.bias", tensors["up_bias"].float() * delta.scale))
    return [(name, _fitted(name, tensor, names.shapes[name])) for name, tensor in found]


def _fitted(name: str, diff: Tensor, shape: torch.Size) -> Tensor:
    # Modulation tables are stored as [6, D] or [1, 6, D]: the same numbers in the same order.
    if [side for side in diff.shape if side != 1] == [side for side in shape if side != 1]:
        return diff.reshape(shape)
    msg = (
        f"the difference for {name} is {list(diff.shape)}, the parameter {list(shape)}; "
        "use a LoRA made for a network of this size"
    )
    raise AdapterError(msg)


def _left_over_message(left_over: list[str], total: int, model_name: str) -> str:
    other = next((match for key in left_over if (match := _OTHER_METHODS.search(key))), None)
    if other is not None:
        return (
            f"{len(left_over)} of {total} keys are not plain LoRA ({_some_of(left_over)}): DoRA, LoHa, LoKr, OFT and "
            "Tucker forms are not supported; merge the file into a plain LoRA with the tool that made it"
        )
    return (
        f"{len(left_over)} of {total} keys belong to no module of this {model_name} ({_some_of(left_over)}); "
        "use a LoRA made for this network"
    )


def _some_of(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown}, ..."


def native_name(name: str) -> str:
    """Return the name that Wan's own code gives to a module of diffusers (`blocks.0.attn1.to_q`)."""
    for pattern, replacement in _TO_NATIVE:
        name = re.sub(pattern, replacement, name)
    return name


def _without_peft(name: str) -> str | None:
    """Parameter name as it was before PEFT wrapped its module; None for PEFT's own parameters."""
    components = name.split(".")
    if any(component.startswith("lora_") for component in components):
        return None
    return ".".join(component for component in components if component != "base_layer")
