# Two commands do everything: `make train` and `make test`. Each creates the environment it needs.

PYTHON ?= python3
VENV ?= .venv
VERL_VENV ?= .venv-verl
TRL_VENV ?= .venv-trl
ENGINES_VENV ?= .venv-engines
TINKER_VENV ?= .venv-tinker
# SkyRL's Tinker server needs 3.12.
TINKER_PYTHON ?= python3.12
MINIMAL_VENV ?= .venv-minimal
PYTHON_VENV ?= .venv-python
# The CPU build where your package index offers one; set TORCH to what your accelerator wants.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help train compare evidence test test-slow test-trl-range test-verl test-engines test-tinker test-minimal test-python package check format bench conformance fuzz kill docs base-model clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[all]" --group test --group package --group check --group docs --group experiments
	touch $@

train: $(INSTALLED)  ## train the shipped model with Knapsack RL and write its report
	$(BIN)/knapsack-rl train

compare: $(INSTALLED)  ## train uniform N, uniform 2N, the paper's rule and the knapsack over three seeds
	$(BIN)/knapsack-rl compare

evidence: $(INSTALLED)  ## run every experiment of the evidence page (hours; continues where it stopped), fill in the page
	$(BIN)/python -m experiments all --output docs/evidence
	$(BIN)/python -m experiments page

# No test of the default suite takes a minute; one that hangs prints its traceback and ends its worker. The tests of a file
# stay in one process, which makes what they share once.
WORKERS ?= 2
test: $(INSTALLED)  ## run the default test suite, in WORKERS processes
	$(BIN)/python -m pytest -m "not slow" --durations=15 -n $(WORKERS) --dist loadfile \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true

test-slow: $(INSTALLED)  ## run the slow tests
	$(BIN)/python -m pytest -m slow

# The oldest that the extra takes, and the newest that the index has.
TRL_OLDEST = trl==$(shell sed -n 's/.*"trl>=\([0-9.]*\),.*/\1/p' pyproject.toml)
TRL_TESTS = tests/test_trl.py tests/test_trl_skip.py tests/test_trl_prefill.py tests/test_trl_posterior.py \
	tests/test_two_rounds.py tests/test_async_worker.py

test-trl-range: $(TRL_VENV)-oldest/.installed $(TRL_VENV)-newest/.installed  ## run tests marked trl_range on TRL's oldest and newest release (own environments)
	for release in oldest newest; do \
		$(TRL_VENV)-$$release/bin/python -m pip list --disable-pip-version-check | grep -E "^(trl|transformers|torch) " && \
		$(TRL_VENV)-$$release/bin/python -m pytest -m trl_range -rs -p no:cacheprovider $(TRL_TESTS) || exit 1; \
	done

$(TRL_VENV)-oldest/.installed: TRL_RELEASE = $(TRL_OLDEST)
$(TRL_VENV)-newest/.installed: TRL_RELEASE = trl
$(TRL_VENV)-%/.installed: pyproject.toml
	$(PYTHON) -m venv $(TRL_VENV)-$*
	$(TRL_VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(TRL_VENV)-$*/bin/python -m pip install --quiet "$(TORCH)"
	$(TRL_VENV)-$*/bin/python -m pip install --quiet --upgrade --editable ".[trl]" --group test $(TRL_RELEASE)
	touch $@

test-verl: $(VERL_VENV)/.installed  ## run verl itself with the plug-in on the CPU (own environment)
	$(VERL_VENV)/bin/python -m pytest tests/test_verl_contract.py tests/test_verl_real.py -v -W ignore --basetemp=$(VERL_VENV)/runs
	$(VERL_VENV)/bin/python tests/verl_harness/summary.py $(VERL_VENV)/runs/knapsack0

$(VERL_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(VERL_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VERL_VENV)/bin/python -m pip install --quiet --editable ".[verl]" --group test
	touch $@

test-engines: $(ENGINES_VENV)/.installed .wheels/.fetched  ## run the recipes of docs/engines.md against the released engines (own environment)
	$(ENGINES_VENV)/bin/python -m pip list --disable-pip-version-check | grep -E "^(openpipe-art|tinker.cookbook) "; ls .wheels
	$(ENGINES_VENV)/bin/python -m pytest tests/test_engines.py -v -rs -W ignore -p no:cacheprovider

# tinker-cookbook without its dependencies: on Python 3.11 not all of them have a release, and these are all it imports.
$(ENGINES_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(ENGINES_VENV)/bin/python -m pip install --quiet "$(TORCH)" transformers datasets
	$(ENGINES_VENV)/bin/python -m pip install --quiet --editable . --group test openpipe-art \
		tinker chz blobfile cloudpickle termcolor tiktoken pillow rich
	$(ENGINES_VENV)/bin/python -m pip install --quiet --no-deps tinker-cookbook
	touch $@

.wheels/.fetched:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --ignore-requires-python --dest .wheels skyrl
	touch $@

test-tinker: $(TINKER_VENV)/.installed  ## train with tinker-cookbook on SkyRL's Tinker server, on the CPU (minutes, own environment)
	$(TINKER_VENV)/bin/python -m pip list --disable-pip-version-check | grep -E "^(skyrl|tinker|tinker.cookbook|jax) "
	$(TINKER_VENV)/bin/python -m pytest tests/test_tinker_server.py -v -rs -W ignore -p no:cacheprovider

# SkyRL 0.4 takes tinker before 0.26, and tinker-cookbook 0.5.7 is the newest that does; without its dependencies, for the
# releases of transformers that the two take exclude each other. aiohttp and uv are what SkyRL uses but does not declare.
$(TINKER_VENV)/.installed: pyproject.toml
	$(TINKER_PYTHON) -m venv $(TINKER_VENV)
	$(TINKER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(TINKER_VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(TINKER_VENV)/bin/python -m pip install --quiet --editable . --group test "skyrl[tinker,jax]==0.4.*" aiohttp uv \
		chz blobfile cloudpickle termcolor tiktoken
	$(TINKER_VENV)/bin/python -m pip install --quiet --no-deps tinker-cookbook==0.5.7
	touch $@

test-minimal: $(MINIMAL_VENV)/.installed  ## test the library with the oldest versions it declares (own environment)
	$(MINIMAL_VENV)/bin/python -m pytest -p no:cacheprovider $(CORE_TESTS)
	$(MINIMAL_VENV)/bin/python -m pytest -p no:cacheprovider -m "not slow" -W ignore::DeprecationWarning $(EXTRAS_TESTS)

# What needs neither torch nor TRL: their oldest versions are pinned by the extra and checked at construction.
CORE_TESTS = tests/test_value.py tests/test_solver.py tests/test_blocks.py tests/test_costs.py tests/test_allocation.py tests/test_allocator.py \
	tests/test_estimator.py tests/test_groups.py tests/test_balance.py tests/test_statefile.py tests/test_logs.py
# Old releases use what newer ones of their own dependencies deprecate.
EXTRAS_TESTS = tests/test_runlog.py tests/test_report.py tests/test_hostile_output.py tests/test_package.py

$(MINIMAL_VENV)/.installed: pyproject.toml constraints-minimal.txt
	$(PYTHON) -m venv $(MINIMAL_VENV)
	$(MINIMAL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(MINIMAL_VENV)/bin/python -m pip install --quiet --editable ".[plots,data,math,completion]" pytest hypothesis scipy -c constraints-minimal.txt
	touch $@

test-python: $(PYTHON_VENV)/.made-with-$(subst /,_,$(PYTHON))  ## test all that needs no torch with PYTHON=python3.13 (own environment)
	$(PYTHON_VENV)/bin/python -m pytest -p no:cacheprovider -m "not slow" $(filter-out $(TORCH_TESTS),$(wildcard tests/test_*.py))

# Not every Python has a build of torch for every machine; the rest of the suite runs without one.
TORCH_TESTS = $(addprefix tests/test_,$(addsuffix .py,accelerator async_worker compare data_sets display faults kill lab lab_evidence lab_rounds models queue rounds tasks training \
	trl trl_distributed trl_skip trl_watching verl_contract verl_real workers))

# Another PYTHON clears the environment, and with it the mark of the one before. rich is what commands that need no
# torch use of the extra trl.
$(PYTHON_VENV)/.made-with-$(subst /,_,$(PYTHON)): pyproject.toml
	$(PYTHON) -m venv --clear $(PYTHON_VENV)
	$(PYTHON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(PYTHON_VENV)/bin/python -m pip install --quiet --editable ".[plots,data,math,completion]" rich --group test --group experiments
	touch $@

package: $(INSTALLED)  ## build wheel and sdist, install the wheel into an empty environment and try it
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m pytest -m slow tests/test_package.py

check: $(INSTALLED)  ## lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format the code
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measure solver, balancer, state file and training step
	@status=0; \
	$(BIN)/python benchmarks/bench_solver.py || status=1; \
	$(BIN)/python benchmarks/bench_balance.py || status=1; \
	$(BIN)/python benchmarks/bench_state.py || status=1; \
	$(BIN)/python benchmarks/step_time.py || status=1; \
	exit $$status

conformance: $(INSTALLED)  ## run check_engine on the newest release of every engine and write the table of docs/engines.md
	$(BIN)/python benchmarks/conformance.py --write

fuzz: $(INSTALLED)  ## a million random cases against the public functions and the readers of files
	$(BIN)/python -W ignore tests/fuzz.py --cases 1100000
	$(BIN)/python -m pip install --quiet --group fuzz
	@if $(BIN)/python -c "import atheris"; \
	then $(BIN)/python -W ignore tests/fuzz.py --engine atheris --cases 100000; \
	else echo "atheris has no build for this machine: coverage does not steer this run"; fi

kill: $(INSTALLED)  ## kill training at sixty random moments, resume, compare
	$(BIN)/python -m pytest -m slow -s tests/test_kill.py

docs: $(INSTALLED)  ## build the documentation site; fails on a broken link or an undocumented public name
	$(BIN)/python -m pytest tests/test_docs.py -k "reference or documented or links or navigation"
	$(BIN)/mkdocs build --strict

base-model: $(INSTALLED)  ## pre-train the shipped base model again
	$(BIN)/python scripts/pretrain_base.py

clean:  ## remove the environment and build products
	rm -rf $(VENV) $(TRL_VENV)-oldest $(TRL_VENV)-newest $(VERL_VENV) $(ENGINES_VENV) $(TINKER_VENV) .wheels $(MINIMAL_VENV) $(PYTHON_VENV) build dist site *.egg-info src/*.egg-info
