# Two commands matter: `make quickstart` and `make test`. Each first makes or completes .venv, which is at once where
# nothing has changed. `make PYTHON=python3.12 ...` names another interpreter.

PYTHON ?= python3
EXTRAS ?=
ARGS ?=

SETUP = "$(PYTHON)" tools/setup_env.py $(if $(EXTRAS),--extras "$(EXTRAS)") $(if $(filter-out file,$(origin PYTHON)),--exact-python)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test lint figures

help:
	@echo "make quickstart   train a small detector on generated images, evaluate it, draw its predictions"
	@echo "make test         run the default test suite          (ARGS='-k matcher' passes options to pytest)"
	@echo "make lint         ruff and mypy"
	@echo "make figures      draw the docs' figures anew, training a small detector for them (minutes)"
	@echo "make setup        only make or complete .venv         (EXTRAS=parity adds requirements/parity.txt)"
	@echo
	@echo "Each makes .venv where it is missing. PYTHON=python3.12 names the Python to make it with (3.10 or newer)."

setup:
	@command -v "$(PYTHON)" >/dev/null 2>&1 || \
		{ echo "There is no $(PYTHON) on PATH. Install Python 3.10 or newer, or name it with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 6))" || \
		{ echo "$(PYTHON) is too old. Install Python 3.10 or newer and name it with PYTHON=..." >&2; exit 1; }
	@$(SETUP)

quickstart: setup
	@.venv/bin/python tools/quickstart.py $(ARGS)

test: setup
	@.venv/bin/python -m pytest $(ARGS)

lint: setup
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m mypy

figures: setup
	@.venv/bin/python tools/make_figures.py $(ARGS)
