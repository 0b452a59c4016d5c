"""Adapters that are refused in one line, before anything is changed."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from swifti2v.errors import AdapterError
from swifti2v.wan.adapters import (
    AdapterFile,
    attach,
    fuse,
    load_adapter,
    normalise,
    read_adapter_file,
)
from tests.wan.lora_formats import (
    BLOCK_MODULES,
    FORMATS,
    known_lora,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tests.wan.lora_formats import Known


def broken(known: Known) -> dict[str, tuple[dict[str, Tensor], str]]:
    good = FORMATS["1-native-comfyui"](known)
    stem = "diffusion_model.blocks.0.self_attn.q"
    extra_block = {key.replace("blocks.1.", "blocks.7."): tensor for key, tensor in good.items()}
    return {
        "half matching": (good | extra_block, r"30 of 90 keys belong to no module.*blocks\.7"),
        "no down": ({k: v for k, v in good.items() if k != f"{stem}.lora_down.weight"}, "lacks down"),
        "no up": ({k: v for k, v in good.items() if k != f"{stem}.lora_up.weight"}, "lacks up"),
        "wrong width": (good | {f"{stem}.lora_down.weight": torch.ones(2, 23)}, r"\[2, 23\].*do not fit"),
        "wrong rank": (good | {f"{stem}.lora_up.weight": torch.ones(24, 9)}, "do not fit"),
        "wrong difference": (good | {f"{stem}.diff_b": torch.ones(5)}, r"\[5\]"),
        "bias of a norm without one": ({"blocks.0.self_attn.norm_q.diff_b": torch.ones(24)}, "belong to no module"),
        "not a number": (good | {f"{stem}.lora_up.weight": torch.full((24, 2), math.nan)}, "not finite"),
        "alpha of zero": (good | {f"{stem}.alpha": torch.tensor(0.0)}, "alpha of blocks.0.attn1.to_q is 0"),
        "dora": (good | {f"{stem}.dora_scale": torch.ones(24, 1)}, "DoRA"),
        "loha": ({"lycoris_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        "twice": (good | {"blocks.0.self_attn.q.lora_up.weight": torch.ones(24, 2)}, "second up"),
        "other network": ({"lora_unet_down_blocks_0_attn_q.lora_down.weight": torch.ones(2, 24)}, "no module of this"),
        "empty": ({}, "holds no LoRA weights"),
    }


@pytest.mark.parametrize(
    "case",
    [
        "half matching",
        "no down",
        "no up",
        "wrong width",
        "wrong rank",
        "wrong difference",
        "bias of a norm without one",
        "not a number",
        "alpha of zero",
        "dora",
        "loha",
        "twice",
        "other network",
        "empty",
    ],
)
def test_refused_in_one_line_and_nothing_changed(case: str, expert: Any) -> None:
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    state, message = broken(known_lora(expert, BLOCK_MODULES))[case]
    with pytest.raises(AdapterError, match=message) as caught:
        fuse(expert, load_adapter(AdapterFile("some.safetensors", state), expert))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("some.safetensors: ")
    assert all(torch.equal(expert.state_dict()[key], before[key]) for key in before)


def test_damaged_and_missing_files(expert: Any, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), good)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not at all")
    pickled = tmp_path / "old.pt"
    torch.save({}, pickled)
    metadata = tmp_path / "metadata.safetensors"
    save_file({"a": torch.ones(1)}, metadata, metadata={"lora_adapter_metadata": "[1"})
    (tmp_path / "empty").mkdir()
    for path, message in (
        (truncated, "get it again"),
        (garbage, "get it again"),
        (pickled, "convert it to safetensors"),
        (metadata, "metadata"),
        (tmp_path / "nowhere.safetensors", "no LoRA file"),
        (tmp_path / "empty", "pass the LoRA file"),
    ):
        with pytest.raises(AdapterError, match=message) as caught:
            read_adapter_file(path)
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)


def test_dora_metadata_is_refused(tmp_path: Path) -> None:
    settings = json.dumps({"transformer.use_dora": True, "transformer.lora_alpha": 4})
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(AdapterError, match="DoRA"):
        read_adapter_file(tmp_path / "x.safetensors")


def test_quantised_weights_are_refused_before_anything_changes(expert: Any) -> None:
    adapter = normalise(FORMATS["1-native-comfyui"](known_lora(expert, BLOCK_MODULES)), expert)
    last = expert.blocks[1].ffn.net[2]
    last.to(torch.float8_e4m3fn)
    before = {key: value.clone() for key, value in expert.state_dict().items()}
    with pytest.raises(AdapterError, match="before quantising"):
        fuse(expert, adapter)
    assert all(torch.equal(expert.state_dict()[key].float(), before[key].float()) for key in before)


def test_names_in_use_are_refused(expert: Any) -> None:
    adapter = normalise({"blocks.0.diff_m": torch.zeros(1, 6, 24)}, expert)
    attach(expert, adapter, name="one")
    for name in ("one", "with.dot"):
        with pytest.raises(AdapterError, match=re.escape(repr(name))):
            attach(expert, adapter, name=name)
