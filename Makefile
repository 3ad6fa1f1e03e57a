# `make demo` and `make test` work on a machine with nothing but Python 3.11+, make and a C compiler.
# To take packages from elsewhere, or a CPU build of torch on a machine without a GPU, set pip's own variables
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_OUT := benchmark_results
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -c 3)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: install demo test unit bench parity check format clean

install: $(STAMP)

$(STAMP): setup.py requirements/cpu.txt requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),GPU)
	$(PIP) -r requirements/dev.txt --editable .
else
	@echo "No GPU found: installing for the CPU"
	$(PIP) -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps vllm==0.32.0
	$(PIP) --no-deps --no-build-isolation --editable .
endif
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# The unit tests share two cores; the others start processes of their own.
test: unit
	$(BIN)/python -m pytest tests/distributed tests/e2e

unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit -n 2 --dist loadfile

# A short version of every benchmark; benchmarks/README.md says what each shows.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.cfg_speedup --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.throughput --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.serving --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.engine_overhead --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.trace_steps --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.burst --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.simulate --quick --out $(BENCH_OUT)

# Every family against diffusers' own pipeline: model | mode | max abs diff | bitwise across cfg sizes.
parity: $(STAMP)
	$(BIN)/python -m benchmarks.parity

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info demo_output $(BENCH_OUT) .pytest_cache .mypy_cache .ruff_cache
