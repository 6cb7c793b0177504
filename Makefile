# Two commands work on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-projection docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned: an unpinned one may pull gigabytes of GPU packages
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(VENV)/.test
	$(BIN)/python bench/operators.py

bench-projection: $(VENV)/.bench
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/projection_chains.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/projection_kronecker.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/projection_selection.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python bench/projection_weights.py --quick

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/pdoc --docformat numpy --math --output-directory docs/api structmat '!structmat.backends.numpy'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
