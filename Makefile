# Everything that a developer runs; each target installs first when it must.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
export LORATOOLS_ORACLES ?= $(HOME)/.cache/loratools/oracles

.PHONY: install demo test test-all lint format bench bench-gpu oracles clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml tests/constraints.txt loratools/kernels/fold.c loratools/kernels/building.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --editable '.[dev,demo]'
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/pytest -n $(WORKERS) -m "not slow"

test-all: install
	$(BIN)/pytest -n $(WORKERS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# One row: make bench FIGURE=name; without FIGURE all of them.
bench: install
	$(BIN)/python -m tests.benchmarks $(FIGURE)

bench-gpu: install
	$(BIN)/python -m tests.benchmarks --gpu $(FIGURE)

# Environments for programs whose pins contradict ours, outside the checkout, kept between runs;
# make oracles NAME=torchtune builds one of them.
oracles: install
	$(BIN)/python -m tests.environments $(LORATOOLS_ORACLES) $(NAME)

clean:
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
