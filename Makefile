# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Paddle runs with one thread unless told otherwise before it is imported.
export OMP_NUM_THREADS ?= $(shell nproc)

PIP := $(PY) -m pip --disable-pip-version-check -q
NATIVE_SOURCES := $(shell find custom_ops -type f) setup.py pyproject.toml

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: requirements/runtime.txt requirements/build.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 12) else "Python 3.10, 3.11 or 3.12 is needed (PaddleNLP 3.0.0b4 goes no further), this is %d.%d; name another: make PYTHON=python3.11 ..." % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'Python cannot make virtual environments here. On Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE_SOURCES)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

.PHONY: venv build demo examples test test-asan test-paddle test-paddleformers cuda-lib lint format bench-cpu clean
venv: $(VENV)/.installed  ## make .venv with the pinned versions

build: $(VENV)/.built  ## build the op and install the package into .venv (editable)

demo: build  ## fine-tune a small Llama with FlashMask and with a dense mask, and compare
	$(PY) examples/sft.py examples/config/sft-tiny-cpu.json

EXAMPLES := sft lora dpo reward

examples: build  ## run all four training examples on a tiny model (about three minutes each)
	set -e; for name in $(EXAMPLES); do $(PY) examples/$$name.py examples/config/$$name-tiny-cpu.json; done

test: build  ## run the whole test suite
	$(PY) -m pytest tests

# Every memory access of the core and every undefined operation is checked while the fuzzed cases run.
test-asan: build  ## run the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(VENV)/bin/cmake -S custom_ops -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFLASHMASK_SANITIZE=ON >/dev/null
	$(VENV)/bin/cmake --build build/asan
	FLASHMASK_LIBRARY=$(abspath build/asan/libflashmask.so) LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so) \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 $(PY) -m pytest -q -p no:cacheprovider tests/core

test-paddle: venv  ## build and test against another Paddle: make test-paddle VERSION=2.6.2
	$(PY) tools/test_paddle.py $(VERSION)

test-paddleformers: venv  ## try the PaddleFormers integration in an environment of its own
	$(PY) tools/test_paddleformers.py

# The core with CUDA kernels and no Paddle. FLASHMASK_CUDA_ARCHS, FLASHMASK_HEAD_DIMS and FLASHMASK_CUDA_DTYPES narrow it.
cuda-lib: venv  ## build build/cuda/libflashmask.so with the CUDA kernels (needs nvcc)
	@command -v nvcc >/dev/null || { echo 'cuda-lib: there is no nvcc on the PATH'; exit 1; }
	$(VENV)/bin/cmake -S custom_ops -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(VENV))/bin/ninja -DFLASHMASK_CUDA=ON
	$(VENV)/bin/cmake --build build/cuda

LINTED_CXX = $(shell git ls-files {custom_ops,tests,benchmarks}/'*'.{h,cc,cpp,cu,cuh})

lint: venv  ## ruff, clang-format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(LINTED_CXX)
	$(PY) -m mypy

format: venv  ## rewrite the sources the way lint wants them
	$(PY) -m ruff check --fix-only -q .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(LINTED_CXX)

bench-cpu: build  ## time the CPU kernels against PyTorch (where importable) and Paddle's dense mask
	$(PY) benchmarks/kernels.py --device cpu

clean:  ## remove build folders (not .venv, not runs)
	rm -rf build dist *.egg-info paddle_flashmask/lib paddle_flashmask/*.so paddle_flashmask/_build_info.py \
	  $(VENV)/.built
