# Everything runs in .venv; `make setup PYTHON=python3.12` picks another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup
BENCH ?= stream --quick
VARIANT ?= cpu
IMAGE ?= streamcl
VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' streamcl/__init__.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench generate tools dist image peers browser clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with everything in it, at the versions of requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make setup PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[demo,bench,dev]' --constraint requirements.lock
	@touch $@

demo: setup ## Show a model that learns from a stream, loses its process and goes on
	$(BIN)/streamcl demo

test: setup tools ## Run the tests
	$(BIN)/python -m pytest

lint: setup ## Check style, types and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint deploy/docker/Dockerfile; else echo "hadolint has no wheel for this platform: skipped"; fi

bench: setup ## Run a benchmark: make bench BENCH='stream --json'
	$(BIN)/streamcl bench $(BENCH)

generate: setup ## Write what of helm/, deploy/ and docs/ follows from the code
	$(BIN)/python -m deploy
	$(BIN)/python -m deploy.chart

tools: setup ## Build Helm and compose's loader into build/tools, for the tests; needs Go
	@$(BIN)/python -m deploy.go_tools

dist: setup ## Build sdist and wheel into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

image: setup ## Build the image: make image VARIANT=cuda IMAGE=registry/streamcl
	docker build --file deploy/docker/Dockerfile --build-arg VERSION=$(VERSION) \
		$(if $(filter cuda,$(VARIANT)),--build-arg TORCH=cu130) --tag $(IMAGE):$(VERSION)$(filter -cuda,-$(VARIANT)) .

peers: ## Make .venv-peers with the engines that `bench worker` compares with: their dependencies and ours conflict
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet quixstreams==3.28.1 bytewax==0.21.1 faust-streaming==0.15.3 \
		$$(grep -E '^(numpy|orjson|torch)==' requirements.lock)

browser: ## Install the browser that tests look at the status page with; Debian and its kin, as root
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { apt-get update -qq \
		&& DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; }

clean: ## Remove caches and what the demo and builds left; .venv stays
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist demo-out
	find streamcl connectors deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
