# `make train` and `make test` set up what they need on a machine with Python >= 3.11 and make.
VENV := .venv
# the interpreter that runs everything, e.g. `make test PYTHON=python3` on a machine that has all of it
PYTHON := $(VENV)/bin/python
READY := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)
BENCH_READY := $(if $(READY),$(VENV)/.bench-ready)
CLIENTS_READY := $(if $(READY),$(VENV)/.clients-ready)
# what the kernels are compiled with; those not installed go to .triton/
TRITONS := 3.6.0 3.7.1 3.9.0
OUT := runs/gpu-check
INSTALL := $(VENV)/bin/python -m pip install --quiet -c constraints.txt

.PHONY: help venv train test test-compiled test-interpreted test-slow test-all test-targets test-clients test-versions lint format api bench sass gpu-check clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

venv: $(VENV)/.ready ## virtual environment with the project and its tools

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing torch, this project and its tools into $(VENV): a minute or more, once."
	python3 -m venv $(VENV)
	# torch by itself and first: nothing that follows may choose another one
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	@touch $@

$(VENV)/.bench-ready: $(VENV)/.ready
	$(INSTALL) -e '.[bench]'
	@touch $@

$(VENV)/.clients-ready: $(VENV)/.ready
	$(INSTALL) -e '.[clients]'
	# only their quantizers are used, which need nothing that these declare
	$(INSTALL) --no-deps encodec==0.1.1 descript-audio-codec==1.0.0 moshi==0.2.13
	@touch $@

train: $(READY) ## train the VQ-VAE on MNIST: runs/mnist/; FLAGS='--resume' and the like
	$(PYTHON) examples/train_mnist.py --out runs/mnist $(FLAGS)

test: $(READY) ## all tests, some of them in Triton's interpreter; says how far it is
	$(PYTHON) tests/parts.py

test-compiled: $(READY)
	$(PYTHON) tests/parts.py package programs

test-interpreted: $(READY)
	$(PYTHON) tests/parts.py interpreted

test-slow: $(READY) ## what takes longest: a million rows, several ranks, torch.compile of a training run
	$(PYTHON) -m pytest -m slow

test-all: $(READY) ## all tests, with those of test-slow
	$(PYTHON) tests/parts.py ci

test-targets: $(READY) ## every case of every kernel compiled for every target; `make test` has a part of them
	ALL_TARGETS=1 $(PYTHON) -m pytest tests/test_compile.py

test-clients: $(CLIENTS_READY) ## tests with transformers, diffusers, vector-quantize-pytorch and others installed
	$(PYTHON) -m pytest tests/test_clients.py tests/test_checkpoints.py tests/test_compat_peer.py \
		tests/test_tokens_of_models.py

test-versions: $(READY) ## core tests on older and newer versions: 10 minutes a row; ROWS='floor newest', KEEP=1
	$(PYTHON) tests/versions.py $(ROWS) $(if $(KEEP),--keep)

lint: $(READY) ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format: $(READY) ## what ruff can mend by itself
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

api: $(READY) ## docs/api.md from the docstrings
	$(PYTHON) docs/api.py

bench: $(BENCH_READY) ## time and memory beside peers: minutes; FLAGS='--case all' and the like
	$(PYTHON) -m bench $(FLAGS)

sass: $(READY) $(TRITONS:%=.triton/%/triton) ## registers, spills, instructions per pair; JSON=FILE for the rows
	$(PYTHON) -m bench.sass --triton $(TRITONS) $(if $(JSON),--json $(JSON))

# times first, alone on the quiet GPU; then the tests side by side
gpu-check: $(READY) ## times and checks on a GPU: runs/gpu-check/ or OUT=DIR; DRY=1: with tiny inputs on a CPU
	@rm -f "$(OUT)"/*.jsonl; status=0; \
	timeout 200 $(PYTHON) -m bench.gpu_times $(if $(DRY),--dry) --out "$(OUT)" || status=$$?; \
	test $$status = 2 && exit 2; \
	GPU_CHECK_TABLE="$(abspath $(OUT))/correctness.jsonl" HYPOTHESIS_PROFILE=few \
		$(PYTHON) tests/parts.py $(if $(DRY),dry,gpu) || status=1; \
	exit $$status

# without a network it is left out, and bench.sass says so
.triton/%/triton: | $(READY)
	@$(PYTHON) -c 'import sys; from importlib.metadata import version; sys.exit(version("triton") != "$*")' \
		|| $(PYTHON) -m pip install --quiet --no-deps --target .triton/$* triton==$* \
		|| echo "Triton $* could not be installed"

clean: ## remove the environment and what was built; runs/ stays
	rm -rf $(VENV) .triton .versions build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
