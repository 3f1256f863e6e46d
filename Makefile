# `make demo` and `make test` need python >= 3.11 with its venv module, and a package index; nothing else.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHECKS := $(VENV)/.installed-checks
EXTRAS ?= cpu
CHECK_EXTRAS ?= dev,report,tasks,docs,gguf
PYTHON ?=
CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
WORKERS ?= 2
SUITE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 30
DEMO := build/demo-bundle
ONNX := build/demo-onnx
PACKAGE := build/package
NATIVE := $(VENV)/.native
NATIVE_FILES := $(shell find exporters/native -name build -prune -o -type f -print)

.DEFAULT_GOAL := help
.PHONY: help demo test coverage lint clean native sanitize package docs fuzz mutate

help:  ## list the targets
	@sed -n 's/^\([a-z.]*\):[^#]*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

demo: $(STAMP)  ## convert the embedded model, measure it, show its units, export it and run it on ONNX Runtime
	@$(MAKE) --no-print-directory native || echo "the native operator library was not built: portable operators will be used"
	$(BIN)/irc convert demo -o $(DEMO) --sparsity 0.25 --force
	$(BIN)/irc eval $(DEMO)
	$(BIN)/irc inspect $(DEMO)
	$(BIN)/irc export $(DEMO) -o $(ONNX) --force
	$(BIN)/irc verify $(ONNX)
	$(BIN)/irc generate $(ONNX) "def read_lines(path):" --max-tokens 80

test: lint native  ## lint, then run the tests, on two cores; WORKERS=8 for more
	$(SUITE)

coverage: $(CHECKS) native  ## run the tests and say which lines and branches they reach; fails under 90 %
	$(SUITE) --cov --cov-report=term

native: $(STAMP)  ## build and install the native operator library, where there is a C++ compiler
	@if command -v $${CXX:-c++} >/dev/null; then $(MAKE) --no-print-directory $(NATIVE); \
	else echo "no C++ compiler: the native operator library is not built, portable operators will be used"; fi

$(NATIVE): $(STAMP) $(NATIVE_FILES)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --force-reinstall ./exporters/native
	@touch $@

sanitize: $(CHECKS)  ## run the kernels' tests on a build with the address and undefined-behaviour sanitizers
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --upgrade --no-deps --target build/sanitize \
	  --config-settings cmake.define.IRC_SANITIZE=ON ./exporters/native
	PYTHONPATH=build/sanitize LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/exporters/test_native_ops.py \
	  tests/exporters/test_native_attention.py tests/exporters/test_native_products.py tests/exporters/test_native_memory.py

lint: $(CHECKS)  ## ruff, mypy --strict, the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

package: $(CHECKS)  ## build the wheel and the source distribution, and try the wheel in a fresh environment
	rm -rf $(PACKAGE)
	$(BIN)/python -m build --outdir $(PACKAGE) .
	IRC_PACKAGE=$(PACKAGE) $(BIN)/python -m pytest tests/irc/test_package.py
	@ls -l $(PACKAGE)

docs: $(CHECKS)  ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --config-file .mkdocs.yml
	@echo "documentation: build/site/index.html"

fuzz: $(CHECKS)  ## feed every loader ten million bytes of mutated files and more; FUZZ_BYTES=..., FUZZ_SECONDS=... of atheris
	IRC_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),60) IRC_FUZZ_BYTES=$(or $(FUZZ_BYTES),10000000) $(BIN)/python -m pytest tests/irc/fuzz --timeout 7200

mutate: $(CHECKS)  ## run the tests of passes/ on mutants of it; MUTATE='--only match.py' or others, see its --help
	@$(BIN)/python -c 'import mutmut, coverage' 2>/dev/null \
	  || $(BIN)/python -m pip install --disable-pip-version-check --quiet 'mutmut>=3.8,<3.9' 'coverage>=7.6,<8'
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -W ignore tests/mutation/mutate.py $(MUTATE)

clean:  ## remove build/ and the caches; .venv stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is older than pyproject.toml whenever the requirements may have changed.
# PYTHON=... chooses the interpreter of a new .venv; EXTRAS=gpu installs ONNX Runtime for CUDA in place of the CPU build.
$(STAMP): pyproject.toml
	@$(BIN)/python -c '' 2>/dev/null || { \
	  for python in $(CANDIDATES); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	      echo "$$python -m venv $(VENV)"; rm -rf $(VENV); exec $$python -m venv $(VENV); \
	    fi; \
	    found="$$found $$($$python --version 2>&1 | sed -n 's/^Python //p')"; \
	  done; \
	  set -- $$found; \
	  echo "error: no python >= 3.11 with the venv module among '$(CANDIDATES)' (found: $${*:-none});" \
	       "install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(EXTRAS)]'
	@touch $@

# What the tests, the checks and the documentation need beyond the tool.
$(CHECKS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[$(EXTRAS),$(CHECK_EXTRAS)]'
	@touch $@
