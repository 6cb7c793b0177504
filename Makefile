# Two commands work on a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench bench-quick bench-projection bench-nn bench-gpu docs clean

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

# files of tests side by side, a thread each: those that wait for nothing but a core take half of the time
test: lint
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# OPTIONS="--part monarch --threads 2" and the like
bench: $(VENV)/.bench
	$(BIN)/python bench/cpu.py --save $(OPTIONS)

bench-quick: $(VENV)/.bench
	$(BIN)/python bench/cpu.py --quick $(OPTIONS)

bench-projection: $(VENV)/.bench
	$(BIN)/python bench/projection.py

bench-nn: $(VENV)/.bench
	$(BIN)/python bench/nn.py --save

# the table of one GPU; OPTIONS=--cpu is the dry run
bench-gpu: $(VENV)/.bench
	$(BIN)/python bench/gpu.py $(OPTIONS)

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	# without its requirements: torchvision, which it does not use; where there is no wheel the tables say so
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps pyfastkron==1.1.0
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(VENV)/.docs
	$(BIN)/pdoc --docformat numpy --math --output-directory docs/api structmat '!structmat.backends.numpy'

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
