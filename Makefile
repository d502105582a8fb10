# Everything here sets up .venv by itself, says what it does, and may be repeated.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LOWEST := build/lowest

.DEFAULT_GOAL := help
.PHONY: help demo test coverage types test-lowest docs docs-check bench release-check lint clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(VENV)/.models  ## train SASRec three ways on embedded data and compare (less than 3 minutes)
	$(BIN)/python -m models compare --epochs 80 --batch-size 64 --output-dir runs/demo --overwrite

test: $(VENV)/.test types  ## format, lint and type checks, then every test and every notebook on small data
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	SEVO_NOTEBOOK_FAST=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=600 notebooks tests sevo_optax models

coverage: $(VENV)/.test  ## which lines of the library its own tests run (tracing slows all tests by a quarter)
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov=sevo_optax --cov-report=term-missing tests/sevo_optax sevo_optax

types: $(VENV)/.test  ## mypy: strict for the library, the basics for the models
	$(BIN)/mypy

test-lowest: $(LOWEST)/.installed  ## the library's tests with the oldest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pip list --format=freeze | grep -iE '^(jax|flax|optax|numpy|scipy)='
	$(LOWEST)/bin/python -m pytest -n 2 tests/sevo_optax sevo_optax

docs: $(VENV)/.docs  ## the site, into build/docs, from stored outputs; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

docs-check: docs  ## the site in headless Chromium: links, errors, screenshots at 400 and 1,400 pixels
	$(BIN)/python tests/browser_check.py build/docs build/screenshots

bench: $(VENV)/.models  ## the benchmarks that need nothing but this clone (torch joins in if it is there)
	$(BIN)/python benchmarks/propagation.py
	$(BIN)/python benchmarks/overhead.py

release-check: $(VENV)/.release  ## build sdist and wheel, and try the wheel alone in a clean environment
	rm -rf dist build/release
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && release/bin/python -P ../tests/release_check.py ../README.md

lint: $(VENV)/.test  ## rewrite the sources in the project's format and list what remains
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what runs left behind
	rm -rf $(VENV) runs build dist docs/api docs/notebooks *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# One stamp an extra: installed again when pyproject.toml changes, and left alone otherwise. Python compiles what is
# imported, a small part of what is installed. Python 3.11's own pip takes twice as long as a current one.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "installing the '$*' dependencies into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[$*]'
	@touch $@

$(LOWEST)/.installed: pyproject.toml tests/lowest.py | $(BIN)/python
	@echo "installing the oldest versions that pyproject.toml allows into $(LOWEST)"
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(BIN)/python tests/lowest.py library-tests > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -r $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

$(BIN)/python:
	@echo "creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
