# `make bench` and `make test` need nothing but Python 3.10+ and make; they build .venv first.
PYTHON ?= python3
OUT ?= out
VENV := .venv
RUN := $(VENV)/bin/python -P
# Where pip finds a CPU build of torch, if not by itself: make PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=

.PHONY: help bench speed check test test-all lint gpu clean

help:
	@echo "make bench     train the answer matcher on real data; JSON and pictures in $(OUT)/answers"
	@echo "make test      the tests (under 10 minutes on 2 cores)"
	@echo "make test-all  with the slow ones"
	@echo "make check     every op and module on this machine against float64"
	@echo "make speed     ours beside torch's own, row by row"
	@echo "make lint      ruff, and mypy on the installed package"
	@echo "make gpu       on a CUDA machine with torch and triton: tests, check, speed (installs nothing else)"

# Installed, not editable: what runs is what a user gets.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard lstm/*.py attention/*.py bench/*.py bench/*/*.py)
	rm -rf build  # a stale one would put deleted modules into the wheel
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt ".[bench,test]"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall .
	touch $@

bench: $(VENV)/installed
	$(RUN) -m gatematch.bench answers --out $(OUT)/answers

speed: $(VENV)/installed
	$(RUN) -m gatematch.bench speed --json $(OUT)/speed.json

check: $(VENV)/installed
	$(RUN) -m gatematch.bench check --json $(OUT)/check.json

test: $(VENV)/installed
	$(RUN) -m pytest -m "not slow and not gpu"

test-all: $(VENV)/installed
	$(RUN) -m pytest -m "not gpu"

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m mypy -p gatematch.lstm -p gatematch.attention -p gatematch.bench

# Each stage fits eight minutes; GPU_PYTHON has torch, triton, numpy, pytest and setuptools.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation .
	$(GPU_PYTHON) -P -m pytest -m gpu tests/test_gpu.py

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
