# Every target sets up what it needs from a bare clone: `make demo`, `make test`. PYTHON chooses the interpreter (3.11+).
PYTHON ?= python3
BIN := .venv/bin
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' circuit_lens/__init__.py)
STAMP := .venv/.installed-$(VERSION)
PARITY_STAMP := .venv-parity/.installed
JOBS ?= 2
PROMPT ?= Fact: the capital of the state containing Dallas is
export OMP_NUM_THREADS ?= 1
PIP := -m pip --disable-pip-version-check -qq

.PHONY: help demo test slow lint types contracts tutorials check format parity bench zoo clean

help:            ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

# torch first and by its exact version: a later package then finds it there and pulls no build for accelerators.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up .venv (a few minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install --constraint constraints.txt torch
	$(BIN)/python $(PIP) install --constraint constraints.txt --editable '.[dev]'
	@rm -f .venv/.installed-*
	@touch $@

demo: $(STAMP)   ## trace the bundled model on one prompt
	$(BIN)/circuit-lens trace "$(PROMPT)"

test: $(STAMP)   ## the tests, but the slow ones
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow and not tutorial"

slow: $(STAMP)   ## the slow tests
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow || test $$? -eq 5

lint: $(STAMP)   ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## pyright
	$(BIN)/pyright

contracts: $(STAMP) ## which room may import which
	$(BIN)/lint-imports

tutorials: $(STAMP) ## execute every notebook
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m tutorial tests/notebooks

check: test lint types contracts tutorials slow ## all that CI runs

$(PARITY_STAMP): benchmarks/requirements-parity.txt
	@echo "Setting up .venv-parity (a few minutes the first time)"
	test -x .venv-parity/bin/python || $(PYTHON) -m venv .venv-parity
	.venv-parity/bin/python $(PIP) install --constraint benchmarks/requirements-parity.txt torch
	.venv-parity/bin/python $(PIP) install --requirement benchmarks/requirements-parity.txt
	@touch $@

parity: $(STAMP) $(PARITY_STAMP) ## compare with circuit-tracer, in an environment of its own
	$(BIN)/python -m benchmarks.parity --peer-python .venv-parity/bin/python

bench: $(STAMP)  ## measure ourselves
	@set -e; for script in $(wildcard benchmarks/bench_*.py); do $(BIN)/python $$script; done

zoo: $(STAMP)    ## train the bundled models and dictionaries again from their seeds
	$(BIN)/python -m circuit_lens.zoo

clean:           ## remove the environments and caches
	rm -rf .venv .venv-parity build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
