# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder is touched.

VENV ?= .venv
BIN := $(VENV)/bin

# The first interpreter that starts and is new enough. A name on PATH proves nothing: a version manager's stub for an
# interpreter that is not selected exists and fails, so each candidate is run.
CANDIDATES := python3 python3.12 python3.11 python3.13 python3.14
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	if $$name -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then echo $$name; break; fi; done)

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## make .venv with the package (editable) and the tools its tests need

# The stamp is newer than what decides the contents of .venv, so a second call has nothing to do.
$(VENV)/.installed: setup.py constraints.txt
	@test -n "$(PYTHON)" && "$(PYTHON)" -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "error:" \
		"no Python 3.11 or newer ('$(PYTHON)'): install one, or name it: make install PYTHON=/path/to/python3" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	@touch $@

quickstart: install ## a corpus, a base, LoRA under TP=2 beside full fine-tuning, and a report, on this CPU
	$(BIN)/lora-megatron quickstart --out runs/quickstart

lint: install ## ruff, its formatter in check mode, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then every test this machine can run but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: test ## the same and the slow ones: the whole quickstart, held to its promises
	$(BIN)/python -m pytest -m slow

clean: ## remove .venv, caches, build products and runs/quickstart
	rm -rf $(VENV) build dist runs/quickstart .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
