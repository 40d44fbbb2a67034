# make demo: the main job on an embedded data set.   make test: every check.   make docs: the site.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-oldest check format docs

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/ensemblenet demo

test: setup
	# one thread a process: more would fight over the cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# The tests that meet most libraries in the least time.
QUICK := tests/test_functional.py tests/test_losses.py tests/test_ensemble.py tests/test_cost.py tests/operations \
	tests/metrics tests/heads tests/storage/test_formats.py tests/test_guide.py

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(QUICK)

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python .ci/oldest.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/constraints.txt --editable ".[dev]"
	@touch $@

docs: .venv-docs/.installed
	$(PYTHON) .ci/site.py
	.venv-docs/bin/zensical build --strict --clean

.venv-docs/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet --group docs
	@touch $@

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
