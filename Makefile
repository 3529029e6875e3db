# make demo         prepare a small corpus, train on it and sample, on whatever this machine has
# make test         lint and tests
# make test-long    the tests that `make test` leaves out: repetitions, and what takes minutes
# make lint         style, import contracts, types of the strict packages
# make types        mypy errors of the other packages; never fails
#
# PYTHON=python3.12 chooses the interpreter. TORCH='torch==2.11.0 --index-url ...' installs a CUDA build, and
# MEGATRON=megatron-core==0.19.2 another Megatron-core. By default everything has the version of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
MEGATRON ?= $(shell grep '^megatron-core==' constraints.txt)
PYTEST_ARGS ?=
# Strict packages: no errors under mypy --strict.
STRICT := -p bd3_common -p data_prep -p pretrain.config -p bd3_megatron.diffusion -m bd3_megatron.config

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt

.PHONY: demo test test-long lint types types-strict
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh

# What happens on the test cluster is waited for more than computed; unit tests fill the time.
test: lint $(VENV)/.installed-zero $(VENV)/.transformers-4
	@$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS) > $(VENV)/cluster.log 2>&1 & cluster=$$!; \
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_ARGS); unit=$$?; \
	wait $$cluster; code=$$?; echo "tests/cluster:"; cat $(VENV)/cluster.log; [ $$unit = 0 ] && [ $$code = 0 ]
	$(BIN)/python -m pytest -n 2 --dist loadfile tests --ignore tests/unit --ignore tests/cluster $(PYTEST_ARGS)

test-long: $(VENV)/.installed-zero $(VENV)/.transformers-4
	$(BIN)/python -m pytest tests -m long $(PYTEST_ARGS)

lint: types-strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types-strict: $(VENV)/.installed-dev
	$(BIN)/mypy --strict --follow-imports silent $(STRICT)

types: $(VENV)/.installed-dev
	-$(BIN)/mypy

# Each stamp stands for a finished step, so that a second call installs nothing.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
	  "$(PYTHON) is Python %d.%d; use 3.11, 3.12 or 3.13: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	grep -v -e '^torch==' -e '^megatron-core==' constraints.txt > $(VENV)/constraints.txt
	echo '$(MEGATRON)' >> $(VENV)/constraints.txt
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.cfg pyproject.toml
	$(PIP) -e '.[hf]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch setup.cfg pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-zero: $(VENV)/.installed-dev
	$(PIP) -e '.[dev,zero]'
	touch $@

# The oldest transformers that exports are for, beside the present one.
$(VENV)/.transformers-4: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/transformers-4 \
	  transformers==4.51.3 tokenizers==0.21.4 huggingface-hub==0.36.2
	touch $@
