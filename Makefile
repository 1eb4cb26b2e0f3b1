# Every target needs only Linux, Python 3.11+, git and make; `setup` and `peers` alone use the network.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# No compiler: DeepSpeed's native operators are never built (trainer/engine.py says why none is needed).
export DS_BUILD_OPS = 0
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)

.PHONY: help setup demo test test-trainer test-data test-rest test-cluster check lint types chaos matrix bench results peers lock screenshots clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## a .venv with the pinned versions (uses the network)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"$(PYTHON) is Python {v[0]}.{v[1]}; Shardyard needs 3.11 to 3.13: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@$(PYTHON) -m venv --help >/dev/null 2>&1 || { echo "$(PYTHON) has no venv module; install it (Debian: apt-get install python3-venv) and call make again"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: setup  ## train a small GPT on this machine's Python standard library, 2 Ray workers, ZeRO-1
	$(BIN)/python -m cluster.demo

test: lint types  ## lint, types and all tests that need no root and no daemon, at most 10 minutes on 2 cores
	@$(MAKE) --no-print-directory --jobs=3 --keep-going test-trainer test-data test-rest

# Three side by side on two cores, of about the same time: they wait for processes as much as they compute.
TRAINER := tests/trainer tests/chaos $(addprefix tests/distributed/test_,matrix.py load_cost.py memory.py)
DATA := tests/data_pipelines tests/distributed
PYTEST := $(BIN)/python -m pytest -m "not slow and not daemon" --durations=15
test-trainer: setup
	$(PYTEST) $(TRAINER)
test-data: setup
	$(PYTEST) $(DATA) $(TRAINER:%=--ignore=%)
test-rest: setup
	$(PYTEST) $(patsubst %,--ignore=%,$(TRAINER) $(DATA))

check: lint types  ## lint, types and the tests that take seconds, under 60 s
	$(BIN)/python -m pytest -m "not slow and not daemon and not longer and not distributed and not ray"

test-cluster: setup  ## the tests that need root or tools of the system; says what it skipped and why
	tests/system_packages.sh
	$(BIN)/python -m pytest -rs -m "daemon" --durations=15

lint: setup  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy
	$(BIN)/mypy

chaos: setup  ## harm a run at random, N schedules from seed SEED (make chaos N=20 SEED=0)
	$(BIN)/python -m pytest -s tests/chaos --schedules=$(or $(N),20) --first-seed=$(or $(SEED),0)

matrix: setup  ## checkpoints from every ZeRO stage and world size to every other (many minutes)
	$(BIN)/python -m pytest -s -m "slow or not slow" tests/distributed/test_matrix.py

bench: peers  ## measurements against peers; tables go to benchmarks/results/
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/loaders.py
	$(BIN)/python benchmarks/crash_consistency.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/exact.py
	$(BIN)/python benchmarks/exact.py --curve
	$(BIN)/python benchmarks/parity_grid.py
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/linear_cross_entropy.py

results: setup  ## train every recipe of real data, 3 seeds each, beside its baseline: docs/results.md (one task: TASK=...)
	$(BIN)/python benchmarks/results.py $(TASK)

# Without what they ask for: some want torchvision, or older numpy (benchmarks/peers/requirements.txt).
peers: setup  ## install what `make bench` compares with (uses the network)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers/requirements.txt

lock: setup  ## write constraints.txt anew from what is installed
	@{ echo '# Every installed version, exactly: the only place that pins. Regenerate with `make lock`.'; \
	   $(BIN)/python -m pip freeze --exclude-editable | sed 's/^torch==.*/torch==2.13.0/'; } > constraints.txt

screenshots: setup  ## the dashboard's pictures in docs/images, of runs that are made up (needs Chromium)
	$(BIN)/python docs/make_screenshots.py

clean:  ## remove the .venv and what tools left; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache *.egg-info
