# make build | demo | test | lint | format | sanitize | fuzz | bench | bench-peers | wheel | clean
#
# Everything lives in .venv, build/ and dist/. Versions come from constraints.txt. As root on Debian, missing system packages are
# installed; otherwise what is missing is printed, and steps that can't run say so.

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := build
.SILENT:
MAKEFLAGS   += --no-print-directory

PYTHON ?= python3
JOBS   ?= $(shell nproc)
VENV   := .venv
PY     := $(VENV)/bin/python
DEV    := build/dev
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# Warnings stop the build with the compiler that the project is tested with; a newer compiler's new warnings don't stop a user.
WERROR := $(if $(filter 12,$(shell $(or $(CXX),g++) -dumpversion 2>/dev/null)),ON,OFF)

.PHONY: build demo test lint format sanitize fuzz bench bench-peers wheel clean

# --- build -------------------------------------------------------------------------------------------------------

$(VENV)/.python: constraints.txt pyproject.toml
	scripts/system-packages build
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	echo "== python packages (constraints.txt) into $(VENV)"
	$(PY) -m pip install -qq -c constraints.txt pip
	$(PY) -m pip install -qq -c constraints.txt --group dev numpy msgspec
	touch $@

# Without build isolation: CMake's cache would name a folder that is gone afterwards. In one fixed build tree, so that ninja
# and the tests find it. The editable install knows only the modules that it saw: without an extension it must be done again.
$(VENV)/.editable: $(VENV)/.python pyproject.toml
	[ -e kvtransport/__init__.py ] || { echo "kvtransport/__init__.py is missing: nothing to build" >&2; exit 1; }
	scripts/system-packages build
	echo "== editable install"
	mkdir -p build  # the lock: two installs at once would run two ninjas in one tree
	flock build/.install.lock $(PY) -m pip install -qq --no-build-isolation --no-deps -e . -Cbuild-dir=$(DEV) -Ccmake.define.KVT_WERROR=$(WERROR) \
	    -Ccmake.define.KVT_TESTS=$$(scripts/system-packages has doctest) -Ccmake.define.KVT_SIM=ON -Ccmake.define.KVT_BENCH=ON
	if compgen -G '$(VENV)/lib/python*/site-packages/kvtransport/_native.*.so' > /dev/null; then touch $@; fi

# Always runs ninja, so changed C++ is never missed; does nothing in a tenth of a second when nothing changed.
build: $(VENV)/.editable
	scripts/native-build $(DEV) _native
	scripts/install-extension $(DEV)

demo: build
	$(PY) examples/prefill_decode.py $(ARGS)

# --- checks ------------------------------------------------------------------------------------------------------

test: build
	scripts/system-packages test
	scripts/check all

lint: $(VENV)/.python
	scripts/check lint

format: $(VENV)/.python
	ruff check -q --fix-only
	ruff format -q
	git ls-files --cached --others --exclude-standard 'native/*.[ch]pp' 'bench/limits/*.[ch]pp' | xargs -r clang-format -i

sanitize: $(VENV)/.python
	scripts/system-packages test
	mkdir -p build
	scripts/sanitize

FUZZ_S ?= 600
fuzz: $(VENV)/.python
	scripts/system-packages test
	mkdir -p build
	scripts/fuzz $(FUZZ_S)

# --- bench -------------------------------------------------------------------------------------------------------

bench: build
	scripts/native-build $(DEV) kvt_limits
	$(PY) -m bench $(ARGS)

# NIXL and Mooncake, in a venv of their own: they bring torch and a CUDA build of their libraries.
bench-peers: build
	scripts/native-build $(DEV) kvt_limits
	$(PY) -m bench.peers.setup
	$(PY) -m bench --peers $(ARGS)

# --- wheel -------------------------------------------------------------------------------------------------------

wheel: $(VENV)/.python
	scripts/system-packages build
	mkdir -p dist
	rm -f dist/kvtransport-*.whl
	$(PY) -m pip wheel -qq --no-build-isolation --no-deps -w dist .
	ls -l dist/kvtransport-*.whl

clean:
	rm -rf $(VENV) bench/.venv-peers build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
