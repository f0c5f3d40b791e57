# `make help` lists the targets. Every target sets up .venv first when it has to (tools/setup.sh: what, and how long).
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train examples test smoke lint format bench verify clean distclean

RANKS ?= 4
WORKERS ?= 2
ARGS ?=
SHARED := --dist loadfile --no-loadscope-reorder # a file's tests share launches and references: one process has them
BIN := .venv/bin
READY := .venv/.pfde/pfde

# .venv has its own PETSc and pfde: another one in the environment must not be mixed in. `make bench` alone looks there,
# for a torchfde to compare with.
OUTSIDE := $(PYTHONPATH)
unexport PETSC_DIR PETSC_ARCH PYTHONPATH

help:
	@echo "make train     train examples/train.py on RANKS=$(RANKS) ranks; ARGS=\"--epochs 3 -log_view\" passes options"
	@echo "make examples  the other examples, their quick part: two to three minutes"
	@echo "make test      the whole test suite, MPI tests included, on WORKERS=$(WORKERS) processes; ARGS=\"-k alpha\" passes options"
	@echo "make smoke     its quick part"
	@echo "make lint      formatting, lint, types       make format    put the formatting right"
	@echo "make bench     speed and memory              make verify    gradients against autograd, as a table"
	@echo "make setup     only set up .venv (the first time about ten minutes: it builds PETSc)"
	@echo "make clean     remove caches                 make distclean remove .venv too"

$(READY): pyproject.toml tools/setup.sh
	@bash tools/setup.sh

setup: $(READY)

train: $(READY)
	$(BIN)/mpiexec -n $(RANKS) $(BIN)/python examples/train.py $(ARGS)

examples: $(READY)
	@for name in cnf robertson kdv own_method long_memory; do \
		echo "==== $$name --quick"; $(BIN)/python examples/$$name.py --quick $(ARGS) || exit 1; \
	done

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) $(SHARED) $(ARGS)

smoke: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) $(SHARED) -m smoke $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	PYTHONPATH="$(OUTSIDE)" $(BIN)/python benchmarks/run.py $(ARGS)

verify: $(READY)
	$(BIN)/python -m pfde verify $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
