# Two commands do everything: `make train` and `make test`. Each creates the environment it needs.

PYTHON ?= python3
VENV ?= .venv
VERL_VENV ?= .venv-verl
# The CPU build where your package index offers one; set TORCH to what your accelerator wants.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help train compare evidence test test-slow test-verl check format bench docs base-model clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group test --group check --group docs
	touch $@

train: $(INSTALLED)  ## train the shipped model with Knapsack RL and write its report
	$(BIN)/knapsack-rl train

compare: $(INSTALLED)  ## train uniform N, uniform 2N, the paper's rule and the knapsack over three seeds
	$(BIN)/knapsack-rl compare

evidence: $(INSTALLED)  ## run every experiment of the evidence page (hours; goes on where it stopped), write the page
	$(BIN)/knapsack-rl experiment all --output docs/evidence
	$(BIN)/knapsack-rl experiment page

test: $(INSTALLED)  ## run the default test suite
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/python -m pytest -m slow

test-verl: $(VERL_VENV)/.installed  ## run verl itself with the plug-in on the CPU (own environment)
	$(VERL_VENV)/bin/python -m pytest tests/test_verl_contract.py tests/test_verl_real.py -v -W ignore

$(VERL_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(VERL_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VERL_VENV)/bin/python -m pip install --quiet --editable ".[verl]" --group test
	touch $@

check: $(INSTALLED)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure solver, balancer and training step
	@status=0; \
	$(BIN)/python benchmarks/bench_solver.py --check || status=1; \
	$(BIN)/python benchmarks/bench_balance.py || status=1; \
	$(BIN)/python benchmarks/bench_step.py || status=1; \
	exit $$status

docs: $(INSTALLED)  ## build the documentation site
	$(BIN)/mkdocs build --strict

base-model: $(INSTALLED)  ## pre-train the shipped base model again
	$(BIN)/python scripts/pretrain_base.py

clean:  ## remove the environment and build products
	rm -rf $(VENV) $(VERL_VENV) build dist site *.egg-info src/*.egg-info
