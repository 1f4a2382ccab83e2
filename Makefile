# `make run` and `make test` make the environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-lowest fuzz mutants lint bench clean help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

run: $(READY) ## train and judge the default pair on the embedded model; minutes
	$(BIN)/python -m alignbench run --objective tmpo --sampler dynamic_tree $(ARGS)

test: $(READY) ## the tests, in as many processes as there are cores
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

.PHONY: run test test-lowest fuzz mutants lint bench clean help

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCH := results/benchmarks/benchmarks.json

bench: $(READY) ## speed, by pytest-benchmark; a table and a plot in results/benchmarks/
	@mkdir -p $(dir $(BENCH))
	$(BIN)/python -m pytest -q tests/benchmarks -o addopts=--import-mode=importlib --benchmark-only --benchmark-quiet \
		--benchmark-json=$(BENCH) $(ARGS)
	$(BIN)/python -m tests.benchmarks.table $(BENCH)

clean: ## remove the environments
	rm -rf $(VENV) $(LOWEST)
