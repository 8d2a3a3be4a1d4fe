# What to do with a checkout. Needs python3.11 (or later) and make; everything else goes into .venv.
#
#   make up                        the whole mesh, with the demo model
#   make up ARGS="--workers 2"     the same with options of `interlock up`
#   INTERLOCK_HOME=/tmp/mesh make up

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PROTOS_VENV := .venv-protos
PROTOS_BIN := $(PROTOS_VENV)/bin

# A stamp says that its environment was made from the files it depends on, and is touched last of all.
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PROTOS := $(PROTOS_VENV)/.installed

# protoc finds its plugin for type stubs by the search path.
GENERATE := PATH="$(CURDIR)/$(PROTOS_BIN):$$PATH" $(PROTOS_BIN)/python protos/generate.py

# The examples in JavaScript run with the machine's Node, or with one that pip brings.
NODE_GROUP := $(shell command -v node >/dev/null || echo --group node)

PIP := $(BIN)/python -m pip --disable-pip-version-check
# Dependency groups need a newer pip than Python 3.11 brings.
PIP_VERSION := $(shell sed -n 's/^pip==//p' constraints.txt)

.PHONY: help
help: ## This list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Interlock needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet "pip==$(PIP_VERSION)"
	$(PIP) install --constraint constraints.txt --editable ".[all]"
	@touch $@

$(DEV): $(RUNTIME)
	$(PIP) install --constraint constraints.txt --editable ".[all]" --group dev $(NODE_GROUP)
	@touch $@

$(PROTOS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PROTOS_VENV)
	$(PROTOS_BIN)/python -m pip --disable-pip-version-check install --quiet "pip==$(PIP_VERSION)"
	$(PROTOS_BIN)/python -m pip --disable-pip-version-check install --group protos
	@touch $@

.PHONY: install
install: $(DEV) ## Make .venv with everything, tools included

# `exec` makes Ctrl-C and SIGTERM reach the mesh itself; make then has nothing left to do but wait.
.PHONY: up
up: $(RUNTIME) ## Start the whole mesh; Ctrl-C stops it
	@exec $(BIN)/interlock up $(ARGS)

.PHONY: down
down: $(RUNTIME) ## Stop the mesh
	@exec $(BIN)/interlock down

# Two tests at a time where none needs the machine for itself; a whole mesh does.
.PHONY: test
test: $(DEV) ## Run every test, or those that ARGS name
ifeq ($(strip $(ARGS)),)
	$(BIN)/pytest --numprocesses 2 tests/unit tests/contract tests/integration
	$(BIN)/pytest tests/e2e tests/cuda
else
	$(BIN)/pytest $(ARGS)
endif

.PHONY: soak
soak: $(DEV) ## Random histories of the queue and the engine, an absent or killed controller, what dies in a rollout, requests of the OpenAPI document, rollouts: longer than in `make test`
	INTERLOCK_SOAK_FACTOR=6 $(BIN)/pytest tests/integration/test_queue_properties.py \
		tests/integration/test_queue_simulation.py tests/integration/test_engine_properties.py \
		tests/integration/test_engine_load.py tests/integration/test_engine_exactness.py \
		tests/e2e/test_absent_controller.py tests/e2e/test_controller_killed.py \
		tests/e2e/test_rollout_faults.py tests/e2e/test_rollouts.py $(ARGS)
	INTERLOCK_OPENAPI_CASES=2000 $(BIN)/pytest tests/integration/test_openapi.py $(ARGS)
	INTERLOCK_ROLLOUT_EXAMPLES=100000 $(BIN)/pytest tests/unit/controller/test_rollout_properties.py \
		tests/unit/controller/test_rollout_looks.py --timeout 7200 $(ARGS)

.PHONY: lint
lint: $(DEV) $(PROTOS) ## Style, layers, protos, and that generated files are fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(GENERATE) --check
	@mkdir -p build
	$(GENERATE) --image build/interlock-image.binpb
	$(BIN)/buf lint build/interlock-image.binpb --config buf.yaml
	$(BIN)/python -m deploy.envoy.generate --check

.PHONY: types
types: $(DEV) ## Check types
	$(BIN)/mypy

.PHONY: envoy
envoy: $(DEV) ## Make every committed Envoy configuration
	$(BIN)/python -m deploy.envoy.generate --shipped

.PHONY: protos
protos: $(PROTOS) ## Make the stubs and Envoy's descriptor set from the protos
	$(GENERATE)
