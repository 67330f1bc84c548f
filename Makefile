PYTHON ?= python3
BIN := .venv/bin
COMPAT := .venv-compat
COMPAT11 := .venv-compat-1.1
PIP := -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install environments demo test test-all faults chaos lint format bench fuzz protos docs-check clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

install: .venv/.dev  ## Make .venv with everything for development

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old: set PYTHON to 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "installing python3-venv"; apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --upgrade pip

.venv/.demo: pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP) -e '.[demo]'
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP) -e '.[dev]'
	@touch $@ .venv/.demo

# The published packages pin their dependencies, so they get an environment of their own, this package beside them.
$(COMPAT)/.done: pyproject.toml | .venv/bin/python
	@rm -rf $(COMPAT)
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then \
		$(BIN)/python -m venv $(COMPAT) && $(COMPAT)/bin/python $(PIP) scaleout==1.0.7 -e . ; \
	else mkdir -p $(COMPAT); echo "scaleout 1.0.7 does not install on this Python: tests/compat will be skipped"; fi
	@touch $@

# The numpy that 1.1.0 pins needs Python 3.12: ours, or another that is found. Files alone go between it and our tests.
$(COMPAT11)/.done: | .venv/bin/python
	@rm -rf $(COMPAT11); mkdir -p $(COMPAT11)
	@for python in $(BIN)/python python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[23].*/bin/python); do \
		if $$python -c 'import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))' 2>/dev/null; then \
			$$python -m venv $(COMPAT11) && $(COMPAT11)/bin/python $(PIP) scaleout==1.1.0 && touch $@; exit; \
		fi; \
	done; echo "no Python 3.12 or 3.13 for scaleout 1.1.0: its tests will be skipped"; touch $@

# With -j 3 at the same time: each of them waits for its downloads.
environments: .venv/.dev $(COMPAT)/.done $(COMPAT11)/.done

demo: .venv/.demo  ## Run a federated session on this machine, with tasks that misbehave
	$(BIN)/scaleout-mp demo

# The tests start hundreds of interpreters: none of them shall have to compile this package, whatever the environment says.
test test-all faults chaos: export PYTHONDONTWRITEBYTECODE :=

# Two at a time: most of them wait. Many measure time, so what failed beside others has to hold alone.
test:  ## Run the tests
	@$(MAKE) --no-print-directory -j 3 environments
	@$(BIN)/python -m compileall -q -j 0 scaleout_mp
	$(BIN)/python -m pytest -n 2 --dist worksteal || \
		$(BIN)/python -m pytest --last-failed --last-failed-no-failures none

chaos: .venv/.dev  ## Three minutes of a session in which everything breaks; CHAOS_SECONDS and CHAOS_SEED say how long, and which
	CHAOS_SECONDS=$${CHAOS_SECONDS:-180} $(BIN)/python -m pytest -q -s tests/integration/test_chaos.py

test-all: .venv/.dev $(COMPAT)/.done $(COMPAT11)/.done  ## Run the tests with all variants, which takes half an hour
	SCALEOUT_MP_ALL_TESTS=1 SCALEOUT_MP_FAULT_LEVELS=none,basic,auto,strict $(BIN)/python -m pytest

faults: .venv/.dev  ## Perform every fault at every level, as root (where it is root) and as an ordinary user
	SCALEOUT_MP_ALL_TESTS=1 SCALEOUT_MP_FAULT_LEVELS=none,basic,auto,strict $(BIN)/python -m pytest tests/integration/faults

lint: .venv/.dev  ## Check style, types, layers and docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev  ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.venv/.bench: pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP) -e '.[dev,bench]'
	@touch $@ .venv/.dev .venv/.demo

bench: .venv/.bench  ## Measure against peers, side by side; BENCH_JSON=FILE keeps the figures as JSON lines
	$(BIN)/python -m benchmarks

.venv/.fuzz: pyproject.toml | .venv/bin/python
	$(BIN)/python $(PIP) -e '.[fuzz,fast]'
	@touch $@

fuzz: .venv/.fuzz  ## Feed the model reader invented bytes for a minute
	$(BIN)/python tests/fuzz/fuzz_model.py

protos: $(COMPAT)/.done  ## Generate the message code anew from protos/
	$(COMPAT)/bin/python -m grpc_tools.protoc -Iprotos --python_out=. --pyi_out=. protos/scaleout_mp/wire/edge.proto

docs-check: .venv/.dev  ## Check that what the docs refer to exists, and what they show runs
	$(BIN)/python -m pytest -q tests/unit/test_docs.py tests/unit/test_docs_blocks.py

clean:  ## Remove environments and caches
	rm -rf .venv $(COMPAT) $(COMPAT11) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
