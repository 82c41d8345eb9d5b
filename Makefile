# Two commands people need: `make demo` and `make test`. Both set up everything on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

$(VENV)/.core: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ $(VENV)/.core

demo: $(VENV)/.core
	PATH="$(CURDIR)/$(BIN):$$PATH" sh demo/run.sh

lint: $(VENV)/.test
	$(BIN)/ruff check src tests tools benchmarks demo
	$(BIN)/ruff format --check src tests tools benchmarks demo
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

clean:
	rm -rf $(VENV) build demo-out
