# `make demo` and `make test` set everything up on a machine with Python 3.11+, g++ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: errors are shown, warnings about how pip is configured on this machine are not.
PIP := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --quiet --disable-pip-version-check
SOURCES := $(shell find include csrc bindings tests examples -name '*.cpp' -o -name '*.h' -o -name '*.c')
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(shell find cmake -type f) \
    $(shell find include csrc bindings -name '*.cpp' -o -name '*.h')

.PHONY: demo live test test-fast lint kernels wheel clean

build/venv: Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "pip>=24" "setuptools>=77" "pybind11>=3.0,<4" "cmake>=3.22" "ninja>=1.11" \
	    "scipy-openblas32>=0.3.29,<0.4" "nvidia-nvtx>=13.0,<14"
	mkdir -p build && touch $@

# The engine itself, in place: what `make demo` needs.
build/installed: build/venv $(BUILD_FILES)
	$(PIP) --no-build-isolation --editable .
	touch $@

# The tools of `make test`, Triton and the CUDA headers among them.
build/tools: build/installed pyproject.toml
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

# The small trained model in examples/talker.
demo: build/installed
	mkdir -p out
	$(BIN)/liveact demo --out out/demo.mp4
	@echo "Open out/demo.mp4: a drawing that says what examples/speech.wav says."

# What a server needs besides.
build/server: build/installed pyproject.toml
	$(PIP) --no-build-isolation --editable ".[serve]"
	touch $@

# A page to talk to: the small trained model on this machine, until Ctrl-C.
live: build/server
	$(BIN)/liveact serve

lint: build/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

# A worker per core, whole files at a time; the slowest tests are named.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations=20

# Everything; what measures time or memory at the end, one after the other.
test: lint
	$(PYTEST) -m "not alone"
	$(BIN)/python -m pytest -m alone

# Without what takes more than some 2 s: sanitizers, the interpreter end to end, long sessions, processes.
test-fast: lint
	$(PYTEST) -m "not slow and not alone"

# GPU kernels for Hopper into the package: with them the engine can use a GPU. The attention kernel in
# Gluon is left out until it has run on one: kernels that may hang are for `benchmarks/gpu.sh` to try.
kernels: build/tools
	$(BIN)/python -m triton_kernels.compile --arch sm_90a --out engine/liveact/gpu \
	    --leave-out self_attention.f8.hopper

# Wheels that need neither Triton nor a CUDA toolkit nor a compiler, with the model of the demo and the
# SDK for C++ and C, one for each of PYTHONS. auditwheel names them after the oldest glibc that they run on.
PYTHONS ?= $(BIN)/python
wheel: kernels
	rm -rf engine/liveact/bundle build/lib.* build/bdist.* build/wheel
	mkdir -p engine/liveact/bundle
	cp -r examples/talker examples/portrait.png examples/speech.wav engine/liveact/bundle
	for python in $(PYTHONS); do rm -rf build/lib.* && \
	    $$python -m pip wheel --quiet --no-deps --wheel-dir build/wheel . || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf build out dist engine/liveact/gpu engine/liveact/bundle engine/liveact/sdk $(VENV)
