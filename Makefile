# The newcomer's two commands: make demo, make test. Everything happens in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests and benchmarks find CIFAR-10 here, where it exists; the product never assumes it.
CIFAR10 := $(wildcard ../shared/data/cifar10)
ifneq ($(CIFAR10),)
export STILLPROOF_CIFAR10 ?= $(abspath $(CIFAR10))
endif

.PHONY: demo test setup check lint types contracts pytest bench schema clean

demo: setup
	$(BIN)/stillproof demo

test: check pytest

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Stillproof needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

check: lint types contracts

lint: setup
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

pytest: setup
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  echo "left out: the report in a browser (install Debian's chromium and chromium-driver to test it)"
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

bench: setup
	@failed=; for bench in benchmarks/*.py; do echo "$$bench"; $(BIN)/python "$$bench" || failed="$$failed $$bench"; done; \
	  test -z "$$failed" || { echo "missed a target, or broke:$$failed"; exit 1; }

schema: setup
	$(BIN)/python -m stillproof.findings > docs/result.schema.json

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
