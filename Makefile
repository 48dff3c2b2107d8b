# setup makes .venv; quickstart runs a real sweep to its report; test is lint, types and every fast test; test-system is
# what needs outside components (a browser, a compiler).
PYTHON ?= python3
export CUBLAS_WORKSPACE_CONFIG ?= :4096:8
READY := .venv/.ready
SYSTEM := .venv/.system

.PHONY: setup quickstart test test-system system lint types unit clean

setup: $(READY)

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; try: make PYTHON=python3.12 setup")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' requirements.lock)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

quickstart: setup
	.venv/bin/python train.py --config explorations/quickstart.yaml

test: lint types unit

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: setup
	.venv/bin/mypy

unit: setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

# What only the system tests need; without it those that need it are skipped, and say so. The file has all that its packages
# need and we use: megatron-core asks for more, of which a model on a CPU uses nothing.
INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps
system: setup
	@cmp -s requirements-system.lock $(SYSTEM) || { \
	  $(INSTALL) -r requirements-system.lock && cp requirements-system.lock $(SYSTEM); } || \
	  while read -r package; do $(INSTALL) "$$package" || echo "$$package could not be installed: its tests will be skipped"; \
	  done < requirements-system.lock

test-system: system
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m system -rs

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
