# The environment is made once, in .venv, from nothing but Python (3.11 or newer) and PyPI.
#   make demo PYTHON=python3.13      another interpreter
#   make test VENV=/tmp/venv         another place for the environment

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   := runs/demo
QUICK  := aggregators availability cache clock cohort descent engines experiment identities mean message method nets \
          node participation partition plugin random record spec states vector world

.PHONY: help demo test test-quick mutants lint bench docs clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train FedAvg on 20 clients and write $(DEMO)/report.html"
	@echo "make test    the tests, on every core"
	@echo "make test-quick  those of the core, in about a minute"
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

# One torch thread a process: pytest-xdist already keeps every core busy.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test-quick: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(QUICK:%=tests/test_%.py)

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
