# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
# Paddle runs with one thread unless told otherwise before it is imported.
export OMP_NUM_THREADS ?= $(shell nproc)

CORE_SOURCES := $(shell find custom_ops -type f -not -path '*/build/*') setup.py pyproject.toml

$(VENV)/.installed: requirements/runtime.txt requirements/build.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; assert (3, 10) <= sys.version_info[:2] <= (3, 12), "Python 3.10 to 3.12 is needed (PaddlePaddle 3.3.0 and PaddleNLP 3.0.0b4); this is " + sys.version + ". Name another one: make PYTHON=python3.11 ..."'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "python3 has no ensurepip; install it first: apt-get install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q -r requirements/dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(CORE_SOURCES)
	$(PY) -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	touch $@

.PHONY: venv
venv: $(VENV)/.installed

.PHONY: build
build: $(VENV)/.built  ## build the op and install the package into .venv (editable)
