# Everything from a fresh checkout, with Python 3.10 or newer and make; each target installs what it needs first:
#   make demo    show what the library does (two minutes)
#   make test    linters, type checker, doctests, tests; the kernels of Hopper again with the oldest Triton
#   make lint    linters and type checker alone
#   make docs    the site, in site/
#   make wheel   sdist and wheel, in dist/
#   make hub     the package as a kernel of the Hugging Face Hub, in dist/hub
# PYTHON picks the interpreter, VENV the folder, TORCH the torch to install, WORKERS how many tests run at once.
# TEST_FLAGS='tests/test_viz.py -x' runs these tests and nothing else.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
DEMO_FLAGS ?=
TEST_FLAGS ?=

RUN := $(VENV)/bin/python
# one stamp per set of packages: a second run installs nothing
TORCH_DONE := $(VENV)/.done-torch
DEMO_DONE := $(VENV)/.done-demo
DEV_DONE := $(VENV)/.done-dev
DOCS_DONE := $(VENV)/.done-docs
# the oldest Triton that is supported, beside the installed one
OLDEST := $(VENV)/oldest
OLDEST_DONE := $(VENV)/.done-oldest

.PHONY: demo test lint docs wheel hub clean

demo: $(DEMO_DONE)
	$(RUN) -m anymask demo $(DEMO_FLAGS)

# threads that spin while they wait take the cores they wait for, if the machine has other work
test: export OMP_WAIT_POLICY ?= passive
ifneq ($(TEST_FLAGS),)
test: $(DEV_DONE)
	$(RUN) -m pytest $(TEST_FLAGS)
else
test: lint $(OLDEST_DONE)
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal
	@echo "==> kernels of Hopper with the oldest Triton"
	@if [ -d $(OLDEST) ]; then PYTHONPATH=$(OLDEST) $(RUN) -m pytest -n $(WORKERS) -m compile tests/test_compile_hopper.py; fi
endif

lint: $(DEV_DONE)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/zizmor --offline --quiet .github

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS_DONE)
	$(RUN) -m mkdocs build --strict

wheel: $(DEV_DONE)
	rm -rf dist
	$(RUN) -m build --no-isolation --outdir dist

hub: $(TORCH_DONE)
	rm -rf dist/hub
	$(RUN) .ci/hub.py dist/hub

clean:
	rm -rf $(TORCH_DONE) $(DEMO_DONE) $(DEV_DONE) $(DOCS_DONE) $(OLDEST_DONE) $(OLDEST) dist site

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

$(DOCS_DONE): $(TORCH_DONE) pyproject.toml
	@echo "==> anymask with what its site needs"
	$(RUN) -m pip install --progress-bar on '$(TORCH)' -e '.[docs]'
	@touch $@

$(OLDEST_DONE): $(DEV_DONE)
	@if $(RUN) -c 'import triton' 2>/dev/null; then $(RUN) -m pip install --no-deps --target $(OLDEST) 'triton==3.6.0'; fi
	@touch $@
