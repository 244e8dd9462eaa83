# What a fresh clone can do; `make` alone lists it. Needs Python 3.11 or 3.12, make, and nothing else.
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCUMENTED := $(VENV)/.docs

# The first interpreter here that can make an environment; `make setup PYTHON=/path/to/python` overrides.
PYTHON = $(shell for python in python3.11 python3.12 python3 python; do \
  "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
  >/dev/null 2>&1 && echo "$$python" && break; done)

# Bytecode is compiled when a module is first imported, not for thousands of modules that never are.
unexport PYTHONDONTWRITEBYTECODE

# Material for MkDocs otherwise advertises its successor at each build.
export NO_MKDOCS_2_WARNING = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-libero test-maniskill test-faults test-lerobot test-openpi test-gpu check format bench docs docs-serve clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED)  ## Make .venv and install Rove into it

# constraints.txt pins torch, so that no other build of it is fetched.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 that can make a virtual environment was \
	found. Install one (on Debian or Ubuntu: apt install python3 python3-venv), or name it: make setup \
	PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet \
	  --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## Warm up, train by RL, evaluate before and after, write runs/demo/report.html
	$(BIN)/rove demo

test: $(INSTALLED)  ## Run the tests; PYTEST_ARGS goes to pytest
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-libero: $(INSTALLED)  ## Compare all of LIBERO with the stock environment; some minutes
	LIBERO_FULL=1 $(BIN)/python -m pytest tests/libero $(PYTEST_ARGS)

test-maniskill: $(INSTALLED)  ## Hold every put-on-plate environment to the contract; some minutes
	MANISKILL_FULL=1 $(BIN)/python -m pytest tests/integration/test_maniskill.py $(PYTEST_ARGS)

test-faults: $(INSTALLED)  ## Kill, damage, fuzz, misbehave, signal; a table of what held; about 12 minutes
	FAULTS_FULL=1 $(BIN)/python -m pytest tests/faults tests/unit/test_config_fuzz.py \
	  tests/integration/test_lost_workers.py tests/integration/test_ray.py --numprocesses 5 --dist worksteal $(PYTEST_ARGS)

# Other people's programs, each in an environment of its own, since they need other versions of what Rove has.
LEROBOT := build/lerobot/bin/python
OPENPI := build/openpi/bin/python
PYTHON_LEROBOT = $(shell for python in python3.12 python3.13 $(HOME)/.pyenv/versions/3.12*/bin/python python3; do \
  "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 \
  && echo "$$python" && break; done)

test-lerobot: $(INSTALLED) $(LEROBOT)  ## Let LeRobot and Rove read each other's data sets; needs Python 3.12
	LEROBOT_PYTHON=$(CURDIR)/$(LEROBOT) $(BIN)/python -m pytest tests/clients/test_lerobot.py $(PYTEST_ARGS)

# Without torchcodec, which needs FFmpeg's libraries of the system, LeRobot reads videos with PyAV.
$(LEROBOT):
	@test -n "$(PYTHON_LEROBOT)" || { echo "error: LeRobot needs Python 3.12 or newer, and none was found. Name \
	it: make test-lerobot PYTHON_LEROBOT=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON_LEROBOT) -m venv --clear build/lerobot
	$@ -m pip install --disable-pip-version-check --no-compile --quiet "lerobot[dataset]==0.6.1" || \
	  { rm -rf build/lerobot; exit 1; }
	$@ -m pip uninstall --disable-pip-version-check --quiet --yes torchcodec

test-openpi: $(INSTALLED) $(OPENPI)  ## Let openpi's own client ask a served policy
	OPENPI_PYTHON=$(CURDIR)/$(OPENPI) $(BIN)/python -m pytest tests/clients/test_openpi.py $(PYTEST_ARGS)

# The package imports typing_extensions, and does not say that it needs it.
$(OPENPI):
	$(PYTHON) -m venv --clear build/openpi
	$@ -m pip install --disable-pip-version-check --no-compile --quiet openpi-client==0.1.2 \
	  typing_extensions || \
	  { rm -rf build/openpi; exit 1; }

test-gpu: $(INSTALLED)  ## On a machine with a GPU: its tests, then its benchmarks into benchmarks/results
	$(BIN)/python -m pytest tests/gpu -m gpu $(PYTEST_ARGS)
	$(BIN)/python benchmarks/policy.py --size 7b > benchmarks/results/policy_gpu.json
	$(BIN)/python benchmarks/libero.py --gpu > benchmarks/results/libero_gpu.json
	$(BIN)/python benchmarks/placements.py > benchmarks/results/placements_gpu.json

check: $(INSTALLED)  ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)  ## Format, and mend what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Run every benchmark; each prints JSON
	$(BIN)/rove bench

# Not --quiet: warnings that are silenced do not fail.
docs: $(DOCUMENTED)  ## Build the site of docs/ in build/site; a broken link fails
	$(BIN)/mkdocs build --strict

docs-serve: $(DOCUMENTED)  ## Serve the site on this machine, built anew at each change
	$(BIN)/mkdocs serve

$(DOCUMENTED): $(INSTALLED)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile --quiet \
	  --constraint constraints.txt --editable ".[docs]"
	@touch $@

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './runs/*' -prune -exec rm -rf {} +
