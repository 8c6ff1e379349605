# Two commands do everything, including set-up: `make demo` and `make test`. The virtual environment in .venv is made once, and
# updated only if pyproject.toml or constraints.txt changes. uv installs three times as fast as pip, but reads none of its settings:
# pip installs where they name an index, or where uv fails. Python compiles what is imported; all 25,000 files would take a minute.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Images of containers often set it; then each process would compile PyTorch, DeepSpeed and Ray again: five seconds of CPU time.
unexport PYTHONDONTWRITEBYTECODE
UV := uv==0.13.9
install = { ! $(1) -m pip config list | grep -q index-url && $(BIN)/uv pip install --python $(1) $(2); } || \
	$(1) -m pip --disable-pip-version-check install --no-compile --upgrade-strategy eager $(2)

.PHONY: demo test test-newest faults slow soak drills lint docs venv

demo: $(VENV)/installed
	$(BIN)/python -m dis_scale.sweep configs/digits.yaml

# Three processes, also on two cores: while sweeps start and wait in two, the third computes. -v cancels the -q of
# pyproject.toml, which hides pytest's first lines: what is skipped, and why.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -v -n 3 --dist worksteal

# The same tests with the newest packages that pyproject.toml allows, in an environment of their own.
test-newest: | $(BIN)/python
	$(BIN)/python -m venv build/newest
	$(call install,build/newest/bin/python,--upgrade --editable '.[dev]')
	build/newest/bin/python -m pytest -v -n 3 --dist worksteal

# The rows of the tables of faults, and the other tests in which something fails or is stopped, that are too long for `make test`, three
# files at a time: most of their time is waiting. The drills need the machine's network for themselves, so they are one after the other,
# and begin first: the files keep their order. Each row has a line, and the longest are listed at the end. Random kills: `make soak KILLS=20 SEED=1`.
faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -vv -m faults -n 3 --dist loadfile --no-loadscope-reorder --durations=30

# What computes for minutes and breaks nothing: complete sweeps of other kinds, kernels compiled for other GPUs, large listings.
slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -vv -m slow -n 3 --dist loadfile --no-loadscope-reorder --durations=30

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
	$(BIN)/python -m docs.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

venv: $(VENV)/installed

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) here: install Python 3.11 or 3.12, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || { \
		echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), expected Python 3.11 or 3.12: name one, for example make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "error: $(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/python -m pip --disable-pip-version-check install --quiet $(UV)

# The stamps are written last, so an interrupted installation is repeated.
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(BIN)/python,--editable . --constraint constraints.txt)
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(call install,$(BIN)/python,--editable '.[dev]' --constraint constraints.txt)
	@touch $@

# The supply chain: every package with its hashes, the licences, a bill of materials (CycloneDX), the known vulnerabilities. The
# tools are in an environment of their own, so they are not in what they list. `lock` follows each change of constraints.txt.
.PHONY: lock licences sbom audit
SUPPLY := build/supply/bin
LOCK := cluster/requirements.lock

lock: $(SUPPLY)/installed
	{ echo "# Every package of constraints.txt with its hashes, for Python 3.11 and 3.12 on Linux x86_64. Written by: make lock"; \
	  echo "# To install: pip install --require-hashes --requirement $(LOCK) && pip install --no-deps --no-build-isolation --editable ."; \
	  $(SUPPLY)/uv pip compile pyproject.toml --extra dev --constraint constraints.txt --generate-hashes --no-annotate \
	      --no-header --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28; } > build/requirements.lock
	mv build/requirements.lock $(LOCK)

licences: $(SUPPLY)/installed $(VENV)/installed
	$(SUPPLY)/pip-licenses --python $(BIN)/python --from=mixed --format=markdown --with-urls --output-file build/licences.md

# Of the lock, which is what the image installs: an environment may have more.
sbom: $(SUPPLY)/installed
	$(SUPPLY)/cyclonedx-py requirements $(LOCK) --pyproject pyproject.toml --output-reproducible --output-file build/sbom.json
	@echo "sbom: build/sbom.json"

# Without --strict, pip-audit reports no vulnerabilities when its database knows none of the packages.
audit: $(SUPPLY)/installed
	@found=$$($(SUPPLY)/pip-audit --requirement $(LOCK) --require-hashes --disable-pip --strict --progress-spinner off 2>&1); \
	status=$$?; echo "$$found"; \
	case "$$status $$found" in \
	    "0 "*) echo "audit: no known vulnerability" ;; \
	    *"Found "*" known vulnerabilit"*) echo "audit: vulnerable packages: raise their versions in constraints.txt" >&2; exit 1 ;; \
	    *) echo "audit: NOT DONE: the database of vulnerabilities cannot be reached or lacks a package" >&2; exit 1 ;; \
	esac

$(SUPPLY)/installed:
	$(PYTHON) -m venv build/supply
	$(SUPPLY)/python -m pip --disable-pip-version-check install \
	    $(UV) pip-licenses==5.5.5 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	@touch $@
