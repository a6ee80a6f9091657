# make run, make test: a fresh machine needs nothing but Python 3.11 or newer.
# Choose the interpreter with PYTHON=…; each gets a virtual environment and a lock of its own.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV := .venv-$(VERSION)
LANE := $(if $(filter 3.11,$(VERSION)),py311,py312)
LOCK := requirements/$(LANE).lock
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TPU := $(VENV)/.tpu
DOCS := .venv-docs
SPECS := .venv-specs
PARITY := .venv-parity
RUNS ?= runs/tiny
OPTIONS ?=

.PHONY: venv tpu run test test-fast test-second parity soak lint docs specs notebooks

venv: $(STAMP)

$(STAMP): $(LOCK) setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "moejax needs Python 3.11 or newer; this is " + sys.version.split()[0] + "; choose one with PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

# The TPU compiler, for tests/aot: in a folder of its own, because every command that finds it looks for a TPU.
tpu: $(TPU)

$(TPU): $(STAMP) requirements/tpu-$(LANE).lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/tpu -r requirements/tpu-$(LANE).lock
	@touch $(TPU)

# The default experiment: a sparse model and its dense twin, then the table and the report.
run: $(STAMP)
	$(BIN)/python scripts/compare.py --workdir=$(RUNS) $(OPTIONS)

# What CI runs.
test: $(STAMP) $(TPU)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10

# The batteries without the slow end-to-end runs: for every save.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not soak"

# What CI runs on its second lane: the batteries, and some of the slow tests: eight devices, several processes, checkpoints.
test-second: test-fast
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not soak" --durations 10 \
	  tests/data tests/mesh/test_equal_training.py tests/hosts/test_processes.py \
	  tests/checkpoint/test_manager.py tests/models

# Published families against the implementation they are published with, in an environment that has it: PYTHON must be 3.11.
parity: $(PARITY)/.installed
	HF_HUB_OFFLINE=1 $(PARITY)/bin/python -m pytest --durations 10 tests/parity

$(PARITY)/.installed: requirements/parity.lock requirements/py311.lock setup.py
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 11) else "requirements/parity.lock is for Python 3.11; this is " + sys.version.split()[0] + "; choose one with PYTHON=…")'
	$(PYTHON) -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/parity.lock
	$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# The pages, the README and a reference from docstrings as a site. A broken link, or any other warning, is an error.
docs: $(DOCS)/.installed
	rm -rf site
	$(DOCS)/bin/python -m sphinx -E -W --keep-going -q -d build/doctrees docs site
	@echo "the pages begin at site/index.html"

$(DOCS)/.installed: requirements/docs.lock
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/docs.lock
	@touch $@

# Runs the notebooks from a clean kernel and keeps what they print and draw; after make tpu the last one compiles too.
notebooks: $(STAMP)
	$(BIN)/python notebooks/run.py

# Specs of sweeps against the schemas that schedulers publish: PYTHON must be 3.11.
specs: $(SPECS)/.installed
	HOME=$(abspath $(SPECS)) SKYPILOT_DISABLE_USAGE_COLLECTION=1 $(SPECS)/bin/python -m pytest --noconftest tests/sweep/test_specs_published.py

$(SPECS)/.installed: requirements/specs.lock
	$(PYTHON) -m venv $(SPECS)
	$(SPECS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/specs.lock
	@touch $@

# The full product of routers, orders, transports and meshes: before a release, or after a change to any of them.
soak: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist load -m soak
	$(BIN)/python tests/hosts/soak.py
	$(BIN)/python tests/train/restarts.py

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright --pythonpath $(BIN)/python
