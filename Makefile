PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint install clean

demo: install
	$(BIN)/hf-ortho demo --overwrite

PYTEST := $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} --dist loadfile --durations=20

test: install lint
	$(PYTEST) -m "not slow"

# Also the real launcher of several processes, and the pages in a browser.
test-all: install lint
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

# torch goes first: with it in place no other package pulls in a different build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[app,vision,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
