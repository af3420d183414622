# Two commands do everything: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) 2>/dev/null || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
PYTHON_CODE := src tests bench examples

.PHONY: demo test coverage soak matrix check format clean

# TORCH_INDEX_URL, where set, is the index that PyTorch's install page names for this machine.
$(VENV)/.installed: pyproject.toml requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX_URL),$(BIN)/pip install -q --index-url $(TORCH_INDEX_URL) torch,)
	$(BIN)/pip install -q -r requirements.txt -e .[dev]
	touch $@

demo: $(VENV)/.installed
	$(BIN)/headrace demo $(ARGS)

# Two workers (see tests/two_workers.py). ARGS="-n 0" runs all in one process, as --pdb needs it.
TEST := -n 2 -m "not matrix and not soak"

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(TEST) $(ARGS)

# Which Python lines `make test` runs, in this process and those that it starts and lets end.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest $(TEST) --cov --cov-report=term $(ARGS)
	rm -f .coverage

soak: $(VENV)/.installed
	$(BIN)/python -m pytest -m soak --write-soak $(ARGS)

# Every triple of values of the invariance matrix. MATRIX_SAMPLE=k runs k of the cells, always the same ones;
# MATRIX_SHARD=i/n the i-th of n parts (of the sample, where there is one).
matrix: $(VENV)/.installed
	$(BIN)/python -m pytest tests/invariance -m "matrix or not matrix" $(ARGS)

# Clients of other projects, unchanged, in an environment of their own that git does not see.
.PHONY: test-clients
CLIENTS := .venv-clients

$(CLIENTS)/.installed: requirements-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	echo '*' > $(CLIENTS)/.gitignore
	$(if $(TORCH_INDEX_URL),$(CLIENTS)/bin/pip install -q --index-url $(TORCH_INDEX_URL) torch,)
	$(CLIENTS)/bin/pip install -q -r requirements-clients.txt
	touch $@

test-clients: $(VENV)/.installed $(CLIENTS)/.installed
	HEADRACE_CLIENTS=$(abspath $(CLIENTS))/bin $(BIN)/python -m pytest tests/clients $(ARGS)

check: $(VENV)/.installed
	$(BIN)/ruff check $(PYTHON_CODE)
	$(BIN)/ruff format --check $(PYTHON_CODE)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix $(PYTHON_CODE)
	$(BIN)/ruff format $(PYTHON_CODE)

clean:
	rm -rf $(VENV) $(CLIENTS) build dist src/*.egg-info
