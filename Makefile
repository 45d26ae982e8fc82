# Two commands: make demo, make test. KERAS_BACKEND picks the demo's backend.

PYTHON ?= python3
KERAS_BACKEND ?= tensorflow
export KERAS_BACKEND
export TF_CPP_MIN_LOG_LEVEL ?= 2

VENV := .venv
RUN := $(VENV)/bin/python
BACKENDS := tensorflow jax torch

.PHONY: demo test lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m examples.quickstart

# One process for each backend, then the backends against each other.
test: $(VENV)/installed lint
	set -e; for backend in $(BACKENDS); do \
		KERAS_BACKEND=$$backend $(RUN) -m pytest --quiet \
			--ignore tests/test_parity.py; \
	done
	$(RUN) -m pytest --quiet tests/test_parity.py

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:
	rm -rf $(VENV) demo build dist *.egg-info
