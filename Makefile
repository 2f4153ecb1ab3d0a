# `make demo`, `make momo-demo` and `make test` do everything on a fresh machine: they make .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKDIR ?= runs/demo
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
SOURCES := vlp_jax configs docs tools tests setup.py

.PHONY: demo momo-demo test test-slow lint types format clean

demo: $(READY)
	$(BIN)/python -m vlp_jax.main --config=configs/demo.py --workdir=$(WORKDIR)

momo-demo: $(READY)
	$(BIN)/python -m tools.momo_demo --workdir=runs/momo

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

test-slow: $(READY)
	$(BIN)/python -m pytest $(SPREAD) -m "slow and not gpu"

lint: $(READY)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The exact lock is made for Python 3.11; other versions resolve the ranges of setup.py.
$(READY): setup.py requirements/cpu.txt
	$(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'; \
	fi
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
