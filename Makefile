# Everything from a clean clone: needs Python 3.11 or newer, git and make. `make help` says what there is.
# One thing after the other even under -j: the targets install into one environment.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup models demo run test check clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := $(shell grep '^torch==' constraints.txt)
# The first that is 3.11 or newer and can make environments; choose another: make setup PYTHON=/path/to/python
PYTHONS := python3.13 python3.12 python3.11 python3
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON = $(shell for p in $(PYTHONS); do \
	if $$p -c '$(USABLE)' >/dev/null 2>&1; then echo $$p; break; fi; done)

help: ## show this
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile

setup: $(STAMP) ## create .venv with everything that seallmd needs
	@echo 'ready: $(BIN)/seallmd, $(BIN)/seallmctl'

# An environment whose interpreter went away is made anew. torch comes first, by its exact version: it is by
# far the largest, and what fails after it does not fetch it again.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $@
	@if ! $(BIN)/python -c '$(USABLE)' >/dev/null 2>&1; then \
		python='$(PYTHON)'; \
		if [ -z "$$python" ]; then \
			echo 'Python 3.11 or newer with its venv module is needed' >&2; \
			echo '(Debian and Ubuntu: apt install python3 python3-venv)' >&2; \
			exit 1; \
		fi; \
		echo "creating $(VENV) with $$python"; \
		$$python -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

models: $(STAMP) ## fetch two small real models into models/ (315 MiB, once)
	@$(BIN)/python -m tools.fetch_models

demo: $(STAMP) models ## start the daemon, stream from all models at once, stop it again
	@$(BIN)/python -m tools.demo

run: $(STAMP) models ## run the daemon in the foreground with seallmd.toml
	@exec $(BIN)/seallmd --config seallmd.toml

test: $(STAMP) models ## all tests, with the real models
	$(BIN)/python -m pytest

check: $(STAMP) ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

clean: ## remove what make has made; models/ stays
	rm -rf $(VENV) build seallmd.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
