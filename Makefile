# The verbs of rsfast. Everything is installed into $(VENV), nothing outside this folder.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dali-cuda13,export,openvino,parquet,serve,bench,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Another PyTorch, built with CUDA, which needs no GPU to be installed; torchvision fits it.
CUDA_BUILD_VENV ?= .venv-cuda-build
CUDA_BUILD_BIN := $(CUDA_BUILD_VENV)/bin
CUDA_BUILD_STAMP := $(CUDA_BUILD_VENV)/.installed
# Not from an index of CPU builds, which the first environment may have been made with.
CUDA_BUILD_PIP := env --unset=PIP_EXTRA_INDEX_URL $(CUDA_BUILD_BIN)/pip install --quiet \
	--constraint constraints-cuda-build.txt
EXTENSION_STAMP := $(CUDA_BUILD_VENV)/.extension
PRETENDED := $(CUDA_BUILD_BIN)/python tests/without_gpu/pretended.py

.PHONY: setup demo test test-all test-cuda-build soak test-gpu check format bench profile figures \
	networks check-networks memory clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt constraints-common.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

# A ResNet-18 at five small resolutions on generated JPEGs, then its accuracy at those and others.
demo: setup
	rm -rf runs/demo
	$(BIN)/python -m rsfast.train --arch resnet18 --output runs/demo
	$(BIN)/python -m rsfast.evaluate runs/demo/model_best.pt --resolutions 48:96:6

# In two processes of one thread each.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# Minutes on two cores: what takes more than ten seconds is left to test-all.
test: setup
	$(PYTEST) -m "not gpu and not slow"

test-all: setup
	$(PYTEST) -m "not gpu"

# Kills a run at random moments, RSFAST_SOAK_KILLS times (100), and compares it with a whole one.
soak: setup
	$(BIN)/python -m pytest -s tests/soak.py

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Times of each shape, also as JSON; `python -m bench.ops` interleaves them (CONTRIBUTING.md).
bench: setup
	mkdir -p .benchmarks
	$(BIN)/python -m pytest bench/ --benchmark-only --benchmark-json=.benchmarks/last.json

# Nsight Systems over five steps on random images; needs a GPU and nsys.
profile: setup
	rm -rf runs/profile && mkdir -p runs/profile
	nsys profile --capture-range=cudaProfilerApi --trace=cuda,nvtx,cudnn,cublas \
	    --output runs/profile/report $(BIN)/python -m rsfast.train --arch resnet50 \
	    --loader synthetic --batch-size 128 --epochs 1 --steps-per-epoch 30 \
	    --profile 20:25 --no-graph --output runs/profile/run

# Every picture of committed results, again from the CSV and JSON files beside it.
figures: setup
	$(BIN)/python -m rsfast.figures bench/results
	for picture in bench/results/*/plots.png; do \
	    $(BIN)/python -m bench.support.plots $$(dirname $$picture) || exit 1; \
	done

$(CUDA_BUILD_STAMP): pyproject.toml setup.py constraints-cuda-build.txt constraints-common.txt
	$(PYTHON) -m venv $(CUDA_BUILD_VENV)
	$(CUDA_BUILD_PIP) 'setuptools>=77' wheel torch torchvision timm onnx onnxscript \
		onnxruntime pytest pytest-xdist hypothesis
	RSFAST_BUILD_CUDA=0 $(CUDA_BUILD_PIP) --no-build-isolation --editable .
	touch $@

$(EXTENSION_STAMP): $(CUDA_BUILD_STAMP) $(wildcard csrc/*)
	RSFAST_BUILD_CUDA=1 $(CUDA_BUILD_PIP) --no-build-isolation --no-deps --editable .
	touch $@

# What depends on PyTorch's version or build: steps on a pretended GPU, the extension, and the tests
# of kernels, pyramids and the step. Needs nvcc and g++, and no GPU.
test-cuda-build: $(EXTENSION_STAMP)
	$(PRETENDED) pytest tests/without_gpu tests/bench/models/test_memory.py
	$(CUDA_BUILD_BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow" \
	    tests/csrc tests/engine tests/kernels tests/models tests/pyramid \
	    tests/test_backends.py tests/test_golden.py tests/test_import.py tests/test_losses.py

# docs/memory.md: what a training step of each network keeps in memory, modelled.
memory: $(CUDA_BUILD_STAMP)
	$(PRETENDED) bench.models.memory --output docs/memory.md

# Some twenty networks of torchvision and timm, converted, against copies for each resolution.
check-networks: $(CUDA_BUILD_STAMP)
	$(CUDA_BUILD_BIN)/python -m pytest tests/networks

# docs/networks.md: every network of torchvision and timm that converts, and why others do not.
networks: $(CUDA_BUILD_STAMP)
	$(CUDA_BUILD_BIN)/python -m bench.models.networks --output docs/networks.md

clean:
	rm -rf $(VENV) $(CUDA_BUILD_VENV) rsfast/_C*.so build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
