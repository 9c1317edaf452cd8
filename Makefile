# `make demo` and `make test` work in a fresh clone; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# which build of PyTorch: empty = the default, else uv's name for it: cpu, cu126, cu130, rocm6.4 ...
TORCH_BACKEND ?=
BIN := $(VENV)/bin
BACKEND := $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install lint format type test test-slow test-all demo bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## create .venv with everything (TORCH_BACKEND=cpu for a CPU-only PyTorch)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; give one with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
	    && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(BACKEND) -e '.[dev,demo]' \
	    || $(if $(TORCH_BACKEND),{ echo 'TORCH_BACKEND needs uv; see INSTALL.md' >&2; exit 1; },$(BIN)/python -m pip install -e '.[dev,demo]')
	touch $@

lint: $(INSTALLED)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)  ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: $(INSTALLED)  ## check types
	$(BIN)/basedpyright

# one thread each: the tests run side by side, and CPU results do not depend on it
test: $(INSTALLED)  ## run the tests (5 to 6 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(INSTALLED)  ## run those that `make test` leaves out (kills, hosts, Slurm: 30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'slow and not slurm'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slurm  # one cluster at a time on a machine

test-all: test test-slow  ## run all the tests

demo: $(INSTALLED)  ## pre-train, fine-tune and test a tiny model on synthetic videos (8 minutes)
	$(BIN)/python -m demo.end_to_end

bench: $(INSTALLED)  ## measure against targets: loader, shards, copies, long videos, saving, step, features (VIDEOS=folder)
	@status=0; set -x; \
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loader --check $(if $(VIDEOS),--videos $(VIDEOS)) || status=1; \
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.shards --check $(if $(VIDEOS),--videos $(VIDEOS)) || status=1; \
	$(if $(VIDEOS),OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.copies --check --videos $(VIDEOS) || status=1;) \
	$(BIN)/python -m benchmarks.checkpoint --check || status=1; \
	$(BIN)/python -m benchmarks.step --check || status=1; \
	$(BIN)/python -m benchmarks.long_videos --check || status=1; \
	$(BIN)/python -m benchmarks.features --check $(if $(VIDEOS),--videos $(VIDEOS)) || status=1; \
	exit $$status

clean:  ## remove .venv and what make demo wrote, no run of yours
	rm -rf $(VENV) data/synthetic output/demo *.egg-info
