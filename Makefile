# Everything from a clean clone: needs Python 3.11 or newer, git and make. `make help` says what there is.
# One thing after the other even under -j: the targets install into one environment.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup models demo run test check browser systemd triton clients install install-program install-files uninstall clean

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

test: $(STAMP) models browser systemd triton clients ## all tests, with the real models and real clients
	$(BIN)/python -m pytest

# What some tests need of the system, by its package manager or not at all: without it those tests are skipped.
# $(call package,NAME,COMMANDS,TESTS): one of the commands has to be there.
define package
@for name in $(2); do \
	if command -v $$name >/dev/null 2>&1; then exit 0; fi; \
done; \
if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	echo 'installing $(1) for $(3)'; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq update >/dev/null 2>&1; \
	if apt-get -qq install -y --no-install-recommends $(1) >/dev/null 2>&1; then exit 0; fi; \
fi; \
echo 'no $(1) here (apt install $(1)): $(3) are skipped'
endef

browser:
	$(call package,chromium,chromium chromium-browser google-chrome google-chrome-stable,the tests of the page in a browser)

# systemd-analyze and systemd-socket-activate; nothing is started.
systemd:
	$(call package,systemd,systemd-analyze,the tests of the units)

# For the operations of GPUs, which its interpreter and its compiler run without one. Not among the requirements:
# torch for GPUs brings the version that it wants, and there is none for every machine.
TRITON := triton==3.9.0
triton: $(STAMP)
	@$(BIN)/python -c 'import triton' 2>/dev/null || \
		$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps $(TRITON) || \
		echo 'no $(TRITON) for this machine: the tests of the operations of GPUs are skipped'

# Other people's clients, for tests/e2e/clients: their versions exclude each other and ours, so they live in
# environments of their own. Every package is pinned, so that nothing has to be resolved: a minute, once.
CLIENTS := .clients
clients: $(CLIENTS)/openai-1/installed $(CLIENTS)/others/installed ## install the clients that tests use (1 GiB)

$(CLIENTS)/%/installed: tests/e2e/clients/%.txt $(STAMP)
	@rm -f $@
	@echo 'installing into $(CLIENTS)/$*'
	@$(BIN)/python -m venv --clear $(CLIENTS)/$*
	@$(CLIENTS)/$*/bin/python -m pip install --disable-pip-version-check --quiet --no-compile --no-deps -r $<
	@touch $@

check: $(STAMP) ## lint, format, types, layering
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# Where `make install` puts things, and a directory before all of it for those who build packages.
PREFIX ?= /usr/local
DESTDIR ?=
UNITS := seallmd.service seallmd.socket seallmd-control.socket
SYSTEMD := $(DESTDIR)$(PREFIX)/lib/systemd/system
LIBRARY := $(DESTDIR)$(PREFIX)/lib
PLACED = sed 's|/usr/local|$(PREFIX)|g'

install: install-program install-files ## install with units for systemd, as root: PREFIX=/usr/local, DESTDIR=
ifeq ($(DESTDIR),)
	systemd-sysusers $(PREFIX)/lib/sysusers.d/seallmd.conf
	systemd-tmpfiles --create $(PREFIX)/lib/tmpfiles.d/seallmd.conf
	chgrp seallmd /etc/seallmd /etc/seallmd/seallmd.toml
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo 'now: list your models in /etc/seallmd/seallmd.toml, then'
	@echo '     systemctl enable --now seallmd.socket seallmd-control.socket seallmd.service'
endif

# An environment of its own beside the files of the system; started as `python -m`, so that it works wherever
# DESTDIR is moved to.
install-program:
	@python='$(PYTHON)'; \
	if [ -z "$$python" ]; then echo 'Python 3.11 or newer with its venv module is needed' >&2; exit 1; fi; \
	$$python -m venv --clear $(LIBRARY)/seallmd
	$(LIBRARY)/seallmd/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(LIBRARY)/seallmd/bin/python -m pip install --disable-pip-version-check -c constraints.txt .
	rm -rf build

install-files:
	install -d $(DESTDIR)$(PREFIX)/bin $(SYSTEMD) $(LIBRARY)/sysusers.d $(LIBRARY)/tmpfiles.d
	install -d $(DESTDIR)$(PREFIX)/share/doc/seallmd
	install -d -m 0750 $(DESTDIR)/etc/seallmd
	for unit in $(UNITS); do $(PLACED) systemd/$$unit > $(SYSTEMD)/$$unit && chmod 0644 $(SYSTEMD)/$$unit; done
	install -m 0644 systemd/seallmd.sysusers $(LIBRARY)/sysusers.d/seallmd.conf
	install -m 0644 systemd/seallmd.tmpfiles $(LIBRARY)/tmpfiles.d/seallmd.conf
	for pair in seallmd:seallmd seallmctl:seallmd.ctl.main; do \
		file=$(DESTDIR)$(PREFIX)/bin/$${pair%%:*}; \
		printf '#!/bin/sh\nexec %s -m %s "$$@"\n' $(PREFIX)/lib/seallmd/bin/python $${pair#*:} > $$file; \
		chmod 0755 $$file; \
	done
	install -m 0644 docs/operations.md docs/configuration.md docs/exit-codes.md docs/reliability.md SECURITY.md $(DESTDIR)$(PREFIX)/share/doc/seallmd
	[ -e $(DESTDIR)/etc/seallmd/seallmd.toml ] || \
		install -m 0640 systemd/seallmd.toml $(DESTDIR)/etc/seallmd/seallmd.toml

uninstall: ## remove what install has put there; configuration, models, cache and the user stay
ifeq ($(DESTDIR),)
	-if [ -d /run/systemd/system ]; then systemctl disable --now $(UNITS); fi
endif
	rm -rf $(LIBRARY)/seallmd $(DESTDIR)$(PREFIX)/share/doc/seallmd
	rm -f $(addprefix $(SYSTEMD)/,$(UNITS))
	rm -f $(LIBRARY)/sysusers.d/seallmd.conf $(LIBRARY)/tmpfiles.d/seallmd.conf
	rm -f $(DESTDIR)$(PREFIX)/bin/seallmd $(DESTDIR)$(PREFIX)/bin/seallmctl
ifeq ($(DESTDIR),)
	if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
endif

clean: ## remove what make has made; models/ stays
	rm -rf $(VENV) $(CLIENTS) build seallmd.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
