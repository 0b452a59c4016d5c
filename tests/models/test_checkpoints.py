"""Checkpoints of tiny random weights, saved by diffusers itself and loaded by the real loaders."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from swifti2v.errors import AdapterError, CheckpointError
from swifti2v.models import checkpoints
from swifti2v.models.checkpoint_files import checksums, write_checksums
from swifti2v.models.checkpoint_index import CheckpointIndex, read_index, write_index
from swifti2v.models.checkpoints import (
    load_stage_one_pipeline,
    load_stage_two_transformer,
    load_stage_two_vae,
    resolve,
)
from swifti2v.models.transformer import StageTwoTransformer

if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = "blocks.0.attn1.to_q"


def lora(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.randn(2, 24, generator=generator),
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": torch.randn(24, 2, generator=generator),
    }


@pytest.fixture(scope="session")
def saved(tiny_checkpoint: Path) -> Path:
    """The checkpoint of all tests; those that change it take a copy (`checkpoint`)."""
    return tiny_checkpoint


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit_index(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((root / "swifti2v.json").read_text())
    change(data)
    (root / "swifti2v.json").write_text(json.dumps(data))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------------------------------ loading


def test_stage_one_is_the_saved_pipeline_with_adapters_fused(saved: Path) -> None:
    pipeline = load_stage_one_pipeline(resolve(saved), dtype=torch.float32)
    assert type(pipeline).__name__ == "WanImageToVideoPipeline"
    assert pipeline.config.boundary_ratio == 0.9
    for name, own, scale in (("transformer", 0, 0.5), ("transformer_2", 1, 1.0)):
        expected = stored(saved / "stage_one" / name)
        for seed, strength in ((own, scale), (2, 1.0)):
            down, up = lora(seed).values()
            expected[f"{TARGET}.weight"] += strength * up @ down
        state = getattr(pipeline, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.allclose(state[key], expected[key], atol=1e-5) for key in expected)
    assert pipeline.vae.dtype == torch.float32


def test_roles_choose_the_adapters(saved: Path) -> None:
    resolved = resolve(saved, parts=["stage_one"])
    plain = load_stage_one_pipeline(resolved, dtype=torch.float32, roles=())
    assert torch.equal(
        plain.transformer.get_submodule(TARGET).weight, stored(saved / "stage_one" / "transformer")[f"{TARGET}.weight"]
    )
    assert checkpoints.apply_adapters(plain, resolved, roles={"low_res"}) == ()
    down, up = lora(2).values()
    change = (
        plain.transformer.get_submodule(TARGET).weight - stored(saved / "stage_one" / "transformer")[f"{TARGET}.weight"]
    )
    assert torch.allclose(change, up @ down, atol=1e-5)


def test_stage_one_runs(saved: Path) -> None:
    from PIL import Image

    pipeline = load_stage_one_pipeline(resolve(saved), dtype=torch.float32)
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


def test_stage_two_loads_what_was_saved(saved: Path) -> None:
    resolved = resolve(saved)
    transformer = load_stage_two_transformer(resolved, dtype=torch.float32)
    assert type(transformer) is StageTwoTransformer
    assert transformer.config.reference_channels == 48
    expected = stored(saved / "stage_two" / "transformer")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in transformer.state_dict().items())
    vae = load_stage_two_vae(resolved)
    assert vae.config.z_dim == 48
    assert all(torch.equal(vae.state_dict()[name], t) for name, t in stored(saved / "stage_two" / "vae").items())
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
    from swifti2v.models.scheduler import FixedSigmaScheduler
    from swifti2v.models.transform_codec import BlockTransformCodec

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
    data["scheduler"] = ["swifti2v.models.scheduler", "FixedSigmaScheduler"]
    path.write_text(json.dumps(data))
    pipeline = load_stage_one_pipeline(resolve(checkpoint), dtype=torch.float32)
    assert list(pipeline.scheduler.config.fixed_sigmas) == [1.0, 0.5]

    data["scheduler"] = ["swifti2v.models.scheduler", "NoSuchScheduler"]
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


WEIGHTS = "diffusion_pytorch_model.safetensors"


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
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setattr(StageTwoTransformer, "from_pretrained", fail)
    with pytest.raises(type(error)) as caught:
        load_stage_two_transformer(resolve(saved), dtype=torch.float32)
    assert caught.value is error


def test_half_matching_adapter_leaves_both_experts_as_they_are(checkpoint: Path) -> None:
    file = checkpoint / "adapters" / "low.safetensors"
    save_file(load_file(file) | {"diffusion_model.blocks.9.ffn.0.lora_down.weight": torch.ones(2, 24)}, file)
    resolved = resolve(checkpoint)
    pipeline = load_stage_one_pipeline(resolved, dtype=torch.float32, roles=())
    with pytest.raises(AdapterError, match=r"low\.safetensors: 1 of 3 keys"):
        checkpoints.apply_adapters(pipeline, resolved)
    kept = stored(checkpoint / "stage_one" / "transformer")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in pipeline.transformer.state_dict().items())


def test_parts_that_were_not_asked_for(saved: Path) -> None:
    resolved = resolve(saved, parts=["stage_two"])
    assert resolved.stage_one is None
    assert resolved.adapters == ()
    with pytest.raises(CheckpointError, match="without stage_one"):
        load_stage_one_pipeline(resolved)


# ------------------------------------------------------------------------------------------------ checksums


def test_checksums_find_any_changed_file(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="no checksums"):
        resolve(checkpoint, verify=True)
    index = write_checksums(checkpoint)
    assert index == read_index(checkpoint / "swifti2v.json")
    assert index.sha256.keys() == {
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    } - {"swifti2v.json"}
    resolve(checkpoint, verify=True)

    for file in (f"stage_one/transformer/{WEIGHTS}", "adapters/small.safetensors", "stage_two/vae/config.json"):
        path = checkpoint / file
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        resolve(checkpoint)
        with pytest.raises(CheckpointError, match=f"{file} differs from its checksum"):
            resolve(checkpoint, verify=True)
        path.write_bytes(kept)
    (checkpoint / "stage_two" / "vae" / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        resolve(checkpoint, verify=True)
    resolve(checkpoint, verify=True, parts=["stage_one"])


# ------------------------------------------------------------------------------------------------ index


def test_index_survives_the_round_trip(saved: Path, tmp_path: Path) -> None:
    index = CheckpointIndex.from_json(json.loads((saved / "swifti2v.json").read_text()))
    assert index.stage_one.adapters[0].scale == 0.5
    assert index.stage_one.few_step_sigmas == (1.0, 0.9375, 5 / 6, 0.625)
    write_index(index, tmp_path / "swifti2v.json")
    assert read_index(tmp_path / "swifti2v.json") == index


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 2, "format is 2.*update"),
        (("stage_two", "neighbours"), 1, "unknown key 'neighbours'"),
        (("stage_one", "adapters", 0, "strength"), 1, "unknown key 'strength'"),
        (("stage_one", "adapters", 0, "expert"), "medium", "medium"),
        (("stage_one", "source"), "somewhere", "somewhere"),
        (("stage_one", "source"), "./../elsewhere", "not a path below"),
        (("stage_one", "adapters", 0, "weight_name"), "/etc/passwd", "not a path below"),
        (("stage_one", "revision"), "main", "revision"),
        (("stage_one", "few_step_sigmas"), [0.5, 0.9], "few_step_sigmas"),
        (("stage_one", "window_frames"), 80, "4k\\+1"),
        (("stage_two", "sigma_start"), 1.5, "sigma_start"),
        (("stage_two", "refiner"), "magic", "magic"),
        (("stage_two", "segment_size"), "3", "segment_size"),
        (("defaults", "fps"), 0, "fps is 0"),
        (("sha256",), {"a": "0"}, "64 hexadecimal"),
    ],
)
def test_index_is_strict(checkpoint: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    def change(data: dict[str, Any]) -> None:
        for step in place[:-1]:
            data = data[step]
        data[place[-1]] = value

    edit_index(checkpoint, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve(checkpoint)
    assert str(checkpoint / "swifti2v.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_with_a_key_given_twice(checkpoint: Path) -> None:
    text = (checkpoint / "swifti2v.json").read_text()
    (checkpoint / "swifti2v.json").write_text('{"format": 1, ' + text[1:])
    with pytest.raises(CheckpointError, match="given twice"):
        resolve(checkpoint)


# ------------------------------------------------------------------------------------------------ hub


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
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    names = [f"wan2.2_i2v_A14b_{noise}_noise_lora_rank64_lightx2v_4step_1022.safetensors" for noise in ("high", "low")]
    for seed, name in enumerate(names):
        save_file(lora(seed), loras / name)
    hub = FakeHub(
        tmp_path / "cache",
        {
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers": saved / "stage_one",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers": saved / "stock",
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
        - stored(saved / "stage_one" / "transformer_2")[f"{TARGET}.weight"]
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


def test_local_index_may_name_local_folders(checkpoint: Path, saved: Path) -> None:
    edit_index(checkpoint, lambda data: data["stage_two"].update(source=str(saved / "stage_two")))
    shutil.rmtree(checkpoint / "stage_two")
    assert resolve(checkpoint).stage_two == saved / "stage_two"


def test_without_network_the_error_says_what_to_do(tmp_path: Path) -> None:
    # The real client, never asked to leave this machine.
    with pytest.raises(CheckpointError, match=r"someone/missing.*hf download") as caught:
        resolve("someone/missing", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(caught.value)


def test_names_that_are_nothing(tmp_path: Path, saved: Path) -> None:
    for name, message in (
        ("no-such-model", r"pass one of .*wan2\.2.*a folder, or OWNER/NAME"),
        (str(tmp_path / "nowhere"), "there is no checkpoint"),
        (tmp_path, "holds no swifti2v.json"),
        (saved / "stage_one", "one model of diffusers"),
    ):
        with pytest.raises(CheckpointError, match=message):
            resolve(name)
    with pytest.raises(CheckpointError, match="revision"):
        resolve(saved, revision="main")


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


def test_checksums_skip_hidden_files(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "lock").write_text("x")
    (tmp_path / "weights").write_text("abc")
    assert checksums(tmp_path) == {"weights": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
