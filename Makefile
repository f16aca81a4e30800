# Every target sets up its own virtual environment. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo train-demo test check bench clean

demo: $(VENV)/run
	$(BIN)/v4jax demo

train-demo: $(VENV)/train
	$(BIN)/v4jax-train demo

test: $(VENV)/test check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/test
	$(BIN)/python -m benchmarks.compare

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, for example: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

$(VENV)/run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/train: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@ $(VENV)/run

# The exact torch first: a range would fetch the build for CUDA, several gigabytes.
$(VENV)/test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test,parity]'
	touch $@ $(VENV)/run $(VENV)/train

clean:
	rm -rf $(VENV) build dist *.egg-info
