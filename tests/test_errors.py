"""One tree of exceptions, and each is what the standard library would have raised in its place."""

from __future__ import annotations

import inspect

import pytest

from swifti2v import errors

EXPECTED = {
    "SwiftI2VError": Exception,
    "InvalidInputError": ValueError,
    "ImageInputError": ValueError,
    "VideoInputError": ValueError,
    "ConfigurationError": ValueError,
    "CheckpointError": ValueError,
    "AdapterError": ValueError,
    "OutputError": OSError,
    "WorkDirectoryError": ValueError,
    "LatentCacheError": ValueError,
    "TrainingError": RuntimeError,
    "JobError": LookupError,
    "QueueFullError": RuntimeError,
    "MemoryBudgetError": ValueError,
    "DeviceLostError": RuntimeError,
    "GenerationCancelled": Exception,
}
CLASSES = dict(inspect.getmembers(errors, inspect.isclass))


def test_every_error_is_listed_here():
    assert set(CLASSES) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_each_error_is_of_the_tree_and_of_its_standard_parent(name):
    error = CLASSES[name]("message")
    assert isinstance(error, errors.SwiftI2VError)
    assert isinstance(error, EXPECTED[name])
    assert str(error) == "message"
    assert inspect.getdoc(CLASSES[name])


@pytest.mark.parametrize("name", ["ImageInputError", "VideoInputError"])
def test_errors_of_files_are_errors_of_input(name):
    assert issubclass(CLASSES[name], errors.InvalidInputError)


def test_a_half_matching_lora_is_an_error_of_a_checkpoint():
    assert issubclass(errors.AdapterError, errors.CheckpointError)


def test_a_cancelled_run_is_not_taken_for_bad_input():
    assert not issubclass(errors.GenerationCancelled, (ValueError, OSError))


def test_the_module_imports_nothing():
    assert [name for name, value in vars(errors).items() if inspect.ismodule(value)] == []
