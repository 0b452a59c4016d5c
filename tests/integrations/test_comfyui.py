"""The ComfyUI nodes, loaded as ComfyUI loads them, without ComfyUI: from one picture to a file."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v import InvalidInputError, Size, TwoStagePipeline
from swifti2v.memory.limits import MemoryLimits

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
WIDTH, HEIGHT, NUM_FRAMES, SEED, PROMPT = 64, 32, 9, 3, "the camera zooms in"


def load_nodes() -> Any:
    """Import the folder under another name, as ComfyUI does with `custom_nodes`."""
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_swifti2v", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nodes() -> dict[str, Any]:
    return {name: node() for name, node in load_nodes().NODE_CLASS_MAPPINGS.items()}


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, HEIGHT, WIDTH, 3), generator=generator) / 255


@pytest.fixture(scope="module")
def run(nodes: dict[str, Any], picture: torch.Tensor) -> dict[str, Any]:
    """One way through the graph."""
    (pipeline,) = nodes["SwiftI2VLoad"].load("mini", "cpu", "")
    request, motion = nodes["SwiftI2VStageOne"].generate(
        pipeline, picture, PROMPT, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, seed=SEED
    )
    (reference,) = nodes["SwiftI2VReference"].build(pipeline, request, motion, mode="transport", flow_scale=0.5)
    fields = {"steps": 0, "segment_size": 0, "guidance_scale": 0.0}
    frames, fps = nodes["SwiftI2VStageTwo"].refine(pipeline, request, reference, **fields)
    names = {"pipeline": pipeline, "request": request, "motion": motion, "reference": reference}
    return names | {"frames": frames, "fps": fps}


def test_the_fields_are_the_arguments(nodes: dict[str, Any]) -> None:
    """ComfyUI passes each declared field by its name: they must be those of the function, and so many outputs."""
    import inspect

    for node in nodes.values():
        fields = set(node.INPUT_TYPES()["required"])
        assert fields == set(inspect.signature(getattr(node, node.FUNCTION)).parameters)
        assert len(node.RETURN_TYPES) == len(getattr(node, "RETURN_NAMES", ()))
        assert node.CATEGORY == "SwiftI2V"
    assert set(load_nodes().NODE_DISPLAY_NAME_MAPPINGS) == set(nodes)


def test_what_travels_is_images(run: dict[str, Any]) -> None:
    for name in ("motion", "reference", "frames"):
        images = run[name]
        assert images.dtype == torch.float32
        assert images.shape[0] == NUM_FRAMES
        assert images.shape[3] == 3
        assert images.min() >= 0
        assert images.max() <= 1
    assert run["frames"].shape[1:3] == run["reference"].shape[1:3] == (HEIGHT, WIDTH)


def test_the_first_frame_of_the_reference_is_the_picture(run: dict[str, Any], picture: torch.Tensor) -> None:
    torch.testing.assert_close(run["reference"][0], picture[0], atol=1e-6, rtol=0)


def test_the_graph_makes_what_the_pipeline_makes(run: dict[str, Any], picture: torch.Tensor) -> None:
    """Equal but for the rounding of [-1, 1] to [0, 1] and back."""
    image = Image.fromarray((picture[0] * 255).round().to(torch.uint8).numpy())
    options = {"size": Size(WIDTH, HEIGHT), "num_frames": NUM_FRAMES, "seed": SEED, "refiner": "concat"}
    pipeline: TwoStagePipeline = run["pipeline"]
    video = pipeline(image, PROMPT, **options)
    frames = (run["frames"] * 255).round()
    assert (frames - video.frames.float()).abs().max() <= 1
    assert run["fps"] == video.fps


def test_memory_limits_change_nothing(nodes: dict[str, Any], run: dict[str, Any], picture: torch.Tensor) -> None:
    (pipeline,) = nodes["SwiftI2VLoad"].load("mini", "auto" if not torch.cuda.is_available() else "cpu", "8GiB")
    assert pipeline.parts.memory == MemoryLimits(8 << 30)
    _request, motion = nodes["SwiftI2VStageOne"].generate(
        pipeline, picture, PROMPT, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, seed=SEED
    )
    torch.testing.assert_close(motion, run["motion"], atol=1.01 / 255, rtol=0)


def test_choices_reach_stage_two(nodes: dict[str, Any], run: dict[str, Any]) -> None:
    refine, names = nodes["SwiftI2VStageTwo"].refine, ("pipeline", "request", "reference")
    inputs = [run[name] for name in names]
    other, _fps = refine(*inputs, steps=2, segment_size=1, guidance_scale=0.0)
    assert other.shape == run["frames"].shape
    assert not torch.equal(other, run["frames"])


def test_motion_of_other_nodes_is_taken(nodes: dict[str, Any], run: dict[str, Any]) -> None:
    """A shorter clip of another size: the video is as long as it."""
    motion = torch.rand(5, 16, 32, 3, generator=torch.Generator().manual_seed(1))
    inputs = (run["pipeline"], run["request"])
    (reference,) = nodes["SwiftI2VReference"].build(*inputs, motion, mode="replace", flow_scale=0.5)
    frames, _fps = nodes["SwiftI2VStageTwo"].refine(*inputs, reference, steps=0, segment_size=0, guidance_scale=0.0)
    assert frames.shape == (5, HEIGHT, WIDTH, 3)


def test_save_writes_where_comfyui_says(
    nodes: dict[str, Any], run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = types.ModuleType("folder_paths")

    def get_save_image_path(prefix: str, folder: str, width: int, height: int) -> tuple[str, str, int, str, str]:
        assert (prefix, folder, width, height) == ("clips/take", str(tmp_path), WIDTH, HEIGHT)
        (tmp_path / "clips").mkdir()
        return str(tmp_path / "clips"), "take", 7, "clips", prefix

    monkeypatch.setattr(folders, "get_output_directory", lambda: str(tmp_path), raising=False)
    monkeypatch.setattr(folders, "get_save_image_path", get_save_image_path, raising=False)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    shown = nodes["SwiftI2VSave"].save(run["frames"], run["fps"], "clips/take")["ui"]["images"][0]
    assert shown == {"filename": "take_00007_.mp4", "subfolder": "clips", "type": "output"}
    with av.open(tmp_path / "clips" / shown["filename"]) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == NUM_FRAMES
    error = np.abs(np.stack(decoded) - (run["frames"] * 255).numpy()).mean()
    assert error < 12, "H.264 of a noisy picture"


def test_progress_and_interruption(nodes: dict[str, Any], run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ComfyUI is there, its bar is moved at every step, and its stop button stops the run."""
    moves: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int) -> None:
            self.total = total

        def update_absolute(self, value: int, total: int) -> None:
            moves.append((value, total))

    class StopError(Exception):
        pass

    def stop() -> None:
        if len(moves) == 2:
            raise StopError

    comfy, parts = types.ModuleType("comfy"), ("model_management", "utils")
    modules = {name: types.ModuleType(f"comfy.{name}") for name in parts}
    modules["model_management"].throw_exception_if_processing_interrupted = stop  # type: ignore[attr-defined]
    modules["utils"].ProgressBar = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)
    inputs = [run[name] for name in ("pipeline", "request", "reference")]
    with pytest.raises(StopError):
        nodes["SwiftI2VStageTwo"].refine(*inputs, steps=4, segment_size=0, guidance_scale=0.0)
    assert moves == [(1, 4), (2, 4)]


def test_several_pictures_are_not_one(nodes: dict[str, Any], run: dict[str, Any]) -> None:
    pictures = torch.zeros(2, HEIGHT, WIDTH, 3)
    with pytest.raises(InvalidInputError, match="choose one"):
        nodes["SwiftI2VStageOne"].generate(
            run["pipeline"], pictures, "", width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES, seed=0
        )
