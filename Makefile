# make demo and make test work in a fresh clone: they make .venv first. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DECLARED := pyproject.toml setup.py constraints.txt
DEMO := demo-output
# processes that share the tests, as pytest-xdist has it; each needs 2 GiB
WORKERS ?= logical
# of each target of the fuzzer
SECONDS ?= 60
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test nightly fuzz lint format bench site hooks clean
# two installations into one .venv must not run side by side
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.package  ## train a small model on the shipped preferences, fused next to plain PyTorch
	rm -rf $(DEMO)
	$(BIN)/fused-po train --compare --output $(DEMO)

test: $(VENV)/.development  ## run the tests that need no GPU
	$(PYTEST) -m "not gpu and not large and not nightly"

nightly: $(VENV)/.development  ## run them with the products of their parameters in full
	$(PYTEST) -m "not gpu and not large"

fuzz: $(VENV)/.development  ## feed the readers of files and the command line with bytes, SECONDS each
	$(PIP) install 'atheris>=3.0'
	$(BIN)/python -m tests.fuzz.readers --seconds $(SECONDS)

lint: $(VENV)/.development  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.development  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.development  ## time the operations, a few short cases, and three against TRL
	mkdir -p bench-output
	$(BIN)/fused-po bench --cases quick --output bench-output/ops.json
	$(BIN)/python -m bench.bench_rows --quick --output bench-output/rows.json
	$(BIN)/python -m bench.bench_cpu_vs_trl --output bench-output/cpu_vs_trl.json

site: $(VENV)/.development  ## build the documentation as a site, into site/
	$(BIN)/python -m mkdocs build

hooks: $(VENV)/.development  ## let git run the checks of make lint before each commit
	$(BIN)/pre-commit install

clean:  ## remove what was built and cached; .venv stays
	rm -rf build dist site *.egg-info $(DEMO) bench-output .fuzz .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f fused_po/_cuda*.so
	find fused_po scripts tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# the last thing that venv puts in place
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.package: $(DECLARED) | $(BIN)/pip
	$(PIP) install -c constraints.txt -e .
	touch $@

# holds all of .package
$(VENV)/.development: $(DECLARED) | $(BIN)/pip
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $(VENV)/.package $@
