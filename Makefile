# Two commands do everything, including set-up: `make demo` and `make test`. The virtual environment in .venv is made once, and
# updated only if pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --editable

.PHONY: demo test faults soak drills lint docs venv

demo: $(VENV)/installed
	$(BIN)/python -m dis_scale.sweep configs/digits.yaml

# Three processes, also on two cores: while sweeps start and wait in two, the third computes. -v cancels the -q of
# pyproject.toml, which hides pytest's first lines: what is skipped, and why.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -v -n 3 --dist worksteal

# All tables of faults, and each test that is too long for `make test`; and random kills: `make soak KILLS=20 SEED=1`.
faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/faults -v -m "faults or not faults"
	$(BIN)/python -m pytest tests --ignore=tests/faults -v -m faults

soak: $(VENV)/installed-dev
	$(BIN)/python -m tests.faults.soak --kills $(or $(KILLS),100) $(if $(SEED),--seed $(SEED))

# The accidents of ops/runbooks/ and their cures; all, or some: `make drills DRILLS="disk-full stuck-job"`.
drills: $(VENV)/installed
	$(BIN)/python -m ops.drills $(DRILLS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/, in build/site. The variable hides an announcement of Material's authors.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

venv: $(VENV)/installed

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) here: install Python 3.11 or 3.12, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected Python 3.11 or 3.12: name one, for example make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are written last, so an interrupted installation is repeated.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) . --constraint constraints.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) '.[dev]' --constraint constraints.txt
	@touch $@
