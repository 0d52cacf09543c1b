# The environment is made once, in .venv, from nothing but Python (3.11 or newer) and PyPI.
#   make demo PYTHON=python3.13      another interpreter
#   make test VENV=/tmp/venv         another place for the environment

PYTHON ?= python3
VENV   ?= .venv
BASE   ?= main
BIN    := $(VENV)/bin
DEMO   := runs/demo
QUICK  := aggregators availability cache clock cohort descent engines experiment identities mean message method nets \
          node participation partition plugin random record spec states vector world
COVERED ?=

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# One torch thread a process: pytest-xdist already keeps every core busy. What shares runs is done by one worker.
SPREAD := -n auto --dist loadgroup

.PHONY: help demo test test-quick test-method test-changed coverage mutants lint bench docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train FedAvg on 20 clients and write $(DEMO)/report.html"
	@echo "make test    the tests, on every core"
	@echo "make test-quick  those of the core, in about a minute"
	@echo "make test-method METHOD=fedavg  those that concern a method and what derives from it or wraps it"
	@echo "make test-changed BASE=main  those that concern the methods changed since BASE; all, if anything else was"
	@echo "make coverage  which lines of the library the tests run"
	@echo "make mutants  small mistakes put into every method: which ones survive the tests? CHANGED=1 tries changed parts"
	@echo "make lint    ruff and mypy"
	@echo "make bench   the benchmarks, beside a bare PyTorch loop; PEERS=1 beside other libraries too"
	@echo "make docs    the documentation, in site/"
	@echo "make clean   remove what the other targets made, but for $(VENV) and runs/"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps byzfl==0.0.11  # a yardstick of tests; its torchvision moves torch
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/fedloom run fedavg --out $(DEMO)
	$(BIN)/fedloom report $(DEMO)

test: $(VENV)/.installed-dev
	$(PYTEST) $(SPREAD) --durations=25

test-quick: $(VENV)/.installed-dev
	$(PYTEST) $(SPREAD) $(QUICK:%=tests/test_%.py)

test-method: $(VENV)/.installed-dev
	$(PYTEST) $(SPREAD) $(or $(METHOD:%=--method=%),$(error say which: make test-method METHOD=fedavg))

test-changed: $(VENV)/.installed-dev
	$(PYTEST) $(SPREAD) --changed=$(BASE)

coverage: $(VENV)/.installed-dev
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest $(SPREAD) $(COVERED)
	$(BIN)/coverage combine
	$(BIN)/coverage report

mutants: $(VENV)/.installed-dev
	$(BIN)/python tests/mutants/run.py $(if $(CHANGED),--changed)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/engines.py
	$(BIN)/python benchmarks/scale.py

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict

clean:
	rm -rf site dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
