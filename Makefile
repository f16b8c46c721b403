PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install clean

demo: install
	$(BIN)/hf-ortho demo --overwrite

test: install lint
	$(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} --dist loadfile

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
