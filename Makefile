# make demo    prepare a small corpus, train on it and sample, on whatever this machine has
# make test    lint and tests
# make lint    lint alone
#
# PYTHON=python3.12 chooses the interpreter. TORCH='torch==2.11.0 --index-url ...' installs a CUDA build; with the
# default, torch and everything else have the versions of constraints.txt.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep '^torch==' constraints.txt)
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt

.PHONY: demo test lint
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh

# What happens on the test cluster is waited for more than computed; unit tests fill the time.
test: lint $(VENV)/.installed-zero
	@$(BIN)/python -m pytest tests/cluster $(PYTEST_ARGS) > $(VENV)/cluster.log 2>&1 & cluster=$$!; \
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_ARGS); unit=$$?; \
	wait $$cluster; code=$$?; echo "tests/cluster:"; cat $(VENV)/cluster.log; [ $$unit = 0 ] && [ $$code = 0 ]
	$(BIN)/python -m pytest tests --ignore tests/unit --ignore tests/cluster $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Each stamp stands for a finished step, so that a second call installs nothing.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 11) <= v < (3, 14) or sys.exit( \
	  "$(PYTHON) is Python %d.%d; use 3.11, 3.12 or 3.13: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.created constraints.txt
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) $(TORCH)
	touch $@

$(VENV)/.installed: $(VENV)/.torch setup.cfg pyproject.toml
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.torch setup.cfg pyproject.toml
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed

# DeepSpeed comes as source. It is built without isolation, because its set-up asks the torch that is there, and
# without its own dependencies, so that it cannot replace that torch.
$(VENV)/.installed-zero: $(VENV)/.installed-dev constraints.txt
	$(PIP) -e '.[dev,zero]'
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --no-deps $$(grep '^deepspeed==' constraints.txt)
	touch $@
