# Two commands: `make demo` shows the main job, `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
# modules are compiled as they are imported; most of those that are installed never are
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# a process a core: more threads of torch's would only be in each other's way
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist worksteal

.PHONY: demo test lint types unit oldest clean

demo: .venv/installed
	$(BIN)/python demo/demo.py

test: lint types unit oldest

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test-installed
	$(BIN)/mypy

unit: .venv/test-installed
	$(PYTEST)

# What touches transformers and the Hub, once more on the oldest versions that are tested.
oldest: .venv/oldest
	PYTHONPATH=.venv/oldest $(PYTEST) tests/integration

# torch first and by its exact pin: left to the resolver, a machine without a GPU pulls gigabytes of CUDA packages.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

.venv/installed: pyproject.toml .venv/torch
	$(PIP) -c constraints.txt -e .
	touch $@

.venv/test-installed: pyproject.toml .venv/torch
	$(PIP) -c constraints.txt -e '.[test]'
	touch .venv/installed $@

.venv/oldest: oldest-transformers.txt .venv/test-installed
	rm -rf $@
	$(PIP) --no-deps --target $@ -r $<
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo/out
