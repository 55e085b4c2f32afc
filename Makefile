# The project's commands. `make` lists them. Everything is installed into .venv; PYTHON names the interpreter it is made from.

PYTHON ?= python3
RECIPE ?= recipes/id2face.yaml
# Test processes: one a core, at most 8, because each holds torch in memory.
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(os.cpu_count() or 1, 8))')

# What `make test-slurm` runs; some wait for SLURM's own clocks for a minute or two.
SLURM_TESTS ?= tests/slurm

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := .venv/bin
STAMP := .venv/.installed
# Several test processes with several threads each would fight for the cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --ignore=tests/slurm

.PHONY: help
help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(STAMP) ## make .venv and install the project and its tools into it

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "anonfw needs Python 3.11 or newer, and $(PYTHON) is older: make setup PYTHON=python3.12" >&2; exit 1; }
	@echo "installing into .venv (a few gigabytes; a minute or two, longer on a slow network)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off -e '.[dev]' | awk '\
		/^Collecting/ && ++n % 20 == 0 { print "  " n " packages found"; fflush() } \
		/^Installing collected/ { print "  installing them"; fflush() }'
	@touch $@
	@echo "installed: $$($(BIN)/python -c 'import importlib.metadata as m; print("anonfw", m.version("anonfw"), "with torch", m.version("torch"))')"

.PHONY: demo
demo: $(STAMP) ## install, train ID2Face on the embedded faces, print the table (6 minutes on 2 cores)
	$(BIN)/python -m anonfw fit $(RECIPE)

.PHONY: test
test: $(STAMP) ## install and run the whole test suite (about 10 minutes on 2 cores)
	$(TEST)

.PHONY: test-slurm
test-slurm: $(STAMP) ## trainings on a real SLURM cluster of two nodes, made on this machine (needs slurm-wlm and munge)
	ANONFW_SLURM=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SLURM_TESTS)

.PHONY: check
check: lint ## lint and the quick part of the suite (a few minutes on 2 cores)
	$(TEST) -m "not slow"

.PHONY: lint
lint: $(STAMP) ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: bench
bench: $(STAMP) ## every benchmark in bench/, one after the other
	@set -e; for file in bench/*.py; do echo "== $$file"; $(BIN)/python "$$file"; done

.PHONY: clean
clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
