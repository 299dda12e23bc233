# Every target does its own set-up: only Python 3.11 (or later) and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed

# More arguments for the commands, for example: make test TEST_ARGS="-k wire"
PIP_ARGS ?=
TEST_ARGS ?=
# Tests that run at a time; 0: in one process, for a debugger.
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
SOAK_ARGS ?=

.PHONY: install demo test lint lint-quick bench soak clean
.DEFAULT_GOAL := test

install: $(INSTALLED)

# The pinned torch goes first, so that nothing else chooses a version of it.
$(INSTALLED): pyproject.toml constraints.txt elaswave/runtime/_kernels.c
	@test -n "$(PYTHON)" || { echo "no python3 found: install Python 3.11 or set PYTHON=PATH" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than Python 3.11: set PYTHON=PATH of a newer one" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

test: lint-quick
	$(BIN)/pytest --numprocesses=$(TEST_PROCESSES) --dist=worksteal $(TEST_ARGS)

lint: lint-quick
	$(BIN)/mypy

lint-quick: install
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/lint-imports > .venv/lint-imports.log || { cat .venv/lint-imports.log; exit 1; }

bench: install
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

soak: install
	$(BIN)/python scripts/soak.py $(SOAK_ARGS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . \( -path ./.venv -o -path ./.git \) -prune -o \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
