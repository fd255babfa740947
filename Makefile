# Everything runs from .venv, which the first target that needs it makes from constraints.txt.
# Nothing is installed globally. `make PYTHON=/path/to/python3.12 …` chooses the interpreter.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench clean

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.installing
LOG := $(VENV)/install.log

help:
	@echo "make demo    train, check against PEFT, generate, save and reload: the tour (minutes)"
	@echo "make test    the tests (ARGS='-k name' passes arguments to pytest)"
	@echo "make lint    ruff and mypy"
	@echo "make types   mypy alone"
	@echo "make bench   measure the operation on this machine"
	@echo "make clean   remove .venv, caches and build leftovers"

demo: $(STAMP)
	@$(BIN)/prefixattn demo $(ARGS)

# One thread for each worker: two workers that each take every core are slower than one.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP)
	@echo "ruff check"; $(BIN)/ruff check .
	@echo "ruff format --check"; $(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	@echo "mypy"; $(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/python -m benchmarks.attention $(ARGS)

# The stamp is written last. An install that was interrupted leaves $(UNFINISHED) behind, and the
# next one starts from an empty environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "prefixattn needs Python 3.11 or newer, but '$(PYTHON)' is:" \
	         "$$($(PYTHON) --version 2>&1 || true)"; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' cannot make virtual environments (no module ensurepip or venv)."; \
	    echo "On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@rm -f $(STAMP)
	@if [ -e $(UNFINISHED) ]; then echo "removing an unfinished $(VENV)"; rm -rf $(VENV); fi
	@mkdir -p $(VENV); touch $(UNFINISHED)
	@echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV)
	@echo "installing torch, transformers, PEFT and the tools into $(VENV) (minutes at first)"
	@set -o pipefail; PYTHONUNBUFFERED=1 $(BIN)/pip install --disable-pip-version-check \
	    --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 | tee $(LOG) \
	    | awk '/(Downloading|cached) .* [MG]B\)/ { \
	        split($$(NF-2), wheel, "-"); print "  " wheel[1], wheel[2], $$(NF-1), $$NF; fflush()}' \
	    || { tail -n 20 $(LOG); \
	    echo "The install failed; the whole of its output is in $(LOG)."; exit 1; }
	@rm -f $(UNFINISHED); touch $(STAMP)
	@echo "$(VENV) is ready"

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
