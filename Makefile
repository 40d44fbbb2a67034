# make demo: the main job on an embedded data set.   make test: every check.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test check format

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

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
