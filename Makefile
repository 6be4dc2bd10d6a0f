# make demo   a fresh environment, then meta-training on sinusoids: the numbers and the plot
# make test   a fresh environment, then everything that CI checks; stops at the first failure
# make soak   what takes too long for that: many random cases, the thread sanitizer
# make build  the C++ core in place, for work in this folder with the environment at hand
# make lint   what pre-commit runs too

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
# Where the tools are: "" is the environment at hand; a path ends with a slash.
BIN ?=
PY := $(BIN)python
STAGE := .ci/stage
comma := ,

# Every pip, and the isolated builds that it starts, through the tested versions.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

TEST_ENV := .venv-test
DEMO_ENV := .venv-demo
# Tests run from a folder without the sources, so that they see what was installed.
OUTSIDE := build/outside

.PHONY: help demo test soak lint build install-test suite isa packaging sanitize sanitize-thread \
	bench-smoke outside clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo:
	$(PYTHON) -m venv --clear $(DEMO_ENV)
	rm -rf build/lib*
	$(DEMO_ENV)/bin/pip install -q -c constraints.txt ".[plot]"
	$(DEMO_ENV)/bin/python -I -m fastmeta.recipes.demo

# A machine that runs this has a compiler; without one the tests of the core may not just skip.
test: export FASTMETA_REQUIRE := cpp$(if $(FASTMETA_DATA),$(comma)data)
test: export FASTMETA_WERROR := 1
test: IN := BIN=$(CURDIR)/$(TEST_ENV)/bin/
test:
	@rm -f build/times
	@$(STAGE) install $(MAKE) -s install-test
	@$(STAGE) lint $(MAKE) -s lint $(IN)
	@$(STAGE) packaging $(MAKE) -s packaging $(IN)
	@$(STAGE) "instruction sets" $(MAKE) -s isa $(IN)
	@$(STAGE) sanitizers $(MAKE) -s sanitize $(IN)
	@$(STAGE) benchmarks $(MAKE) -s bench-smoke $(IN)
	@$(STAGE) tests $(MAKE) -s suite $(IN)
	@echo; echo "== seconds"; cat build/times

install-test:
	$(PYTHON) -m venv --clear $(TEST_ENV)
	rm -rf build/lib*
	$(TEST_ENV)/bin/pip install -q -c constraints.txt ".[dev]"

lint:
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy --strict
	$(BIN)lint-imports --no-logo

outside:
	rm -rf $(OUTSIDE)
	mkdir -p $(OUTSIDE)
	cp -r tests benchmarks pyproject.toml README.md $(OUTSIDE)

# The packaging tests read the repository and so have a stage of their own.
suite: outside
	cd $(OUTSIDE) && $(PY) -m pytest tests --ignore=tests/packaging

packaging:
	$(PY) -m pytest -q tests/packaging

# The tests marked native, once more for each instruction set of this processor but the last: that
# is the one the other stages run unforced. (With one set alone, that one.) Left out are the tests
# that go through every set themselves, by `everywhere`, wherever none is forced.
LOOPS := test_float64 test_float32 test_directed test_extreme_values
isa: outside
	cd $(OUTSIDE); \
	isas=$$($(PY) -c "import torch, fastmeta._core as c; print(*(c.isas()[:-1] or c.isas()))"); \
	test -n "$$isas" || { echo "isa: the core names no instruction set" >&2; exit 1; }; \
	for isa in $$isas; do FASTMETA_ISA=$$isa $(PY) -m pytest -q tests --ignore=tests/packaging \
		-m native $(LOOPS:%=--deselect tests/inner_loop/test_fused.py::%); done

# The same tests on a core built with sanitizers: $(1) which, $(2) the runtime, $(3) its options.
# Python itself is not built with them, so g++'s runtime is loaded before it; libstdc++ too, so that
# the sanitizer finds the functions behind C++ exceptions.
define sanitized
	FASTMETA_SANITIZE=$(1) $(PY) setup.py -q build --build-base build/$(2) \
		--build-lib build/$(2)/lib
	lib() { $${CXX:-c++} -print-file-name=$$1.so; }; \
	cd $(OUTSIDE) && PYTHONPATH=$(CURDIR)/build/$(2)/lib $(3) \
		LD_PRELOAD="$$(lib lib$(2)) $$(lib libstdc++)" \
		$(PY) -m pytest -q tests --ignore=tests/packaging -m native -p no:faulthandler \
		--capture=sys  # a report goes to the descriptor, which pytest would keep to itself
endef

sanitize: outside
	$(call sanitized,address$(comma)undefined,asan,ASAN_OPTIONS=detect_leaks=0)

# Only the std::thread build: the thread sanitizer reports false races from OpenMP's barriers.
sanitize-thread: outside
	$(call sanitized,thread,tsan,TSAN_OPTIONS=ignore_noninstrumented_modules=1)

bench-smoke: outside
	cd $(OUTSIDE) && $(PY) -m pytest -q benchmarks --benchmark-disable

soak: export HYPOTHESIS_PROFILE := soak
soak: outside
	cd $(OUTSIDE) && PYTHONPATH=$(CURDIR) $(PY) -m pytest tests --ignore=tests/packaging
	$(MAKE) -s sanitize-thread

build:
	$(PY) setup.py build_ext --inplace

clean:
	rm -rf build dist *.egg-info $(TEST_ENV) $(DEMO_ENV) fastmeta/_core*.so
