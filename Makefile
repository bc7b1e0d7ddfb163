# Each verb does its own set-up in .venv: `make demo`, `make test`, `make docs`.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo docs test lint types tests clean
help:  ## list the verbs
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: .venv/installed  ## train a small language model and watch its phase transition (runs/demo/report.html)
	$(BIN)/devmon demo $(ARGS)

docs: .venv/installed  ## the site with its gallery, in site/ (about a minute, without network)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html (its search needs a server: python3 -m http.server --directory site)'

test: lint types tests  ## ruff, mypy, the tests

lint: .venv/installed  ## ruff alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## mypy alone
	$(BIN)/mypy

tests: .venv/installed  ## the tests alone
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "devmon needs Python >= 3.11, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:  ## remove the virtual environment and caches
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache *.egg-info
