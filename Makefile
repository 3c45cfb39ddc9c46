# `make demo` and `make test` set up .venv on first use and then run.
PYTHON ?= python3
# Pinned for development and CI, a CPU build suffices; the package takes any torch from 2.11 on.
TORCH := 2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# How long an OpenMP thread spins before it sleeps. The default, forever, halves the speed of
# everything as soon as two processes share the cores; sleeping at once slows short operations.
export GOMP_SPINCOUNT ?= 3000

# The oldest Transformers that pyproject.toml accepts.
OLDEST_TRANSFORMERS := 5.17.0

.PHONY: demo test test-all test-oldest support-matrix lint bench-cpu clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH) -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/oscar-kv demo

test: $(READY)
	$(BIN)/pytest -n auto

test-all: $(READY)
	$(BIN)/pytest -n auto -m "slow or not slow"

support-matrix: $(READY)
	$(BIN)/python tests/support_matrix.py

test-oldest: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade \
		--target .oldest transformers==$(OLDEST_TRANSFORMERS)
	PYTHONPATH=.oldest $(BIN)/pytest -n auto

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench-cpu: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH) -e ".[dev,peers]"
	$(BIN)/python -m benchmarks.cpu_decode

clean:
	rm -rf $(VENV) .oldest
