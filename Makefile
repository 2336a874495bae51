# Every target does its own set-up in .venv. Nothing but Python >= 3.11 and make is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED ?= 0
# Some machines set it; every process of a cluster would compile all of this project's modules again.
unexport PYTHONDONTWRITEBYTECODE
DEMO ?= demo

.PHONY: help demo demo-scenes playground serve mlflow check test lint clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python >= 3.11 is needed: make PYTHON=python3.12 ..." && exit 1)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $@

$(VENV)/.scenes: $(VENV)/.demo
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[scenes]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo benchmarks/requirements-lmms-eval.txt
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target $(VENV)/lmms-eval -r benchmarks/requirements-lmms-eval.txt
	@touch $@

demo: $(VENV)/.demo  ## prepare, train, evaluate, register, serve and ask, end to end on a laptop
	$(BIN)/python -m jobs.demo

demo-scenes: $(VENV)/.scenes  ## the same on drawings by many artists, evaluated on one never seen; needs npm
	$(BIN)/python -m jobs.demo configs/demo/emoji_scenes_small.yaml

playground: $(VENV)/.demo  ## open a page to try the demo's model on (DEMO=emoji_scenes_small: the other demo's)
	$(BIN)/python -m jobs.serve configs/serve/$(DEMO).yaml --open

serve: $(VENV)/.demo  ## keep the demo's registered model up on http://127.0.0.1:8000
	$(BIN)/python -m jobs.serve configs/serve/$(DEMO).yaml

mlflow: $(VENV)/.demo  ## open the tracking pages on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow server --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///runs/mlflow.db} --workers 1 --host 127.0.0.1 --port 5000

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint  ## lint, types and the fast tests (about 10 minutes on two cores)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test: check  ## lint, types and all tests
	$(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadfile --durations=20
	$(BIN)/python -m pytest -m "slow and alone" --durations=20

clean:  ## remove the virtual environment and everything the runs wrote
	rm -rf $(VENV) runs
