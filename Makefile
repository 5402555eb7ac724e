# Run `make` for the list of targets.
SHELL := /bin/bash
VENV := $(if $(LLAVA_PDROP_VENV),$(LLAVA_PDROP_VENV),.venv)
PYTHON_VENV := $(VENV)/bin/python
JOBS ?= 2
PYTEST_ARGS ?=

# Kills, signals and full disks do not depend on the release of transformers: test_checkpoints.py is left out, and so is
# tests/unit/test_resume.py.
COMPATIBILITY := tests/unit/model tests/unit/generate tests/unit/train tests/unit/runtime/test_clock.py \
	tests/unit/bench/test_prefill.py tests/unit/bench/test_generate.py \
	tests/parity tests/golden tests/distributed --ignore tests/unit/train/test_checkpoints.py
on_transformers = set -e; overlay=$$(bash scripts/overlay.sh $(1)); PYTHONPATH=$$overlay OMP_NUM_THREADS=1 \
	$(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup $(COMPATIBILITY) $(PYTEST_ARGS)

.PHONY: help setup test test-newest test-oldest test-fast test-lmms-eval test-browser test-slurm test-long test-faults test-golden test-gpu check bench format tiny-bases lab-bases test-readme clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## make .venv and install the project with its tested versions
	@bash scripts/setup.sh

test: setup ## run all tests but the long ones and those of a real Slurm, lmms-eval or browser (PYTEST_ARGS="-k name" for some, JOBS=1 for one after the other)
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup --ignore tests/slurm --ignore tests/lmms \
		--ignore tests/browser $(PYTEST_ARGS)

test-fast: setup ## unit, parity and golden tests that start no process and train nothing (under 2 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup --fast tests/unit tests/parity tests/golden \
		$(PYTEST_ARGS)

test-newest: setup ## model, parity, golden, training and engine tests on the newest transformers that setup.py admits
	$(call on_transformers,5.24)

test-oldest: setup ## the same on the oldest one
	$(call on_transformers,5.17)

test-faults: setup ## kill training runs at 20 random moments per engine and compare their ends, bit by bit (long)
	OMP_NUM_THREADS=1 LLAVA_PDROP_FAULTS=$(if $(LLAVA_PDROP_FAULTS),$(LLAVA_PDROP_FAULTS),20) \
		$(PYTHON_VENV) -m pytest -n $(JOBS) tests/faults $(PYTEST_ARGS)

test-long: setup ## 10,000 cases of every property test, and the long kill tests
	OMP_NUM_THREADS=1 LLAVA_PDROP_EXAMPLES=10000 $(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup \
		$$(grep -rl "^import hypothesis" tests) $(PYTEST_ARGS)
	$(MAKE) test-faults

test-lmms-eval: setup ## the same questions through lmms-eval, installed beside .venv, and through ours: the same answers
	set -e; overlay=$$(bash scripts/lmms_eval.sh); PYTHONPATH=$$overlay OMP_NUM_THREADS=1 \
		$(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup tests/lmms $(PYTEST_ARGS)

test-browser: setup ## the page of llava-pdrop demo in a real Chromium (installed by root where missing), on the embedded run (made where missing)
	set -e; overlay=$$(bash scripts/beside.sh demo); browser=$$(bash scripts/browser.sh); \
		[[ -f checkpoints/tiny/finetune_pdrop/pyramid_drop/config.json ]] || bash scripts/finetune_pdrop.sh; \
		PYTHONPATH=$$overlay LLAVA_PDROP_CHROMIUM=$$browser OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n0 tests/browser $(PYTEST_ARGS)

test-slurm: setup ## train, preempt, requeue and resume under a real Slurm of two nodes (skipped where none is installed)
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n0 tests/slurm $(PYTEST_ARGS)

test-gpu: setup ## run the tests that need a CUDA device (elsewhere they are skipped, with the reason)
	$(PYTHON_VENV) -m pytest tests/gpu $(PYTEST_ARGS)

test-golden: setup ## compare with the official results in the directories PDROP_GOLDEN and PDROP_SCORING (default: those in the repository)
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest -n $(JOBS) --dist loadgroup tests/golden $(PYTEST_ARGS)

check: setup ## lint, formatting and types
	$(PYTHON_VENV) -m ruff check .
	$(PYTHON_VENV) -m ruff format --check .
	$(PYTHON_VENV) -m mypy

format: setup ## apply the formatter and the safe fixes of the linter
	$(PYTHON_VENV) -m ruff check --fix .
	$(PYTHON_VENV) -m ruff format .

bench: setup ## measure a training step of the tiny shape, vanilla beside dropping (under a minute)
	OMP_NUM_THREADS=1 $(PYTHON_VENV) -m llava_pdrop bench train --shape tiny

tiny-bases: setup ## remake the shipped miniature models (data/tiny), by seed
	$(PYTHON_VENV) data/tiny/make_bases.py

lab-bases: setup ## remake the shipped models of the laboratory (data/lab), by seed
	$(PYTHON_VENV) data/lab/make_bases.py

test-readme: ## clone the last commit into a temporary directory and run the commands of the README there
	bash scripts/test_readme.sh

clean: ## remove caches and prepared data; .venv and checkpoints stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache data/tiny/prepared data/lab/prepared
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
