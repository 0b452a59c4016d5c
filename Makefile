# Two commands for a fresh machine: `make demo` and `make test`. Both make .venv and install the project if need be.
#
# Variables, given as `make demo DEMO_IMAGE=photo.jpg`:
#   PYTHON       interpreter that .venv is made with, 3.11 or newer
#   PIP_ARGS     passed to pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu for a CPU build of torch where
#                pip would take the CUDA build (plain pip takes CUDA on Linux, which is right on a machine with an NVIDIA card)
#   DEMO_IMAGE, DEMO_PROMPT, DEMO_OUTPUT
#   CLIPS        folder with INDEX.csv, for make ablation
#   MODEL SIZE DEVICE DOCUMENT   of make ablation: a checkpoint of your own, clips at its size, where, and the file for it
#   PYTEST_ARGS  passed to pytest, e.g. "-m 'not slow'" or tests/test_config.py
#   TEST_PROCESSES  that share the tests, a file to each; 0 for none, with pytest's own output

PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell command -v $(name) 2>/dev/null)))
PIP_ARGS ?=
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
MODEL ?= mini
SIZE ?= 1280x704
DEVICE ?=
DOCUMENT ?= docs/ablation.md
DEMO_IMAGE ?= $(firstword $(sort $(wildcard examples/*.jpg)))
DEMO_PROMPT ?= The camera pans slowly to the right.
DEMO_OUTPUT ?= outputs/demo.mp4

# Extras that the image has (Dockerfile, EXTRAS).
LOCK_EXTRAS := serve postgresql

VENV := .venv
BIN := $(VENV)/bin

# Handed over through the environment, so that a prompt may hold quotes.
export DEMO_IMAGE DEMO_PROMPT DEMO_OUTPUT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint types arrows unit format ablation lock clean

help:
	@echo "make demo    a photo of examples/ becomes $(DEMO_OUTPUT)"
	@echo "make test    lint, types, arrows and unit, as CI runs them"
	@echo "make lint    ruff check and ruff format --check"
	@echo "make types   mypy --strict over src"
	@echo "make arrows  import-linter: which module may import which"
	@echo "make unit    pytest"
	@echo "make format  ruff format and the fixes that ruff is sure of"
	@echo "make ablation CLIPS=DIR  docs/ablation.md, from the clips of DIR/INDEX.csv; of your own checkpoint into a file of"
	@echo "             your own: MODEL=FOLDER SIZE=2560x1408 DEVICE=cuda DOCUMENT=my.md"
	@echo "make lock    requirements.lock, the versions of the container image, anew from pyproject.toml"
	@echo "make clean   remove .venv and the caches of the tools"

demo: $(VENV)/.installed
	@test -n "$$DEMO_IMAGE" || { echo "error: examples/ holds no .jpg; give one with DEMO_IMAGE=photo.jpg" >&2; exit 2; }
	@mkdir -p "$$(dirname "$$DEMO_OUTPUT")"
	$(BIN)/swifti2v generate "$$DEMO_IMAGE" --model mini --prompt "$$DEMO_PROMPT" \
		--output "$$DEMO_OUTPUT" --size 1280x704 --frames 81
	@echo "The video is at $(abspath $(DEMO_OUTPUT))"

test: lint types arrows unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

arrows: $(VENV)/.installed-dev
	$(BIN)/lint-imports

unit: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ablation: $(VENV)/.installed-dev
	@test -n "$(CLIPS)" || { echo "error: give a folder with INDEX.csv and its clips: make ablation CLIPS=DIR" >&2; exit 2; }
	$(BIN)/python -m benchmarks.ablation --clips "$(CLIPS)" --model "$(MODEL)" --size "$(SIZE)" --document "$(DOCUMENT)" \
		$(if $(DEVICE),--device "$(DEVICE)")

# For every platform and Python from 3.11 on, from PyPI alone, whatever indexes this machine is set to.
lock: $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) uv
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(LOCK_EXTRAS)) --universal --python-version 3.11 \
		--default-index https://pypi.org/simple --no-config --no-emit-index-url --upgrade \
		--custom-compile-command "make lock" --output-file requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build src/*.egg-info

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer, or give PYTHON=..." >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; give a newer one with PYTHON=..." >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# The stamps are older than pyproject.toml when the dependencies may have changed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	@touch $@ $(VENV)/.installed
