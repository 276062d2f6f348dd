# The two commands of a new user are `make train` and `make test`; both set up .venv if it is not there.

PYTHON ?= python3
CLUSTER ?= clusters/four-hosts-100mbit.toml
BIN := .venv/bin
GPU_PYTHON = $(or $(wildcard $(BIN)/python),$(PYTHON))
JOBS ?= 3
TESTS := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all conformance gpu check format docs outputs clean

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z%-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make .venv with what constraints.txt pins (about 1.5 GB with the CPU build of torch)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "thinwire needs Python 3.11 or newer and $(PYTHON) is %d.%d; try: make PYTHON=python3.12" % v[:2])'
	@echo "setting up .venv: torch and what it needs, then thinwire; some minutes, once"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch hatchling editables
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

train: setup ## plan and train a small language model on four hosts joined by 100 Mbit/s; what the plan saved, at the end
	@if $(BIN)/thinwire lab check > /dev/null 2>&1; then \
	  $(BIN)/thinwire lab run --cluster $(CLUSTER) -- thinwire train examples/quickstart.toml --plan auto; \
	else \
	  echo "no network namespaces here (see: $(BIN)/thinwire lab check): training on four local ranks instead"; \
	  $(BIN)/thinwire train examples/quickstart.toml --plan auto; \
	fi

test: setup ## run the tests that take seconds, on JOBS processes; budgets by floor at the end
	@$(TESTS) -m 'not long'

test-all: setup ## run every test, the long ones too: those of the lab and those that compare seconds first, with the machine to themselves
	@$(TESTS) --numprocesses 1 -m 'lab or timed'
	@$(TESTS) -m 'not (lab or timed)'

conformance: setup ## run PyTorch's own tests of torch.distributed on our backend, metered and with chosen collectives
	@$(BIN)/python tools/conformance.py

gpu: ## on a machine with a GPU: its tests and benchmarks, in .venv or, where there is none, with the torch that PYTHON has
	@mkdir -p runs
	@export PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH}; $(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else f"torch {torch.__version__} of {sys.executable} finds no GPU")' && \
	$(GPU_PYTHON) -m pytest -m gpu && \
	$(GPU_PYTHON) -m thinwire bench gpu --cluster four-hosts-1gbit --json runs/gpu.json

check: setup ## lint, format, types, floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## let ruff put the code into form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup ## build the pages of docs/ into build/docs; a warning, or a link to nothing, is an error
	@$(BIN)/mkdocs build --strict
	@echo "built build/docs/index.html"

outputs: setup ## put what shown commands print into README and docs; CHECK=1: only compare
	@$(BIN)/python tools/outputs.py $(if $(CHECK),--check)

bench-%: setup ## run one benchmark on CLUSTER, e.g. make bench-ddp; rows go to runs/bench-ddp.json
	@mkdir -p runs
	@$(BIN)/thinwire bench $* --cluster $(CLUSTER) --json runs/bench-$*.json

clean: ## remove .venv and caches; runs/ stays
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
