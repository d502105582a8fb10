# Everything here sets up .venv by itself, says what it does, and may be repeated.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test bench release-check lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.models  ## train SASRec three ways on embedded data and compare (about 3 minutes)
	$(BIN)/python -m models compare --epochs 80 --batch-size 64 --output-dir runs/demo --overwrite

test: $(VENV)/.test  ## format and lint checks, then every test and every notebook on small data
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --cov=sevo_optax --cov-report=term
	SEVO_NOTEBOOK_FAST=1 $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=600 notebooks

bench: $(VENV)/.models  ## the benchmarks that need nothing but this clone (torch joins in if it is there)
	$(BIN)/python benchmarks/propagation.py
	$(BIN)/python benchmarks/overhead.py

release-check: $(VENV)/.release  ## build sdist and wheel, and try the wheel alone in a clean environment
	rm -rf dist build/release
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && release/bin/python -P ../tests/release_check.py ../README.md

lint: $(VENV)/.test  ## rewrite the sources in the project's format and list what remains
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# One stamp an extra: installed again when pyproject.toml changes, and left alone otherwise.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "installing the '$*' dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@

$(BIN)/python:
	@echo "creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
