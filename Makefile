# Everything runs from .venv, which the first target that needs it makes from constraints.txt.
# Nothing is installed globally. `make PYTHON=/path/to/python3.12 …` chooses the interpreter.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-triton-matrix test-gpu lint types bench bench-gpu compile-report wheel \
    families methods docs test-peft test-sanitize test-arm cartridge clean

PYTHON ?= python3
GPU_PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UNFINISHED := $(VENV)/.installing
DOCS_STAMP := $(VENV)/docs/.installed
LOG := $(VENV)/install.log

# The oldest and the newest Triton that is supported; each gets an environment below .venv.
TRITONS := $(or $(shell sed -n 's/^triton>=\([^,]*\),<=\([^ ]*\).*/\1 \2/p' constraints.txt), \
    $(error constraints.txt: expected a line triton>=OLDEST,<=NEWEST))
TRITON_TESTS := $(TRITONS:%=test-triton-%)
TRITON_STAMPS := $(TRITONS:%=$(VENV)/triton-%/.installed)
.PHONY: $(TRITON_TESTS)
# The interpreter of Triton 3.6 fails with numpy 2.4.
WITH_TRITON_3.6.0 := numpy==2.3.5

help:
	@echo "make demo                train, check against PEFT, generate, save, reload (minutes)"
	@echo "make cartridge           distil a library file into a prefix, and hold it against the file"
	@echo "make test                the tests (ARGS='-k name' passes arguments to pytest)"
	@echo "make test-triton-matrix  the Triton tests on each end of the supported range: $(TRITONS)"
	@echo "make test-gpu            the tests that need a GPU, with that machine's own python3"
	@echo "make families            every transformers family in every situation: docs/families.md (minutes)"
	@echo "make test-peft           PEFT's own tests of prefixes, on stock PEFT and with our attention (minutes)"
	@echo "make test-sanitize       the C++ kernels under sanitizers and valgrind (minutes)"
	@echo "make test-arm            the C++ kernels, cross-compiled for ARM and emulated"
	@echo "make lint                ruff and mypy"
	@echo "make types               mypy alone"
	@echo "make bench               measure the operation on this machine's CPU"
	@echo "make bench-gpu           measure it on a GPU, with that machine's own python3"
	@echo "make methods             prefix tuning against the other ways to adapt a model (an hour)"
	@echo "make docs                the documentation as a site, below build/site"
	@echo "make compile-report      compile the kernels ahead of time: registers, spills, shared memory"
	@echo "make wheel               a wheel with the C++ kernels inside, tried out without a compiler"
	@echo "make clean               remove .venv, caches and build leftovers"

demo: $(STAMP)
	@$(BIN)/prefixattn demo $(ARGS)

cartridge: $(STAMP)
	@$(BIN)/python examples/cartridge.py $(ARGS)

# One thread for each worker: two workers that each take every core are slower than one.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) $(ARGS)

test-triton-matrix: $(TRITON_TESTS)

# -P keeps this folder off the path, as it is for .venv/bin/pytest.
$(TRITON_TESTS): test-triton-%: $(VENV)/triton-%/.installed
	@OMP_NUM_THREADS=1 $(VENV)/triton-$*/bin/python -P -m pytest -n $(WORKERS) -m triton $(ARGS)

# A machine with a GPU brings a torch and a Triton of its own, and may have no internet: these two
# take them as they are, and prefixattn from this checkout. `make test-gpu GPU_PYTHON=.venv/bin/python`
# chooses another Python. Only files that hold GPU tests are read: the rest import more packages.
ON_GPU := env -u TRITON_INTERPRET PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON)

test-gpu:
	@$(ON_GPU) .ci/check_gpu.py numpy safetensors pytest hypothesis
	@$(ON_GPU) -m pytest -m gpu $(ARGS) $$(grep -rl 'pytest\.mark\.gpu' --include='test_*.py' tests)

bench-gpu:
	@$(ON_GPU) .ci/check_gpu.py safetensors rich typer transformers
	@$(ON_GPU) -m prefixattn.bench --device cuda $(ARGS)

families: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/zoo/run.py --workers $(WORKERS) $(ARGS)

test-peft: $(STAMP)
	@$(BIN)/python tests/peft/run.py --workers $(WORKERS) $(ARGS)

test-sanitize: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -P tests/native/sanitize.py -n $(WORKERS) $(ARGS)

test-arm: $(STAMP)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	    echo "make test-arm needs $$tool; on Debian and Ubuntu:" \
	         "apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	@CXX=aarch64-linux-gnu-g++ $(BIN)/pytest -n $(WORKERS) tests/native/test_headers.py \
	    -k program_of --native-runner='qemu-aarch64 -L /usr/aarch64-linux-gnu' $(ARGS)

CPP := $(wildcard csrc/*.h csrc/*.cpp tests/native/headers/*)
lint: $(STAMP)
	@echo "ruff check"; $(BIN)/ruff check .
	@echo "ruff format --check"; $(BIN)/ruff format --check .
	@echo "clang-format --dry-run"; $(BIN)/clang-format --dry-run -Werror $(CPP)
	@$(MAKE) --no-print-directory types

types: $(STAMP)
	@echo "mypy"; $(BIN)/mypy

bench: $(STAMP)
	@$(BIN)/prefixattn bench $(ARGS)

methods: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.methods --workers $(WORKERS) $(ARGS)

docs: $(DOCS_STAMP)
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(<D)/bin/mkdocs build --strict --quiet
	@$(BIN)/prefixattn bench page benchmarks/results/cpu-zen4-2cores.jsonl \
	    --out build/site/bench-cpu.html > /dev/null
	@echo "build/site/index.html"

compile-report: $(STAMP)
	@env -u TRITON_INTERPRET $(BIN)/python -m benchmarks.compile_report $(ARGS)

wheel: $(STAMP)
	@$(BIN)/python .ci/wheel.py dist

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

# Triton, and what it needs, in front of .venv's packages. Nothing of an interrupted install is kept.
$(TRITON_STAMPS): $(VENV)/triton-%/.installed: $(STAMP)
	@echo "making $(@D) with Triton $* over $(VENV)'s packages"
	@rm -rf $(@D); $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check \
	    --no-deps triton==$* $(WITH_TRITON_$*)
	@site='import site; print(site.getsitepackages()[0])'; \
	    echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" \
	    > "$$($(@D)/bin/python -c "$$site")/venv.pth"
	@$(@D)/bin/python -c 'import torch, triton; assert triton.__version__ == "$*", triton'
	@touch $@

# mkdocs reads the sources and imports nothing of them.
$(DOCS_STAMP): $(STAMP)
	@echo "installing mkdocs into $(@D)"
	@rm -rf $(@D); $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check \
	    -c constraints.txt mkdocs-material mkdocstrings-python
	@touch $@

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
