# `make demo` and `make test` work on a machine with nothing but Python 3.11+, make and a C compiler.
# To take packages from elsewhere, or a CPU build of torch on a machine without a GPU, set pip's own variables
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# `make test VLLM=0.32.0` tests with the other release of vLLM that is supported; `smoke` is a short way through everything.
INSTALLED_VLLM := 0.33.0
VLLM := $(INSTALLED_VLLM)
STAMP := $(VENV)/.installed
BENCH_OUT := benchmark_results
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -c 3)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

PYTEST := $(BIN)/python -m pytest

# Without a GPU both releases run on the same packages, so the other one lies in a folder that is found before the
# installed one. With a GPU each needs a torch of its own: `make clean test VLLM=0.32.0`.
ifneq ($(GPU),GPU)
ifneq ($(VLLM),$(INSTALLED_VLLM))
OTHER_VLLM := $(VENV)/vllm-$(VLLM)
PYTEST := PYTHONPATH=$(CURDIR)/$(OTHER_VLLM) $(PYTEST)
endif
endif

.PHONY: install demo test smoke unit bench endurance parity gpu check format clean

install: $(STAMP)

$(STAMP): setup.py requirements/cpu.txt requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),GPU)
	$(PIP) -r requirements/dev.txt vllm==$(VLLM) --editable .
else
	@echo "No GPU found: installing for the CPU"
	$(PIP) -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps vllm==$(INSTALLED_VLLM)
	$(PIP) --no-deps --no-build-isolation --editable .
endif
	touch $(STAMP)

ifdef OTHER_VLLM
$(OTHER_VLLM): | $(STAMP)
	$(PIP) --no-deps --target $@ vllm==$(VLLM)
endif

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# Tests share two cores, each file on one of them.
test: unit
	$(PYTEST) tests/distributed tests/e2e -n 2 --dist loadfile

unit: $(STAMP) $(OTHER_VLLM)
	$(PYTEST) tests/unit -n 2 --dist loadfile

smoke: $(STAMP) $(OTHER_VLLM)
	$(PYTEST) tests/e2e/test_smoke.py

# A short version of every benchmark; benchmarks/README.md says what each shows.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.cfg_speedup --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.shared_forwards --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.lora --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.throughput --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.caches --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.serving --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.engine_overhead --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.trace_steps --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.burst --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.fairness --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.streaming --quick --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.simulate --quick --out $(BENCH_OUT)

# Ranks killed under traffic, then rude traffic, a minute each. Few clients and faults: on a slow machine a request must
# not be hit so often that it is taken for what kills the ranks.
endurance: $(STAMP)
	$(BIN)/python -m benchmarks.chaos --minutes 1 --every 12 --clients 4 --out $(BENCH_OUT)
	$(BIN)/python -m benchmarks.soak --minutes 1 --clients 4 --out $(BENCH_OUT)

# Every family against diffusers' own pipeline: model | mode | max abs diff | bitwise across cfg sizes.
parity: $(STAMP)
	$(BIN)/python -m benchmarks.parity

# What a GPU does with the step loop: numbers, bits, times, memory; a page in benchmark_results. Tiny without a GPU.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check --out $(BENCH_OUT)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info demo_output $(BENCH_OUT) .pytest_cache .mypy_cache .ruff_cache
