# Every target does its own set-up: on a fresh machine only python3 (3.11 or later) and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

.PHONY: install demo test check slow bench docs

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "postgrad needs Python 3.11 or later: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "python3 cannot make virtual environments: install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev,demo]" -c constraints.txt
	@touch $@

# The main job on real data: fetches a small model and 14,000 licence notices, trains, compares, reports.
# make demo MINUTES=5 ARGS=--json
demo: install
	$(BIN)/postgrad demo $(if $(MINUTES),--minutes $(MINUTES)) $(ARGS)

# The whole suite: CPU, offline, under five minutes on two cores, the same examples every time.
# make test ARGS="-k run -x"
test: install
	$(PYTEST) -q --hypothesis-profile=ci -m "not slow and not gpu and not network" $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q --doctest-modules src --ignore=src/postgrad/model/triton_kernels.py  # needs Triton
	$(PYTEST) -q tests/test_shape.py

# Minutes long, or in need of downloads.
slow: install
	$(PYTEST) -q -m "slow or network" $(ARGS)

bench: install
	$(BIN)/python benchmarks/train_speed.py $(ARGS)

# Rewrites what is generated: the key reference, the --help blocks, the tree in the README.
docs: install
	$(BIN)/python docs/generate.py
