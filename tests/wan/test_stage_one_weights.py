"""Stage I is loaded network by network; what the public repositories hold that tiny checkpoints of ours do not."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from swifti2v.errors import AdapterError, CheckpointError
from swifti2v.wan.checkpoints import load_stage_one_pipeline, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

QUERY = "blocks.0.attn1.to_q.weight"


def recorded(monkeypatch: pytest.MonkeyPatch, network_class: Any, events: list[str]) -> None:
    """Note every loading of a class in `events`, by the name of its folder."""
    load: Callable[..., Any] = network_class.from_pretrained

    def noted(folder: str, **options: Any) -> Any:
        events.append(f"load {Path(folder).name}")
        return load(folder, **options)

    monkeypatch.setattr(network_class, "from_pretrained", noted)


def test_a_network_is_handed_over_with_its_adapters_before_the_next_is_loaded(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for network_class in (WanTransformer3DModel, UMT5EncoderModel):
        recorded(monkeypatch, network_class, events)
    queries: dict[str, torch.Tensor] = {}

    def settle(name: str, network: torch.nn.Module) -> None:
        events.append(f"settle {name}")
        if name.startswith("transformer"):
            queries[name] = network.get_parameter(QUERY).detach().clone()

    pipeline = load_stage_one_pipeline(resolve(tiny_checkpoint), dtype=torch.float32, settle=settle)
    names = ["transformer", "transformer_2", "text_encoder"]
    assert events == [*(f"{verb} {name}" for name in names for verb in ("load", "settle")), "settle vae"]
    for name, query in queries.items():
        assert torch.equal(query, getattr(pipeline, name).get_parameter(QUERY))
        stored = load_file(tiny_checkpoint / "stage_one" / name / "diffusion_pytorch_model.safetensors")
        assert not torch.equal(query, stored[QUERY])


def test_a_wrong_adapter_is_found_before_any_network_is_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint / "adapters" / "low.safetensors"
    save_file(load_file(file) | {"diffusion_model.blocks.9.ffn.0.lora_down.weight": torch.ones(2, 24)}, file)
    events: list[str] = []
    recorded(monkeypatch, WanTransformer3DModel, events)
    with pytest.raises(AdapterError, match=r"low\.safetensors: 1 of 3 keys"):
        load_stage_one_pipeline(resolve(checkpoint))
    assert events == []


def test_the_words_of_the_text_encoder_are_those_of_its_file(checkpoint: Path) -> None:
    """Wan's repositories store `shared.weight` alone, beside a configuration that says the tables are not tied."""
    folder = checkpoint / "stage_one" / "text_encoder"
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    words = weights.pop("encoder.embed_tokens.weight", weights.get("shared.weight"))
    save_file(weights | {"shared.weight": words.clone()}, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32).text_encoder
    assert torch.equal(encoder.encoder.embed_tokens.weight, words)


def test_transformers_that_lose_the_words_are_not_installed() -> None:
    """5.0 to 5.2 leave the encoder's table of such a file empty (transformers #43880); 5.3 was tried and does not."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert not any(requirements["transformers"].contains(version) for version in ("5.0.0", "5.1.0", "5.2.0"))
    assert requirements["transformers"].contains("5.3.0")


def test_networks_of_other_libraries_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "stage_one" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae": ["os", "system"]}))
    with pytest.raises(CheckpointError, match="networks of 'os' are not loaded"):
        load_stage_one_pipeline(resolve(checkpoint))
