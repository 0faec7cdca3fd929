# Two commands: `make demo` and `make test`. Each makes .venv first if it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint format clean

help:
	@echo "make demo    watch a small model answer with tools, then learn (under 4 minutes once installed)"
	@echo "make test    run the tests"
	@echo "make lint    ruff, pyright and the import contracts"
	@echo "make format  let ruff rewrite what it can"
	@echo "make clean   remove .venv and what tools left behind"

.venv/installed: pyproject.toml
	@PYTHON=$(PYTHON) scripts/system-packages
	@echo "Making .venv (the first time takes a few minutes: torch is large) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@touch $@

.PHONY: system
system:
	@PYTHON=$(PYTHON) scripts/system-packages

demo: system .venv/installed
	@$(BIN)/python -m rollout.demo $(ARGS)

test: system .venv/installed
	$(BIN)/python -m pytest -q $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-out
