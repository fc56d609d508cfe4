# Everything from a fresh clone: each target sets up .venv first, and rebuilds what changed. Needs python3 (3.11 or later,
# with venv and headers), a C compiler, and make; as root on Debian or Ubuntu what is missing of these is installed.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
RUN := PATH="$(BIN):$$PATH"
# One build at a time, also when two makes run at once.
LOCK := $(shell command -v flock >/dev/null && echo flock $(VENV)/.lock)

C_SOURCES := $(wildcard shim/libnsn/*.c shim/libnsn/*.h shim/fast/*.c shim/fast/*.h nsnd/relay/*.c nsnd/relay/*.h)
PY_SOURCES := $(shell find insane_nats shim nsnd -name '*.py' -not -path 'insane_nats/shim/*' 2>/dev/null)
BUILD_FILES := pyproject.toml README.md LICENSE tools/cdef.py $(shell find . -name meson.build -not -path './build/*' -not -path './.venv/*')

.PHONY: all install demo test fuzz bench lint clean
.DELETE_ON_ERROR:

all: install

$(VENV)/.tools: pyproject.toml tools/setup_venv.sh
	@PYTHON="$(PYTHON)" sh tools/setup_venv.sh $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.tools $(C_SOURCES) $(PY_SOURCES) $(BUILD_FILES)
	@echo "building and installing insane_nats into $(VENV)"
	@$(RUN) $(LOCK) $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall --config-settings=build-dir=build/install .
	@touch $@

install: $(VENV)/.installed

demo: install
	@$(RUN) $(BIN)/python -m examples.demo

test: install
	@$(RUN) sh -c 'python -m pytest tests $(PYTEST_ARGS); parts=$$?; python -m pytest compat_tests $(PYTEST_ARGS); exit $$((parts | $$?))'

# Seconds for each target; FUZZ_TARGETS names some of them.
FUZZ_SECONDS ?= 60
fuzz: install
	@$(RUN) $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

bench: install
	$(RUN) $(BIN)/python -m benchmarks $(BENCH_ARGS)
	$(RUN) $(BIN)/python -m benchmarks.c

lint: install
	$(RUN) $(BIN)/python -m tools.lint

clean:
	rm -rf build dist $(VENV) .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
