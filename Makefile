# `make bench` and `make test` need nothing but Python 3.10+ and make; they build .venv first.
PYTHON ?= python3
OUT ?= out
VENV := .venv
# The folders here are not the packages: keep them off the path (3.11 and newer heed it).
export PYTHONSAFEPATH := 1
RUN := $(VENV)/bin/python
# Where pip finds a CPU build of torch, if not by itself: make PIP_ARGS="--extra-index-url ..."
PIP_ARGS ?=
# More options of the command, as in: make bench ARGS=--resume
ARGS ?=

.PHONY: help bench speed check kernels test test-all slow fresh fuzz newest lint docs docs-check gpu clean

help:
	@echo "make bench     train the answer matcher on real data; JSON and pictures in $(OUT)/answers"
	@echo "make test      the tests (6 minutes on 2 cores, the installation included)"
	@echo "make test-all  with the slow ones (make slow) and those of a fresh seed (make fresh)"
	@echo "make fuzz      10,000 drawn calls, valid ones and spoilt ones, in child processes"
	@echo "make check     every op and module on this machine against float64"
	@echo "make speed     ours beside torch's own, row by row"
	@echo "make kernels   what each kernel compiles to, per architecture: registers, spills, tensor-core instructions"
	@echo "make newest    the tests with the newest torch and Triton, in an environment of their own"
	@echo "make lint      ruff, mypy on the installed package, and whether the sdist is complete"
	@echo "make docs      the documentation as a site in $(OUT)/site; make docs-check opens its pages in Chromium"
	@echo "make gpu       all that only a GPU can show, stage by stage, and nothing from a network: needs torch,"
	@echo "               triton, numpy, pytest, typer, rich and setuptools; ARGS=\"--stage tests\" runs one stage"

# Installed, not editable: what runs is what a user gets. A stale build folder would put deleted modules
# into the wheel.
PACKAGES := core kernels lstm attention curvature bench
# Folders too: what is deleted or renamed changes them alone. Their `/.` tells them from targets of that name.
SOURCES := pyproject.toml constraints.txt $(addsuffix /.,$(shell find $(PACKAGES) -type d ! -name __pycache__)) \
	$(shell find $(PACKAGES) -name '*.py' -o -name py.typed -o -path '*/configs/*.json')
comma := ,
define install
	rm -rf build
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "$(1)"
	touch $@
endef

$(VENV)/for-bench: $(SOURCES)
	$(call install,.[bench])

$(VENV)/for-test: $(SOURCES)
	$(call install,.[bench$(comma)test])
	touch $(VENV)/for-bench

$(VENV)/for-docs: $(SOURCES)
	$(call install,.[docs])

bench: $(VENV)/for-bench
	$(RUN) -m gatematch.bench answers --out $(OUT)/answers $(ARGS)

speed: $(VENV)/for-bench
	$(RUN) -m gatematch.bench speed --json $(OUT)/speed.json $(ARGS)

check: $(VENV)/for-bench
	$(RUN) -m gatematch.bench check --json $(OUT)/check.json

kernels: $(VENV)/for-bench
	$(RUN) -m gatematch.bench kernels --json $(OUT)/kernels.json $(ARGS)

# Two processes of one thread each, since most tests wait for one thread of a compiler or of an interpreter; one
# that is done takes over from the other. Triton's interpreter is chosen for a whole process, so the kernels'
# tests in it are a second run. Arguments: a Python, which marks, and more options.
PYTEST = OMP_NUM_THREADS=1 $(1) -m pytest -n 2 --dist worksteal
define tests
	$(PYTEST) -m "$(2) and not gpu and not site" --ignore tests/test_kernels_interpreted.py $(3)
	TRITON_INTERPRET=1 $(PYTEST) -m "$(2)" tests/interpreted $(3)
endef

test: $(VENV)/for-test
	$(call tests,$(RUN),not slow and not fresh)

slow: $(VENV)/for-test
	$(call tests,$(RUN),slow)

# The contracts of kernels and CPU paths, on sizes and data that no run has had before.
fresh: export GATEMATCH_TEST_SEED := fresh
fresh: $(VENV)/for-test
	$(call tests,$(RUN),fresh)

test-all: test slow fresh

fuzz: $(VENV)/for-test
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) tests/fuzz.py 10000 $(ARGS)

# Torch's bound on Triton does not count here, and neither does this package's own.
NEWEST := $(VENV)/newest/bin/python
UPGRADE := $(NEWEST) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --upgrade
newest:
	rm -rf build
	test -x $(NEWEST) || $(PYTHON) -m venv $(VENV)/newest
	$(UPGRADE) ".[bench,test]"
	$(UPGRADE) torch
	$(UPGRADE) --no-deps triton
	$(NEWEST) -c 'import torch, triton; print("torch", torch.__version__, "and Triton", triton.__version__)'
	$(call tests,$(NEWEST),not slow and not fresh,$(ARGS))

lint: $(VENV)/for-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m mypy -p gatematch
	test ! -e .git || $(RUN) -m check_manifest

# The API reference is read off the installed package. The variable keeps Material for MkDocs from advertising
# against another project's next version in the log.
docs: $(VENV)/for-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet --site-dir $(OUT)/site

docs-check: docs
	SITE=$(OUT)/site $(RUN) -m pytest -m site tests/test_site.py

# Takes nothing from a network. A Python whose packages the system owns refuses to install: then let GPU_PYTHON
# be that of a venv made with --system-site-packages.
GPU_PYTHON ?= python3
gpu:
	rm -rf build
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-build-isolation .
	$(GPU_PYTHON) -m gatematch.bench gpu --json $(OUT)/gpu.json $(ARGS)

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info
