# The verbs of rsfast. Everything is installed into $(VENV), nothing outside this folder.

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= dali-cuda13,bench,dev
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torchvision has no build for the PyTorch that the tests use.
NETWORKS_VENV ?= .venv-networks
NETWORKS_BIN := $(NETWORKS_VENV)/bin
NETWORKS_STAMP := $(NETWORKS_VENV)/.installed

.PHONY: setup demo test test-all soak test-gpu check format bench profile figures networks \
	check-networks clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
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

$(NETWORKS_STAMP): pyproject.toml setup.py constraints-networks.txt
	$(PYTHON) -m venv $(NETWORKS_VENV)
	$(NETWORKS_BIN)/pip install --quiet --constraint constraints-networks.txt \
	    --editable . torchvision timm pytest
	touch $@

# Some twenty networks of torchvision and timm, converted, against copies for each resolution.
check-networks: $(NETWORKS_STAMP)
	$(NETWORKS_BIN)/python -m pytest tests/networks

# docs/networks.md: every network of torchvision and timm that converts, and why others do not.
networks: $(NETWORKS_STAMP)
	$(NETWORKS_BIN)/python -m bench.models.networks --output docs/networks.md

clean:
	rm -rf $(VENV) $(NETWORKS_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
