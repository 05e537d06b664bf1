# make quickstart   sets everything up, trains the small model, says how to look at the result
# make test         sets everything up if needed, checks style and types, runs the tests
# make test-browser opens TensorBoard and the report in headless Chromium, keeps pictures of them in docs/
# make test-docs    builds the documentation's site, runs the examples and the documentation's commands
# make test-reliability kills runs, engines and servers, fills disks, fuzzes configurations: most of an hour
# make soak         trains for an hour and counts memory, handles, threads, processes and the logs' size
# make audit        looks the locked packages up in the Python Packaging Advisory Database
# make gpu          runs the tests that need a CUDA GPU
# make study        makes the study's runs that are not in study/results.jsonl yet, and docs/study.md from them
PYTHON ?= python3
RUN := .venv/bin/python
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); [ $$n -lt 4 ] && echo $$n || echo 4)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup quickstart test test-docs test-browser test-reliability soak audit lint types unit gpu study study-smoke format lock

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
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile -m "not gpu and not browser and not reliability and not docs"

test-docs: setup
	@$(RUN) -m pip install -q "mkdocs-material>=9.8" "mkdocstrings[python]>=1.0"
	@$(RUN) -m pytest tests/test_docs.py tests/test_examples.py tests/test_rewards_guide.py tests/reliability/test_own_reward.py

test-browser: setup
	@$(RUN) -m pip install -q "selenium>=4.30"
	@DRPO_PICTURES=docs $(RUN) -m pytest -m browser tests/browser

test-reliability: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -m reliability

soak: setup
	@$(RUN) benchmarks/soak.py

audit: setup
	@$(RUN) -m pip install -q "pip-audit>=2.9"
	@grep -oh 'torch==[0-9.]*' scripts/set_up.py | cat - requirements/cpu.lock > .venv/audited.txt
	@$(RUN) -m pip_audit -r .venv/audited.txt --no-deps --disable-pip

study: setup
	@$(RUN) -m study
	@$(RUN) -m study.report

study-smoke: setup
	@$(RUN) -m pytest tests/test_study.py

format: setup
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

lock:
	@$(PYTHON) scripts/lock.py
