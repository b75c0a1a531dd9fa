# Everything from a fresh checkout, with Python 3.10 or newer and make:
#   make demo    install, then show what the library does (two minutes after installation)
#   make test    install, then run the tests
#   make lint    install, then run the linters and the type checker
# PYTHON picks the interpreter, VENV the folder, TORCH the torch to install.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_FLAGS ?=
TEST_FLAGS ?=

RUN := $(VENV)/bin/python
# one stamp per set of packages: a second run installs nothing
TORCH_DONE := $(VENV)/.done-torch
DEMO_DONE := $(VENV)/.done-demo
DEV_DONE := $(VENV)/.done-dev
# the oldest Triton that is supported, beside the installed one
OLDEST := $(VENV)/oldest
OLDEST_DONE := $(VENV)/.done-oldest

.PHONY: demo test lint clean

demo: $(DEMO_DONE)
	$(RUN) -m anymask demo $(DEMO_FLAGS)

# threads that spin while they wait take the cores they wait for, if the machine has other work
test: export OMP_WAIT_POLICY ?= passive
test: $(DEV_DONE) $(OLDEST_DONE)
	$(RUN) -m pytest $(TEST_FLAGS)
ifeq ($(TEST_FLAGS),)
	@echo "==> kernels of Hopper with the oldest Triton"
	@if [ -d $(OLDEST) ]; then PYTHONPATH=$(OLDEST) $(RUN) -m pytest -m compile tests/test_compile_hopper.py; fi
endif

lint: $(DEV_DONE)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(TORCH_DONE) $(DEMO_DONE) $(DEV_DONE) $(OLDEST_DONE) $(OLDEST)

$(TORCH_DONE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "anymask needs Python 3.10 or newer; $(PYTHON) is older or missing: make PYTHON=python3.x ..."; exit 1; }
	@echo "==> virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV) || \
		{ echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
	@echo "==> $(TORCH)"
	$(RUN) -m pip install --progress-bar on '$(TORCH)'
	@touch $@

$(DEMO_DONE): $(TORCH_DONE) pyproject.toml
	@echo "==> anymask with what the demonstration needs"
	$(RUN) -m pip install --progress-bar on '$(TORCH)' -e '.[demo]'
	@touch $@

$(DEV_DONE): $(TORCH_DONE) pyproject.toml
	@echo "==> anymask with what its tests and linters need"
	$(RUN) -m pip install --progress-bar on '$(TORCH)' -e '.[dev]'
	@touch $@

$(OLDEST_DONE): $(DEV_DONE)
	@if $(RUN) -c 'import triton' 2>/dev/null; then $(RUN) -m pip install --no-deps --target $(OLDEST) 'triton==3.6.0'; fi
	@touch $@
