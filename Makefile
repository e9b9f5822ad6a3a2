# `make help` lists what there is. Everything runs in .venv, which `setup` makes and the rest depends on.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TRACKING ?= sqlite:///$(CURDIR)/mlflow.db

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-cluster lint ui clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## train and measure a small model on this machine's CPU (5 to 13 minutes on two cores)
	$(BIN)/python -m jobs.demo

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m "not cluster and not gpu and not browser"

test-cluster: $(STAMP)  ## run the tests that start a cluster, or take most of a minute
	$(BIN)/python -m pytest -m cluster

lint: $(STAMP)  ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

ui: $(STAMP)  ## open the MLflow UI on http://127.0.0.1:5000
	@echo "Open http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning (or choose Model training in its corner)"
	$(BIN)/mlflow ui --backend-store-uri $(TRACKING) --host 127.0.0.1 --port 5000

clean:  ## remove what can be made again (not out/ and not mlflow.db)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
