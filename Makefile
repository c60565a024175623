PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist worksteal
INSTALLED := .venv/.installed
export PYTHONDONTWRITEBYTECODE :=  # modules are compiled once, and not in every process that a test starts

.PHONY: demo quick test thorough chaos lint ui dashboard notebooks lab clean

demo: $(INSTALLED)  ## generate networks on scikit-learn's digits, and print how good they are
	$(BIN)/mlflow run . -e main -P tag=digits_mlp
	@echo "\`make ui\` starts \`mlflow ui\`"

quick: $(INSTALLED)  ## what to run while working: the tests that are not slow
	$(PYTEST) -m "not slow and not thorough" -x

test: $(INSTALLED)  ## all tests but the thorough ones
	$(PYTEST) -m "not thorough"

thorough: $(INSTALLED)  ## the others: the same proofs on the largest networks, and once more with other kills
	$(PYTEST) -m thorough

chaos: $(INSTALLED)  ## 200 kills of main and 20 of a sweep, at random moments; chaos.csv says what was killed when
	PDIFF_CHAOS=200 PDIFF_CHAOS_RECORD=$(CURDIR)/chaos.csv $(PYTEST) tests/test_chaos.py

lint: $(INSTALLED)  ## style, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

ui: $(INSTALLED)  ## MLflow's user interface
	$(BIN)/mlflow ui

dashboard: $(INSTALLED)  ## Optuna's user interface, of the studies in PDIFF_STORAGE or optuna.db
	$(BIN)/optuna-dashboard $${PDIFF_STORAGE:-sqlite:///optuna.db}

notebooks: $(INSTALLED)  ## run all notebooks again, in place, two at a time; their images take Chrome or Chromium
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/execute.py

lab: $(INSTALLED)  ## open the notebooks
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
