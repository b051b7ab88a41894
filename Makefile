# `make demo` and `make test` set everything up on a machine with Python 3.11+, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc bindings -name '*.cpp' -o -name '*.h')
STAMP := build/installed

.PHONY: demo test lint clean

$(STAMP): pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade "pip>=24" "setuptools>=77" \
	    "pybind11>=3.0,<4" "cmake>=3.22" "ninja>=1.11" "scipy-openblas32>=0.3.29,<0.4"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check \
	    --no-build-isolation --editable ".[dev]"
	mkdir -p build && touch $(STAMP)

demo: $(STAMP)
	mkdir -p out
	$(BIN)/liveact demo-checkpoint out/checkpoint
	$(BIN)/liveact generate --checkpoint out/checkpoint --image examples/portrait.png \
	    --audio examples/speech.wav --prompt "A person is speaking." --size 256x256 \
	    --trace out/trace.json --out out/demo.mp4

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf build out $(VENV)
