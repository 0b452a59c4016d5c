"""The public interface, pinned: a name is added or taken away on purpose, here and in the changelog."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import swifti2v
from swifti2v import errors

PUBLIC = [
    "AdapterError",
    "CheckpointError",
    "ConfigurationError",
    "DeviceLostError",
    "GenerationCancelled",
    "GenerationSettings",
    "ImageInputError",
    "InvalidInputError",
    "JobError",
    "LatentCacheError",
    "MemoryBudgetError",
    "OutputError",
    "QueueFullError",
    "Size",
    "StageTwoTransformer",
    "SwiftI2VError",
    "TrainingError",
    "TwoStagePipeline",
    "Video",
    "VideoInputError",
    "VideoRefiner",
    "WorkDirectoryError",
    "__version__",
]


def test_public_names_are_these() -> None:
    assert swifti2v.__all__ == PUBLIC
    assert dir(swifti2v) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_can_be_had(name: str) -> None:
    assert getattr(swifti2v, name) is not None
    assert name in swifti2v.__dict__


def test_every_error_is_public_and_in_one_tree() -> None:
    for name, value in vars(errors).items():
        if isinstance(value, type):
            assert issubclass(value, errors.SwiftI2VError)
            assert getattr(swifti2v, name) is value


def test_errors_are_also_the_standard_ones() -> None:
    """A caller who knows nothing of this package catches what he expects."""
    assert issubclass(errors.InvalidInputError, ValueError)
    assert issubclass(errors.CheckpointError, ValueError)
    assert issubclass(errors.OutputError, OSError)


def test_unknown_names_fail_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match="'swifti2v' has no attribute 'Nonsense'"):
        swifti2v.Nonsense  # noqa: B018 - the access is the test


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, swifti2v; print([m for m in ('torch', 'diffusers', 'numpy', 'yaml', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600)  # noqa: S603 - our own code
    assert result.stdout.strip() == "[]"


def test_version_is_that_of_the_project() -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert swifti2v.__version__ == tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"]


def test_types_are_shipped() -> None:
    spec = find_spec("swifti2v")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file()
