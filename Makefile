# `make demo` and `make test` do all the set-up they need: they find a Python >= 3.12 and install into .venv, once.
# Variables: PYTHON=/path/to/python, PIP_ARGS='--index-url …', PYTEST_ARGS='-k gates -x', DEMO_ARGS='--seed 2',
# TEST_WORKERS=N (0: one process), THREADS=N.

VENV := .venv
STAMP := $(VENV)/installed.stamp
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
# One thread a process: a test starts up to four, and two workers run beside each other.
THREADS ?= 1
PYTEST_ARGS ?=
DEMO_ARGS ?=
export PYTHON PIP_ARGS VENV
# Trainings and tests start hundreds of processes; each would compile the package's source anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-latest test-te lint format venv clean check-python

help:
	@echo "make demo    train SwiGLU, LA and MoA on Python's own source text (no GPU needed) and compare them, about 4 minutes"
	@echo "make test    run the tests, about 13 minutes; PYTEST_ARGS='-k NAME -x' is passed on, PART=hf runs a folder of tests/ alone"
	@echo "make test-all  the same and every further case; PART=end_to_end, PART='hf tools' run a part of it"
	@echo "make test-latest  only the Hugging Face tests, with the newest transformers there is, in $(VENV)-latest"
	@echo "make test-te  only the layers of Transformer Engine: its own Python on a CPU, its kernels emulated"
	@echo "make lint    check style, common mistakes (ruff) and that folders import in their order (import-linter)"
	@echo "make format  put the code into the project's format (ruff)"
	@echo "make venv    only install, into $(VENV)"
	@echo "make clean   remove $(VENV), caches and runs/demo"
	@echo "All of them install what they need first; PYTHON=/path/to/python3.12 chooses the Python."

venv: $(STAMP)

# A PYTHON that cannot be used is an error even where .venv is already there.
check-python:
	@if [ -n "$$PYTHON" ]; then scripts/find_python.sh >/dev/null; fi

$(STAMP): setup.py pyproject.toml constraints.txt | check-python
	@scripts/make_venv.sh

demo: check-python $(STAMP)
	@$(BIN)/python tools/demo.py $(DEMO_ARGS)

# PART=hf: the tests of one folder of tests/, or of several; nothing is all of them.
PART ?=
test test-all: check-python $(STAMP)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile \
		$(if $(filter test,$@),-m "not full") $(PYTEST_ARGS) $(addprefix tests/,$(PART))

ifeq ($(PART),)
test-all: test-latest test-te
endif
test-latest: check-python
	@VENV_LATEST=$(VENV)-latest scripts/test_latest.sh

test-te: check-python $(STAMP)
	@TEST_WORKERS=$(TEST_WORKERS) scripts/test_te.sh

lint: check-python $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo --no-cache

format: check-python $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-latest .te build dist *.egg-info .pytest_cache .ruff_cache runs/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
