# `make help` lists the targets. All run in .venv, which `setup` makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TRACKING ?=
PORT ?= 5000

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint ui serve test-cluster test-browser clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup: $(STAMP)  ## make .venv with the tested versions of all packages

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the tested versions of all packages into .venv: minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## train and measure a small model on the CPU (5 to 20 minutes on two cores)
	$(BIN)/ray-sql demo

test: $(STAMP)  ## run the tests that need no cluster, GPU or browser
	$(BIN)/python -m pytest -m "not cluster and not gpu and not browser" -n logical --maxprocesses 4 --dist worksteal

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

ui: $(STAMP)  ## open MLflow on this project's runs (PORT=5000, TRACKING=sqlite:///mlflow.db)
	$(BIN)/ray-sql ui --port $(PORT) $(if $(TRACKING),--tracking.uri '$(TRACKING)')

serve: $(STAMP)  ## serve the demo's tuned model on http://127.0.0.1:8000
	$(BIN)/ray-sql serve --output_name demo

test-cluster: $(STAMP)  ## run the tests that start a cluster, or take most of a minute
	$(BIN)/python -m pytest -m cluster

test-browser: $(STAMP)  ## run the tests that look at pages in Chromium
	$(BIN)/python -m pytest -m browser

clean:  ## remove what can be made again (out/ and mlflow.db stay)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
