# Every target does the set-up it needs, once, in .venv; constraints.txt pins the versions.
# Another interpreter: make PYTHON=/path/to/python3.12 demo

FUZZ_SECONDS ?= 600
# Test files at a time; more than 4 need more memory than a small machine has.
TEST_JOBS ?= $(shell cores=$$(nproc 2> /dev/null || echo 1); echo $$((cores < 4 ? cores : 4)))
PYTHON ?= $(shell sh -c 'command -v python3.11 || command -v python3')
BIN := .venv/bin
export JLLM_ASSETS ?= $(HOME)/.cache/jllm-assets
# DeepSpeed finds its launcher, and ninja to compile with, on the PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup assets demo demo-lora test test-families templates fuzz lint bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

demo: .venv/.stamp-demo ## the main job on real text with a real model, in demo-run/ (a few minutes on 2 cores)
	$(BIN)/python tools/demo.py

demo-lora: .venv/.stamp-dev ## LoRA on questions and answers (DATA=FILE for others), merged, in demo-run/lora (some minutes)
	$(BIN)/python tools/demo_lora.py $(if $(DATA),--data $(DATA))

test: .venv/.stamp-dev fetch-assets ## every test (PYTEST_ARGS="-k shuffle" for some; JLLM_TEST_SIZE sizes the slow ones)
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadgroup $(PYTEST_ARGS)

test-families: .venv/.stamp-dev ## every causal model type of transformers in stages, and docs/families.md (half an hour)
	$(BIN)/python tools/test_families.py

templates: .venv/.stamp-dev fetch-assets ## all tokenizers at hand with all built-in templates, and docs/templates.md (a minute)
	$(BIN)/python tools/walk_templates.py

fuzz: .venv/.stamp-dev ## every reader against changed files, for FUZZ_SECONDS (ten minutes); FUZZ_ARGS="--seed 1" for the same again
	$(BIN)/python -m tests.security.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

lint: .venv/.stamp-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.stamp-dev fetch-assets ## every script of benchmarks/: one JSON line each
	@for script in $$(grep -l __main__ benchmarks/*.py); do $(BIN)/python "$$script" || exit 1; done

setup: .venv/.stamp-dev assets ## everything the other targets need

assets: .venv/.stamp-demo ## tokenizers and the small model that tests and the demo use, into $JLLM_ASSETS
	$(BIN)/python tools/get_assets.py

clean: ## remove what the targets made, except .venv and the assets
	rm -rf demo-run build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# Tests that need the assets skip with a reason where they could not be fetched, so a failure is no error here.
.PHONY: fetch-assets
fetch-assets: .venv/.stamp-dev
	@$(BIN)/python tools/get_assets.py > /dev/null || echo "going on without the missing assets"

.venv/.stamp-demo .venv/.stamp-dev: .venv/.stamp-%: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: jllm needs Python 3.11 or newer; name one with: make PYTHON=...")'
	@$(BIN)/python -c '' 2> /dev/null || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[$*]'
	@touch $@
