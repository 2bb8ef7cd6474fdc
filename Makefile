# Every target sets itself up: the first one creates .venv and installs the project into it.
#   PYTHON=python3.12     the interpreter that .venv is made from
#   PIP_ARGS="..."        passed to pip, for example --extra-index-url https://download.pytorch.org/whl/cpu
#                         where the CUDA build of torch that PyPI serves to Linux is not wanted

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test test-slow lint format bench docs clean
.DEFAULT_GOAL := help

help:
	@echo "targets: install demo test test-slow lint format bench docs clean"

# torchvision and timm go on top without their dependencies: torchvision asks for the CUDA build of torch, and both only
# lend their model definitions to the tests.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[report,onnx,dev,docs]' transformers
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps torchvision timm
	touch $@

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/qcqp-prune demo

# Two processes of one thread each: more threads make these small tensors slower.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow --timeout 3600

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only --timeout 3600

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .cache site build dist ./*.egg-info solvers/*.egg-info .mypy_cache .ruff_cache .pytest_cache \
	    .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
