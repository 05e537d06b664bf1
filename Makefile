# make quickstart   sets everything up, trains the small model, says how to look at the result
# make test         sets everything up if needed, checks style and types, runs the tests
PYTHON ?= python3
RUN := .venv/bin/python
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup quickstart test lint types unit gpu format lock

help:
	@sed -n 's/^# //p' Makefile

setup:
	@$(PYTHON) scripts/set_up.py

quickstart: setup
	@$(RUN) scripts/quickstart.py

test: lint types unit

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

types: setup
	@$(RUN) -m mypy

gpu: setup
	@$(RUN) -m pytest -m gpu

unit: setup
	@$(RUN) -m pytest -m "not gpu"

format: setup
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

lock:
	@$(PYTHON) scripts/lock.py
