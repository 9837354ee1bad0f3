# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint format clean help

help:
	@echo "make demo    distil a real teacher on real text (about 8 minutes on 2 cores)"
	@echo "make test    ruff, mypy and all tests (about 8 minutes on 2 cores)"
	@echo "make lint    ruff and mypy only"
	@echo "make format  rewrite the code in the project's style"
	@echo "make clean   delete the environment and caches of tools"

demo: $(VENV)/.demo
	$(BIN)/logitcache demo --out demo-output

test: lint
	# Processes of one thread each, one more than there are cores: many tests wait for servers and for other processes.
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=8

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
