# Two commands do everything: `make demo` and `make test`. Both make .venv first if it is not there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# uv does pip's work on all cores; pip follows where uv does not reach the index that pip is set up for
INSTALL = $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt $(1) \
	|| $(PIP) -c constraints.txt $(1)

.PHONY: demo test test-all lint docs check-gpu clean

demo: $(VENV)/.installed
	$(BIN)/espalier sweep experiments/demo.yaml

# side by side what needs no cluster; what starts one has the machine for itself
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --max-worker-restart 0 -m "not cluster and not long"
	$(BIN)/python -m pytest -m "cluster and not long"

test-all: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m ""

# at most nine minutes on a GPU; takes any Python that has torch and timm, the one of .venv where it is there
check-gpu:
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) experiments/benchmarks/check_gpu.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# the site, in docs/_build; a warning is an error
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt uv

# the exact versions of constraints.txt; markers are written last, so that a broken install is repeated
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/uv
	$(call INSTALL,-e .)
	touch $@

# all of that, and what tests, formats for engines and documentation need
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/uv
	$(call INSTALL,-e '.[dev]')
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) runs docs/_build
