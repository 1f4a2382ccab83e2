# `make run` and `make test` create the environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run test test-lowest fuzz mutants lint bench docs clean help

help: ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

run: $(READY) ## train and evaluate the default pair on the embedded model (takes minutes)
	$(BIN)/python -m alignbench run --objective tmpo --sampler dynamic_tree $(ARGS)

test: $(READY) ## run the tests, in as many processes as there are cores
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)

LOWEST := .venv-lowest

test-lowest: ## run the tests with the oldest dependencies that pyproject.toml allows, in a separate environment
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct --editable ".[dev]"
	$(LOWEST)/bin/python -m pytest -q -n auto --dist loadfile $(ARGS)

fuzz: $(READY) ## run the property tests with many new random examples
	$(BIN)/python -m pytest -q -n auto $$(find tests -name 'test_properties_*.py') --hypothesis-profile=fuzz --timeout=0 $(ARGS)

mutants: $(READY) ## mutation testing: break one place at a time in a copy of the tree, and check that a test fails
	$(BIN)/python -m tests.support.mutants $(ARGS)

lint: $(READY) ## run ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

BENCH := results/benchmarks/benchmarks.json

bench: $(READY) ## run the speed benchmarks; writes a table and a plot into results/benchmarks/
	@mkdir -p $(dir $(BENCH))
	$(BIN)/python -m pytest -q tests/benchmarks -o addopts=--import-mode=importlib --benchmark-only --benchmark-quiet \
		--benchmark-json=$(BENCH) $(ARGS)
	$(BIN)/python -m tests.benchmarks.table $(BENCH)

DOCS := .venv-docs

docs: ## build the docs site into site/ and check its links, in a separate environment without torch
	$(PYTHON) -m venv $(DOCS)
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
		| $(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict $(ARGS)
	$(DOCS)/bin/python docs/site/check_links.py site

clean: ## remove the environments
	rm -rf $(VENV) $(LOWEST) $(DOCS)
