"""Checkpoints on the hub: what is asked for, what is left there, and what is said without a network."""

from __future__ import annotations

import shutil
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from swifti2v.errors import CheckpointError
from swifti2v.wan.checkpoint_files import write_checksums
from swifti2v.wan.checkpoints import (
    load_stage_one_pipeline,
    load_stage_two_transformer,
    resolve,
)
from tests.wan.checkpoint_edits import TARGET, edit_index, lora, stored

if TYPE_CHECKING:
    from pathlib import Path


class FakeHub:
    """Stands for the hub: repositories are folders; what does not match the patterns is not there."""

    def __init__(self, cache: Path, repositories: dict[str, Path]) -> None:
        self.cache = cache
        self.repositories = repositories
        self.calls: list[tuple[str, list[str], dict[str, Any]]] = []

    def __call__(self, repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.calls.append((repository, allow_patterns, options))
        source = self.repositories[repository]
        target = self.cache / repository.replace("/", "--")
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()
            if file.is_file() and any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)
        return str(target)


def test_hub_checkpoint_downloads_what_it_needs_and_loads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint / "stage_one" / "huge.bin").write_bytes(b"x")
    (checkpoint / "examples.mp4").write_bytes(b"x")
    hub = FakeHub(tmp_path / "cache", {"someone/tiny": checkpoint})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    write_checksums(checkpoint)

    second = resolve("someone/tiny", parts=["stage_two"], revision="v1", cache_dir=tmp_path, verify=True)
    assert not (second.root / "stage_one").exists()
    assert load_stage_two_transformer(second).config.reference_channels == 48
    assert [options for _, _, options in hub.calls] == [
        {"revision": "v1", "cache_dir": tmp_path, "local_files_only": False}
    ] * 2

    whole = resolve("someone/tiny", local_files_only=True)
    assert hub.calls[-1][2]["local_files_only"]
    load_stage_one_pipeline(whole, dtype=torch.float32)
    names = {path.name for path in whole.root.rglob("*")}
    assert not names & {"huge.bin", "examples.mp4", "stock"}


def test_wan22_preset_asks_for_the_public_repositories(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    names = [f"wan2.2_i2v_A14b_{noise}_noise_lora_rank64_lightx2v_4step_1022.safetensors" for noise in ("high", "low")]
    for seed, name in enumerate(names):
        save_file(lora(seed), loras / name)
    hub = FakeHub(
        tmp_path / "cache",
        {
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers": tiny_checkpoint / "stage_one",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers": tiny_checkpoint / "stock",
            "lightx2v/Wan2.2-Distill-Loras": loras,
        },
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    resolved = resolve("wan2.2")

    asked = {repository: patterns for repository, patterns, _ in hub.calls[:1] + hub.calls[-1:]}
    assert set(asked["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]) == {
        "transformer/*.json",
        "transformer/*.safetensors",
        "vae/*.json",
        "vae/*.safetensors",
    }
    first = asked["Wan-AI/Wan2.2-I2V-A14B-Diffusers"]
    needed = [
        "model_index.json",
        "transformer_2/config.json",
        "tokenizer/spiece.model",
        "text_encoder/model-1.safetensors",
    ]
    for name in needed:
        assert any(fnmatchcase(name, pattern) for pattern in first), name
    for name in ("assets/demo.mp4", "transformer/old.bin", "README.md"):
        assert not any(fnmatchcase(name, pattern) for pattern in first), name
    assert [(repository, patterns) for repository, patterns, _ in hub.calls[1:3]] == [
        ("lightx2v/Wan2.2-Distill-Loras", [name]) for name in names
    ]
    pipeline = load_stage_one_pipeline(resolved, dtype=torch.float32)
    down, up = lora(1).values()
    change = (
        pipeline.transformer_2.get_submodule(TARGET).weight
        - stored(tiny_checkpoint / "stage_one" / "transformer_2")[f"{TARGET}.weight"]
    )
    assert torch.allclose(change, up @ down, atol=1e-5)
    assert load_stage_two_transformer(resolved).config.reference_channels == 0
    assert resolved.index.stage_two.refiner == "training-free"


@pytest.mark.parametrize(("wanted", "other"), [("stage_one", "stage_two"), ("stage_two", "stage_one")])
def test_no_weights_are_downloaded_of_a_stage_that_is_only_described(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, other: Any
) -> None:
    hub = FakeHub(tmp_path / "cache", {"someone/tiny": checkpoint})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    root = resolve("someone/tiny", described=[other]).root
    assert list((root / wanted).rglob("*.safetensors"))
    assert not list((root / other).rglob("*.safetensors"))
    assert (root / "adapters").exists() == (wanted == "stage_one")
    hub.calls.clear()
    with pytest.raises(KeyError):  # the first repository that is not Stage I's, which this hub does not have
        resolve("wan2.2", described=["stage_one"])
    assert [pattern for _, patterns, _ in hub.calls for pattern in patterns if "safetensors" in pattern] == []


def test_hub_index_may_not_name_local_folders(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_index(checkpoint, lambda data: data["stage_two"].update(source="/etc"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(tmp_path / "cache", {"someone/tiny": checkpoint}))
    with pytest.raises(CheckpointError, match="local folder /etc"):
        resolve("someone/tiny")


def test_without_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    # The real client, never asked to leave this machine.
    with pytest.raises(CheckpointError, match=r"someone/missing.*hf download") as caught:
        resolve("someone/missing", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)
