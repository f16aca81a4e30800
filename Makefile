# Every target sets up its own virtual environment. PYTHON selects the interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The tests install compilers for TPUs and GPUs: plugins, which JAX would load in every command.
TEST := $(VENV)-test

.PHONY: demo train-demo serve docs browser test test-whole test-others test-part part-types \
	part-tests check bench bench-serve clean

demo: $(VENV)/run
	$(BIN)/v4jax demo

train-demo: $(VENV)/train
	$(BIN)/v4jax-train demo

# A server of the embedded model with a chat page, at http://127.0.0.1:8000.
serve: $(VENV)/serve
	$(BIN)/v4jax-serve tiny

# The site, in site/. The variable silences the theme's notice about its successor.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The full suite on PYTHON, then a part of it on the oldest and newest supported versions. Types are
# checked in parallel, since the type checker uses a single core.
test: $(TEST)/ready browser
	@$(MAKE) --jobs 2 check test-whole
	@$(MAKE) test-others

# The chat page is tested in Chromium, which is no Python package.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes \
		--no-install-recommends chromium chromium-driver >/dev/null; } || { \
		echo "The tests need Chromium and ChromeDriver on PATH."; exit 1; }

# For one Python: all tests but those of compiled programs, then those.
PYTEST = -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
define run-tests
	XLA_FLAGS="$$($(1) -m tests.quick)" $(1) $(PYTEST) -m "not full_compilation" $(2)
	$(1) $(PYTEST) -m full_compilation $(2)
endef

# Overrides the shell: without cached bytecode, each process would compile the tests again.
test-whole part-tests: export PYTHONDONTWRITEBYTECODE :=

test-whole: $(TEST)/ready
	$(call run-tests,$(TEST)/bin/python)

ENDS := 3.11 3.13
VERSION = $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
# From PATH or pyenv. It is run, because a pyenv shim can exist without its Python.
find-python = $(shell for python in python$(1) $$HOME/.pyenv/versions/$(1).*/bin/python; do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)

test-others:
	@set -e; $(foreach end,$(filter-out $(VERSION),$(ENDS)), \
		$(if $(call find-python,$(end)), \
			$(MAKE) test-part PYTHON=$(call find-python,$(end)) VENV=$(VENV)-$(end);, \
			echo "Python $(end) was not found: nothing was tested with it.";))

# The demo, the model, generation, training, each operation's kernels, and programs for v6e and H200.
KERNELS := compress_tpu dense_attention_tpu grouped_matmul_tpu hyper_compiled indexer_topk_tpu \
	quantize_tpu rotary sparse_attention_tpu \
	compress_gpu grouped_matmul_gpu indexer_topk_gpu quantize_gpu sparse_attention_gpu
MODEL := consistency.py::test_rows_do_not_see_each_other
TRAINING := train_loop.py::test_a_run_records_every_step_and_learns \
	train_loop.py::test_a_killed_run_resumes_bit_for_bit
PROGRAMS := aot.py::test_steps_compile_for_every_chip aot.py::test_training_compiles_for_every_chip \
	aot.py::test_a_step_at_a_million_tokens_of_context_needs_few_temporaries
FILES = $(patsubst %,tests/test_%.py,implementations interpreters generate $(KERNELS)) \
	$(addprefix tests/test_,$(MODEL) $(TRAINING) $(PROGRAMS)) -k "not v5p and not tpu7x"

test-part: $(VENV)/part
	@$(MAKE) --jobs 2 part-types part-tests

# JAX's types differ between versions. Tests are not checked: some import what is not installed.
part-types:
	$(BIN)/pyright --pythonpath $(BIN)/python v4jax pallas_kernels serve train

part-tests:
	$(BIN)/v4jax demo
	$(call run-tests,$(BIN)/python,$(FILES))

check: $(TEST)/ready
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/ruff check
	$(TEST)/bin/pyright --pythonpath $(TEST)/bin/python

bench: $(TEST)/ready
	$(TEST)/bin/python -m benchmarks.compare

bench-serve: $(TEST)/ready
	$(TEST)/bin/python -m benchmarks.serve

$(VENV)/bin/python $(TEST)/bin/python: %/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"Python 3.11 or newer is needed, for example: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $* || { rm -f $@; exit 1; }

$(VENV)/run: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/train: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@ $(VENV)/run

$(VENV)/serve: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[serve]'
	touch $@ $(VENV)/run

$(VENV)/docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@ $(VENV)/run

# Without torch and transformers, which this part does not need.
$(VENV)/part: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

# The exact torch version first: a range would fetch the CUDA build of several gigabytes.
$(TEST)/ready: pyproject.toml | $(TEST)/bin/python
	$(TEST)/bin/python -m pip install --quiet torch==2.13.0
	$(TEST)/bin/python -m pip install --quiet --editable '.[test,parity]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist site *.egg-info
