"""Checkpoints of tiny random weights, saved by diffusers itself and loaded by the real loaders."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file, save_file

from swifti2v.errors import AdapterError, CheckpointError
from swifti2v.wan import checkpoints
from swifti2v.wan.checkpoint_index import read_index
from swifti2v.wan.checkpoints import (
    load_stage_one_pipeline,
    load_stage_two_transformer,
    load_stage_two_vae,
    resolve,
)
from swifti2v.wan.network_reader import NetworkReader
from swifti2v.wan.transformer import StageTwoTransformer
from tests.wan.checkpoint_edits import TARGET, WEIGHTS, edit_index, lora, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# ------------------------------------------------------------------------------------------------ loading


def test_stage_one_is_the_saved_pipeline_with_adapters_fused(tiny_checkpoint: Path) -> None:
    pipeline = load_stage_one_pipeline(resolve(tiny_checkpoint), dtype=torch.float32)
    assert type(pipeline).__name__ == "WanImageToVideoPipeline"
    assert pipeline.config.boundary_ratio == 0.9
    for name, own, scale in (("transformer", 0, 0.5), ("transformer_2", 1, 1.0)):
        expected = stored(tiny_checkpoint / "stage_one" / name)
        for seed, strength in ((own, scale), (2, 1.0)):
            down, up = lora(seed).values()
            expected[f"{TARGET}.weight"] += strength * up @ down
        state = getattr(pipeline, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.allclose(state[key], expected[key], atol=1e-5) for key in expected)
    assert pipeline.vae.dtype == torch.float32


@pytest.mark.parametrize(("roles", "seeds"), [((), ()), ({"low_res"}, (2,)), ({"few_step"}, (0,))])
def test_roles_choose_the_adapters(tiny_checkpoint: Path, roles: Collection[str], seeds: tuple[int, ...]) -> None:
    pipeline = load_stage_one_pipeline(resolve(tiny_checkpoint), dtype=torch.float32, roles=roles)
    expected = stored(tiny_checkpoint / "stage_one" / "transformer")[f"{TARGET}.weight"]
    for seed in seeds:
        down, up = lora(seed).values()
        expected += (0.5 if seed == 0 else 1.0) * up @ down
    torch.testing.assert_close(pipeline.transformer.get_parameter(f"{TARGET}.weight").detach(), expected)


def test_a_network_is_handed_over_with_its_adapters_before_the_next_is_read(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    queries: dict[str, torch.Tensor] = {}
    fill = NetworkReader.fill

    def noted(reader: NetworkReader, network: Any, folder: Path, adapters: Any = ()) -> None:
        events.append(f"read {folder.name}")
        fill(reader, network, folder, adapters)

    def settle(name: str, network: torch.nn.Module) -> None:
        events.append(f"settle {name}")
        if name.startswith("transformer"):
            queries[name] = network.get_parameter(f"{TARGET}.weight").detach().clone()

    monkeypatch.setattr(NetworkReader, "fill", noted)
    pipeline = load_stage_one_pipeline(resolve(tiny_checkpoint), dtype=torch.float32, settle=settle)
    names = ("transformer", "transformer_2", "text_encoder", "vae")
    assert events == [f"{verb} {name}" for name in names for verb in ("read", "settle")]
    for name, query in queries.items():
        assert torch.equal(query, getattr(pipeline, name).get_parameter(f"{TARGET}.weight"))
        assert not torch.equal(query, stored(tiny_checkpoint / "stage_one" / name)[f"{TARGET}.weight"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_token_table_of_the_text_encoder_is_that_of_its_file(checkpoint: Path, name: str, tied: bool) -> None:
    """Wan's repositories store `shared.weight` alone, beside a configuration that says the tables are not tied."""
    folder = checkpoint / "stage_one" / "text_encoder"
    set_json(folder / "config.json", tie_word_embeddings=tied)
    weights = load_file(folder / "model.safetensors")
    tables = [weights.pop(key) for key in ("shared.weight", "encoder.embed_tokens.weight") if key in weights]
    save_file(weights | {name: tables[0]}, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32).text_encoder
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert torch.equal(encoder.encoder.embed_tokens.weight, tables[0])


def test_transformers_that_lose_the_token_table_are_not_installed() -> None:
    """5.0 to 5.2 leave the encoder's table of such a file empty (transformers #43880); 5.3 was tried and does not."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    requirements = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    assert not any(requirements["transformers"].contains(version) for version in ("5.0.0", "5.1.0", "5.2.0"))
    assert requirements["transformers"].contains("5.3.0")


def test_stage_one_runs(tiny_checkpoint: Path) -> None:
    from PIL import Image

    pipeline = load_stage_one_pipeline(resolve(tiny_checkpoint), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        image=Image.new("RGB", (16, 16)),
        prompt="pan left",
        height=16,
        width=16,
        num_frames=5,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=16,
        output_type="np",
    ).frames
    assert frames.shape == (1, 5, 16, 16, 3)


def test_stage_two_loads_what_was_saved(tiny_checkpoint: Path) -> None:
    resolved = resolve(tiny_checkpoint)
    transformer = load_stage_two_transformer(resolved, dtype=torch.float32)
    assert type(transformer) is StageTwoTransformer
    assert transformer.config.reference_channels == 48
    expected = stored(tiny_checkpoint / "stage_two" / "transformer")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())
    vae = load_stage_two_vae(resolved)
    assert vae.config.z_dim == 48
    assert all(
        torch.equal(vae.state_dict()[name], t) for name, t in stored(tiny_checkpoint / "stage_two" / "vae").items()
    )
    half = load_stage_two_transformer(resolved, dtype=torch.bfloat16)
    assert half.get_submodule(TARGET).weight.dtype == torch.bfloat16
    assert half.scale_shift_table.dtype == torch.float32


def test_stock_wan_weights_load_for_the_training_free_refiner(checkpoint: Path) -> None:
    edit_index(checkpoint, lambda data: data["stage_two"].update(source="./stock", refiner="training-free"))
    transformer = load_stage_two_transformer(resolve(checkpoint, parts=["stage_two"]), dtype=torch.float32)
    assert type(transformer) is StageTwoTransformer
    expected = stored(checkpoint / "stock" / "transformer")
    state = transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert not any(parameter.is_meta for parameter in transformer.parameters())


def test_refiner_must_fit_the_network(checkpoint: Path) -> None:
    resolved = resolve(checkpoint)
    with pytest.raises(CheckpointError, match=r"48 reference channels.*use concat"):
        load_stage_two_transformer(resolved, refiner="training-free")
    with pytest.raises(CheckpointError, match="do not load one"):
        load_stage_two_transformer(resolved, refiner="none")
    edit_index(checkpoint, lambda data: data["stage_two"].update(source="./stock"))
    with pytest.raises(CheckpointError, match=r"0 reference channels.*use training-free"):
        load_stage_two_transformer(resolve(checkpoint), refiner="concat")


def test_own_classes_in_both_stages(checkpoint: Path) -> None:
    from swifti2v.mini.transform_codec import BlockTransformCodec
    from swifti2v.schedulers import FixedSigmaScheduler

    shutil.rmtree(checkpoint / "stage_two" / "vae")
    codec = BlockTransformCodec(band_channels=(2, 1, 1, 1))
    codec.scale.fill_(3.0)
    codec.save_pretrained(checkpoint / "stage_two" / "vae")
    loaded = load_stage_two_vae(resolve(checkpoint))
    assert isinstance(loaded, BlockTransformCodec)
    assert bool((loaded.scale == 3).all())

    FixedSigmaScheduler(fixed_sigmas=[1.0, 0.5]).save_pretrained(checkpoint / "stage_one" / "scheduler")
    path = checkpoint / "stage_one" / "model_index.json"
    data = json.loads(path.read_text())
    data["scheduler"] = ["swifti2v.schedulers", "FixedSigmaScheduler"]
    path.write_text(json.dumps(data))
    pipeline = load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32)
    assert list(pipeline.scheduler.config.fixed_sigmas) == [1.0, 0.5]

    data["scheduler"] = ["swifti2v.schedulers", "NoSuchScheduler"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="NoSuchScheduler"):
        load_stage_one_pipeline(resolve(checkpoint))


def test_sharded_weights_and_a_lost_shard(checkpoint: Path) -> None:
    folder = checkpoint / "stage_two" / "transformer"
    network = load_stage_two_transformer(resolve(checkpoint), dtype=torch.float32)
    shutil.rmtree(folder)
    network.save_pretrained(folder, max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    again = load_stage_two_transformer(resolve(checkpoint), dtype=torch.float32)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in network.state_dict().items())
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_stage_two_transformer(resolve(checkpoint))


# ------------------------------------------------------------------------------------------------ damaged


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def rename_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["another.weight"] = tensors.pop(min(tensors))
    save_file(tensors, path)


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load_part_of(root: Path, file: str) -> None:
    resolved = resolve(root)
    if file.startswith("stage_two/transformer"):
        load_stage_two_transformer(resolved)
    elif file.startswith("stage_two/vae"):
        load_stage_two_vae(resolved)
    else:
        load_stage_one_pipeline(resolved)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (f"stage_one/transformer_2/{WEIGHTS}", truncate, f"{WEIGHTS}.*cut short"),
        (f"stage_one/transformer/{WEIGHTS}", Path.unlink, "stage_one/transformer holds no weights"),
        (f"stage_one/transformer/{WEIGHTS}", rename_tensor, r"1 missing, 1 without a place.*another\.weight"),
        (f"stage_one/vae/{WEIGHTS}", lambda path: path.write_bytes(b"garbage!"), "stage_one/vae"),
        ("stage_one/text_encoder/model.safetensors", truncate, "text_encoder"),
        ("stage_one/text_encoder/model.safetensors", rename_tensor, "text_encoder.*another.weight"),
        ("stage_one/tokenizer", shutil.rmtree, "names tokenizer"),
        ("stage_one/transformer/config.json", Path.unlink, "stage_one"),
        ("stage_one/transformer/config.json", lambda path: set_json(path, ffn_dim=64), "stage_one"),
        ("stage_one/model_index.json", Path.unlink, "model_index.json"),
        ("stage_one/model_index.json", lambda path: path.write_text("{"), "model_index.json is not JSON"),
        ("stage_one/model_index.json", lambda path: set_json(path, _class_name="WanPipeline"), "is of a WanPipeline"),
        ("stage_one/model_index.json", lambda path: set_json(path, vae=["os", "system"]), "networks of 'os' are not"),
        ("stage_one", shutil.rmtree, r"no folder .*stage_one"),
        ("adapters/low.safetensors", truncate, "low.safetensors"),
        ("adapters/low.safetensors", Path.unlink, "low.safetensors"),
        ("adapters/low.safetensors", lambda path: save_file({"x.lora_up.weight": torch.ones(1, 1)}, path), "low.saf"),
        (f"stage_two/transformer/{WEIGHTS}", truncate, "stage_two/transformer.*cut short"),
        (f"stage_two/transformer/{WEIGHTS}", rename_tensor, "another.weight"),
        ("stage_two/transformer/config.json", lambda path: set_json(path, in_channels=95), "stage_two/transformer"),
        ("stage_two/transformer/config.json", lambda path: set_json(path, _class_name="FluxX"), "is of a FluxX"),
        (f"stage_two/vae/{WEIGHTS}", rename_tensor, "another.weight"),
        ("stage_two/vae/config.json", lambda path: set_json(path, _class_name="os.system"), "is of a os.system"),
        ("stage_two/vae", shutil.rmtree, "stage_two/vae"),
        ("swifti2v.json", Path.unlink, "holds no swifti2v.json; pass the folder"),
        ("swifti2v.json", truncate, "swifti2v.json is not JSON"),
    ],
)
def test_damage_is_named(checkpoint: Path, file: str, damage: Callable[[Path], object], message: str) -> None:
    damage(checkpoint / file)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_part_of(checkpoint, file)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AdapterError) or not file.startswith("adapters") or damage is Path.unlink
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), torch.AcceleratorError("CUDA error: unknown error")])
def test_what_the_device_says_is_not_the_fault_of_the_files(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr("swifti2v.wan.network_reader.safe_open", fail)
    with pytest.raises(type(error)) as caught:
        load_stage_two_transformer(resolve(tiny_checkpoint), dtype=torch.float32)
    assert caught.value is error


def test_a_half_matching_adapter_is_found_before_any_weight_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = checkpoint / "adapters" / "low.safetensors"
    save_file(load_file(file) | {"diffusion_model.blocks.9.ffn.0.lora_down.weight": torch.ones(2, 24)}, file)
    monkeypatch.setattr(NetworkReader, "fill", lambda *_: pytest.fail("read"))
    with pytest.raises(AdapterError, match=r"low\.safetensors: 1 of 3 keys"):
        load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32)


def test_parts_that_were_not_asked_for(tiny_checkpoint: Path) -> None:
    resolved = resolve(tiny_checkpoint, parts=["stage_two"])
    assert resolved.stage_one is None
    assert resolved.adapters == ()
    with pytest.raises(CheckpointError, match="without stage_one"):
        load_stage_one_pipeline(resolved)


# ------------------------------------------------------------------------------------------------ names


def test_local_index_may_name_local_folders(checkpoint: Path, tiny_checkpoint: Path) -> None:
    edit_index(checkpoint, lambda data: data["stage_two"].update(source=str(tiny_checkpoint / "stage_two")))
    shutil.rmtree(checkpoint / "stage_two")
    assert resolve(checkpoint).stage_two == tiny_checkpoint / "stage_two"


def test_names_that_are_nothing(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for name, message in (
        ("no-such-model", r"pass one of .*wan2\.2.*a folder, or OWNER/NAME"),
        (str(tmp_path / "nowhere"), "there is no checkpoint"),
        (tmp_path, "holds no swifti2v.json"),
        (tiny_checkpoint / "stage_one", "one model of diffusers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve(name)
    with pytest.raises(CheckpointError, match="revision"):
        resolve(tiny_checkpoint, revision="main")


def test_presets_are_package_folders() -> None:
    assert "wan2.2" in checkpoints.preset_names()
    for name in checkpoints.preset_names():
        root = Path(checkpoints.__file__).parents[1] / "presets" / name
        index = read_index(root / "swifti2v.json")
        assert index.name == name
        if index.stage_one.source.startswith("./"):
            assert resolve(name).root == root


def test_a_new_preset_is_found_by_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_presets", lambda: tmp_path)
    checkpoint.rename(tmp_path / "mini")
    resolved = resolve("mini", verify=False)
    assert resolved.root == tmp_path / "mini"
    assert resolved.adapters[0] == tmp_path / "mini" / "adapters" / "high.safetensors"
    assert resolve(tmp_path / "mini" / "swifti2v.json").root == tmp_path / "mini"
