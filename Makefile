# Every target sets up what it needs on a fresh machine: a virtual environment in .venv, from python3 >= 3.11.
# To run in an environment of your own that already holds llmc: make test PY=python3

PYTHON     ?= python3
PY         ?= .venv/bin/python
TORCH_ARGS ?=
JOBS       ?= 2
PYTEST_ARGS ?=

OWN_VENV := .venv/bin/python
ifeq ($(PY),$(OWN_VENV))
SETUP := .venv/.stamp
endif
BIN = $(if $(findstring /,$(PY)),$(dir $(PY)),)

export TOKENIZERS_PARALLELISM = false
export HF_HUB_OFFLINE ?= 1

# Each worker keeps to one thread, so that the workers share the cores, and to whole files, so that
# what a file's tests share is made once.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile
LLMC = $(PY) -m llmc.compiler.cli
TEXT := examples/pylm/text/heldout.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all check interop format golden clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

setup: $(SETUP)  ## create .venv and install llmc with all that its tests need

# torch goes first and alone: where no GPU is present it is the version of constraints.txt (TORCH_ARGS may
# name another package index, say one of CPU-only builds); where nvidia-smi works, pip's own choice.
# A torch that brings its own triton keeps it, so the pin of triton is dropped there.
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "llmc needs Python >= 3.11, found $$($(PYTHON) -V 2>&1); name another with make PYTHON=..." >&2; exit 2; }
	@mkdir -p .cache
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	if nvidia-smi >/dev/null 2>&1; then \
	  grep -v -E '^(torch|triton)==' constraints.txt > .cache/constraints.txt; \
	  .venv/bin/python -m pip install -q $(TORCH_ARGS) torch; \
	else \
	  cp constraints.txt .cache/constraints.txt; \
	  .venv/bin/python -m pip install -q $(TORCH_ARGS) "$$(grep '^torch==' constraints.txt)"; \
	fi
	if .venv/bin/python -m pip show -q triton 2>/dev/null; then \
	  grep -v '^triton==' .cache/constraints.txt > .cache/constraints.tmp; \
	  mv .cache/constraints.tmp .cache/constraints.txt; \
	fi
	.venv/bin/python -m pip install -q -e '.[test]' -c .cache/constraints.txt
	@touch .venv/.stamp

# The demo's text is cut from the installed standard library, so it is made here rather than committed.
$(TEXT): examples/make_text.py $(SETUP)
	$(PY) examples/make_text.py --out examples/pylm/text

# The demo model was trained on windows of 512 tokens: see examples/pylm/README.md.
demo: $(SETUP) $(TEXT)  ## compress the demo model, judge it and let it write
	$(LLMC) compile examples/pylm --passes smooth,w4,prune24 --length 512 \
	  --calibration examples/pylm/text/calibration.txt -o out/pylm --force
	$(LLMC) eval out/pylm --baseline examples/pylm --data $(TEXT) --target cpu --window 512 \
	  --max-windows 200 --batch 8
	$(LLMC) run out/pylm --prompt "def main(" --temperature 0.6 --seed 2

test: $(SETUP) $(TEXT)  ## the tests that every change must pass (no GPU, no long suites)
	$(PYTEST) -m "not slow and not gpu" $(PYTEST_ARGS)

test-all: $(SETUP) $(TEXT) check  ## every test that this machine can run
	$(PYTEST) $(PYTEST_ARGS)

# GPTQModel asks for another torch and is only a loader to compare with, so it stays out of the venv.
# Where it cannot be had its rows say so.
GPTQ := gptqmodel==7.7.0 pypcre logbar tokenicer device-smi defuser dill requests urllib3 certifi
.cache/gptqmodel/.stamp: $(SETUP)
	@mkdir -p .cache/gptqmodel
	-BUILD_CUDA_EXT=0 $(PY) -m pip install -q --no-deps --no-build-isolation --upgrade \
	  --target .cache/gptqmodel $(GPTQ)
	@touch $@

interop: $(SETUP) .cache/gptqmodel/.stamp  ## load exports with other people's packages and compare
	OMP_NUM_THREADS=1 $(PY) benchmarks/interop.py

# mypy wants a path on which the package is called llmc, whatever this clone's folder is called.
.cache/types/llmc:
	@mkdir -p .cache/types
	@ln -sfn ../.. .cache/types/llmc

check: $(SETUP) .cache/types/llmc  ## lint, format, types, layers and file sizes
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	MYPYPATH=.cache/types $(PY) -m mypy -p llmc.compiler -p llmc.codegen -p llmc.passes -p llmc.spec
	$(BIN)lint-imports --no-cache
	$(PY) -m pytest -q tests/house/test_size.py

format: $(SETUP)  ## let ruff mend what it can
	$(BIN)ruff check --fix .
	$(BIN)ruff format .

golden: $(SETUP) $(TEXT)  ## rewrite the golden files and the generated pages; read the diff
	$(PYTEST) -m "not slow and not gpu" --update-golden $(PYTEST_ARGS)

clean:  ## remove what make created
	rm -rf .venv .cache out build examples/pylm/text
