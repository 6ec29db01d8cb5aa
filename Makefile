# Headstart. `make help` lists the targets. Overrides pass through: make compile model=llama3-8b quant=int8
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:

PYTHON ?= python3
VENV   ?= .venv
# PyPI's torch for Linux x86-64 carries CUDA (gigabytes). For the small CPU build:
#   make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH  ?= torch==2.13.0
EXTRAS ?= compile,cuda,bench,dev

BIN   := $(VENV)/bin
READY := $(VENV)/.headstart-ready
# Every key=value on the command line that is not one of the variables above is an override for the program.
OVERRIDES := $(filter-out PYTHON=% VENV=% TORCH=% EXTRAS=%,$(MAKEOVERRIDES))

# A bare GPU machine has a Python with torch and triton, no network and no .venv: there a bundle brings what is missing.
BUNDLE     := .gpu-bundle
SITE       := $(CURDIR)/.gpu-site
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
define bundled
if [ ! -x $(BIN)/python ] && [ -d $(BUNDLE) ]; then
  export PYTHONPATH="$(SITE)$${PYTHONPATH:+:$$PYTHONPATH}"
  $(PYTHON) -m bench.gpu.wheels $(BUNDLE) $(SITE) ~/.cache/headstart
fi
endef

.PHONY: help setup check format test test-slow compile tune serve bench gpu gpu-bundle peers clean

help:
	sed -n 's/^## //p' $(firstword $(MAKEFILE_LIST))

## setup      virtual environment in .venv with everything needed to compile, serve, bench and develop
setup: $(READY)

$(READY): pyproject.toml
	command -v $(PYTHON) >/dev/null || { echo "setup: $(PYTHON) not found; install Python >= 3.11 (Debian: apt-get install python3 python3-venv)" >&2; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $$($(PYTHON) -V) is too old; set PYTHON=python3.11 or newer" >&2; exit 2; }
	command -v "$${CXX:-c++}" >/dev/null || { echo "setup: no C++ compiler ($${CXX:-c++}); the CPU target needs one (Debian: apt-get install g++)" >&2; exit 2; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { echo "setup: cannot make a virtual environment (Debian: apt-get install python3-venv)" >&2; exit 2; }
	echo "setup: installing into $(VENV) (a minute or two)" >&2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	touch $@

## check      formatting, lint and types
check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

## test       all tests that are fast and need no GPU
test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile  # a file's tests share what it compiled

## test-slow  the tests marked slow (CI runs them too)
test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not gpu and not soak'

## compile    make compile model=smollm-135m weights=random quant=int8 …  prints the artifact's path
compile: setup
	$(BIN)/python -m compiler $(OVERRIDES)

## tune       make tune model=llama3-8b target=h200 [limit=9]: measures kernels on this GPU into kernels/tuned/
tune: $(if $(wildcard $(BUNDLE)),,setup)
	$(bundled)
	$(GPU_PYTHON) -m compiler.tune $(OVERRIDES)

## serve      compile and serve the embedded tiny model, or make serve artifact=artifacts/… port=30000
serve: setup
	if [[ " $(OVERRIDES)" == *" artifact="* ]]; then
	  exec $(BIN)/python -m runtime.serve $(OVERRIDES)
	fi
	artifact=$$($(BIN)/python -m compiler model=tiny | tail -n 1)
	echo
	echo "try:  curl -s http://127.0.0.1:$(or $(port),30000)/generate -H 'content-type: application/json' -d '{\"text\": \"The compiler\", \"sampling_params\": {\"max_new_tokens\": 48, \"temperature\": 0}}'"
	echo
	exec $(BIN)/python -m runtime.serve artifact=$$artifact $(OVERRIDES)

## bench      single-batch latency of an artifact: make bench artifact=artifacts/… batch=[1,8]
bench: setup
	$(BIN)/python -m bench.latency $(OVERRIDES)

## gpu        everything that needs an NVIDIA GPU, in eight minutes: correctness, measurements, tuning (no network)
gpu:
	$(bundled)
	$(GPU_PYTHON) -m bench.gpu $(OVERRIDES)

## gpu-bundle what `make gpu` and `make tune` need on a bare GPU machine, into .gpu-bundle/: wheels, built kernels
gpu-bundle: setup
	$(BIN)/python -m bench.gpu.bundle $(OVERRIDES)

## peers      build llama.cpp for this machine into .peers/ (minutes; needs cmake), for python -m bench.peers
peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[peers]'
	$(PYTHON) -m venv .peers/venv
	CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_BLAS=OFF -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-include $(CURDIR)/bench/peers/gcc_amx.h'" \
	CMAKE_BUILD_PARALLEL_LEVEL=2 nice .peers/venv/bin/python -m pip install --quiet llama-cpp-python==0.3.36

## clean      remove build products (not the virtual environment, not artifacts)
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
