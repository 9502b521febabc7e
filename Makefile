# make demo: the main job on real data.  make test: the tests.  Both create .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test lint types docs bench format clean help

help:
	@grep -E '^# |^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/^# //'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "wnq needs Python 3.11 or newer; set PYTHON=python3.12 or the like")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing wnq and what the demo needs into $(VENV) ..."
	$(PIP) -e ".[train,report]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing wnq and its development tools into $(VENV) ..."
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## train, compare, plot, pack and prove on real images, a few minutes; results in demo/
	$(BIN)/wnq demo --out demo

test: $(VENV)/.dev ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: $(VENV)/.dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## mend style in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev ## pyright, strict, on src
	$(BIN)/pyright

docs: $(VENV)/.dev ## build the documentation into site/
	$(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/.dev ## the benchmarks that need no data set; results in benchmarks/results/
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/digits.py

clean: ## remove the environment and everything generated
	rm -rf $(VENV) demo site runs
