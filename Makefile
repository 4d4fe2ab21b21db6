.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(VENV)/.runs

.PHONY: help install demo test test-quick test-lowest check lint types wheel docs format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

define VENV_WITH
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "expunge needs Python 3.11 or newer, this is $$($(PYTHON) --version); try: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'
endef

# The demo needs no development tools, and a newcomer waits for it.
$(RUNS): pyproject.toml constraints.txt
	$(call VENV_WITH,.)
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	$(call VENV_WITH,.[dev])
	@touch $(RUNS) $@

install: $(STAMP) ## make .venv and install expunge with its development tools

demo: $(RUNS) ## the main job on built-in data: unlearn, score, attack; ends with a verdict and a report
	$(BIN)/expunge demo --overwrite

# A file's tests stay together: they share what its fixtures made. The longest come first (tests/conftest.py), not those
# with the most tests. One thread a worker, or they wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## every test, slow ones included, on all cores
	$(PYTEST) --durations 25

test-quick: $(STAMP) ## the tests that take seconds and need no browser, on all cores
	$(PYTEST) -m "not slow and not browser"

# pip takes the newest release that fits; uv can take the oldest. It reads UV_OVERRIDE and UV_INDEX.
test-lowest: ## the quick tests with the oldest releases that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not slow and not browser"

check: lint types wheel ## ruff, mypy --strict, and the wheel built, installed elsewhere and imported

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	scripts/check_wheel.sh $(BIN)/python

docs: $(STAMP) ## the documentation as pages in build/site, without a warning or a load from another host
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(BIN)/python scripts/site_check.py build/site

format: $(STAMP) ## rewrite the code the way `check` wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
