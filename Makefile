# Every target installs what it needs, so that `make train-lm` or `make test` works in a fresh checkout.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Otherwise every process would compile the packages anew: they are installed without bytecode (see READY).
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

CONFIG ?=
ARGS ?=
DATA ?=
CKPT ?=
PROMPT ?= def
TASK ?= lm
TRAINER ?= configs/trainer/ddp.yaml
NODES ?= 1
GPUS ?= 1
ADDRESS ?=
NAME ?=
SMALL ?=
PYTHONS ?=
SLOW_WORKERS ?= 3
FIT = $(TASK) fit --config $(or $(CONFIG),configs/lm/wikitext103.yaml) --config $(TRAINER) $(ARGS)

.PHONY: help setup train-lm train-maze train-cifar train-imagenet generate notebooks docs test test-slow test-pythons lint format typecheck bench bench-quick bench-core bench-lm bench-image bench-image-block bench-cifar bench-quality bench-reasoning bench-callbacks bench-faults bench-scaling submit train-nodes bench-pairs bench-gpu clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is written last, so that an interrupted installation is repeated. Compiling all 22,000 files of the packages
# would take a minute and a half; those in use are compiled when they are first imported.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is required, {sys.executable} is {v.major}.{v.minor}: make PYTHON=/path/to/python3.11 ...")'
	@echo "Setting up $(VENV) (PyTorch with CUDA is several gigabytes; this takes a few minutes, once) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	@touch $(READY)

setup: $(READY)  ## Create the virtual environment (.venv)

train-lm: $(READY)  ## Train a RevDEQ language model: CONFIG=configs/lm/NAME.yaml ARGS="--trainer.max_steps=100"
	@$(RUN) -m revdeq_lightning fit --config $(or $(CONFIG),configs/lm/default.yaml) $(ARGS)

train-maze: $(READY)  ## Train a reasoner that solves mazes: CONFIG=FILE, or CONFIG='FILE --config FILE-LAID-OVER-IT'
	@$(RUN) -m revdeq_lightning reasoning fit --config $(or $(CONFIG),configs/reasoning/mazes.yaml) $(ARGS)

train-cifar: $(READY)  ## Train a RevDEQ classifier on CIFAR-10: CONFIG=configs/cifar10/NAME.yaml DATA=folder-or-tar-of-your-images
	@$(RUN) -m revdeq_lightning image fit --config $(or $(CONFIG),configs/cifar10/cpu.yaml) $(if $(DATA),--data.source=folder --data.path='$(DATA)') $(ARGS)

train-imagenet: $(READY)  ## Train on ImageNet: DATA=folder with train/CLASS/* and val/CLASS/*
	@$(RUN) -m revdeq_lightning image fit --config $(or $(CONFIG),configs/imagenet/modern.yaml) $(if $(DATA),--data.path='$(DATA)') $(ARGS)

submit: $(READY)  ## Train on a SLURM cluster: NODES=2 GPUS=8 CONFIG=FILE TASK=lm|image TRAINER=configs/trainer/ddp.yaml SBATCH="--time=4:00:00"
	@sbatch --nodes=$(NODES) --ntasks-per-node=$(GPUS) --gpus-per-node=$(GPUS) $(SBATCH) configs/cluster/slurm.sh $(FIT)

train-nodes: $(READY)  ## Train on machines without a scheduler; run this on each: NODES=2 GPUS=8 ADDRESS=HOST:PORT NAME=first CONFIG=FILE
	@NODES=$(NODES) GPUS=$(GPUS) ADDRESS='$(ADDRESS)' RUN='$(NAME)' configs/cluster/torchrun.sh $(FIT)

generate: $(READY)  ## Continue a text: CKPT=runs/lm/NAME/DATE/checkpoints/best.ckpt PROMPT="def "
	@$(RUN) -m revdeq_lightning generate --ckpt_path '$(CKPT)' --prompt '$(PROMPT)' $(ARGS)

notebooks: $(READY)  ## Execute the notebooks; SMALL=1: smaller sizes, files unchanged
	@$(RUN) notebooks/execute.py $(if $(SMALL),--small) $(ARGS)

# No --quiet: it hides the warnings that --strict counts.
docs: $(READY)  ## Build the documentation into site/; a broken link or a missing reference is an error
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# One process per core with one thread each: operations on small tensors gain nothing from threads. Tests that share an
# expensive fixture are marked as a group (xdist_group): one process makes it for all of them.
test: $(READY)  ## Run the tests: ARGS="-k golden"
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist loadgroup -m "not slow" $(ARGS)

# More processes than the cores of a small machine: many of these tests wait.
test-slow: $(READY)  ## Run the tests that take minutes: several processes, kills, several machines, SLURM
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(SLOW_WORKERS) --dist loadgroup -m slow $(ARGS)

test-pythons: $(READY)  ## Run the tests that depend on the Python version under every other Python found here: PYTHONS="/path/to/python3.13 ..."
	@OMP_NUM_THREADS=1 PYTHONS='$(PYTHONS)' $(RUN) tests/pythons.py $(ARGS)

lint: $(READY)  ## Check style
	@$(RUN) -m ruff check . && $(RUN) -m ruff format --check .

format: $(READY)  ## Fix style
	@$(RUN) -m ruff check --fix . && $(RUN) -m ruff format .

typecheck: $(READY)  ## Check types (strict for the core)
	@$(RUN) -m mypy

AUTHORS ?=
TEXT ?=
IMAGES ?=
BENCH = $(RUN) -m benchmarks $(if $(AUTHORS),--repository '$(AUTHORS)') $(if $(TEXT),--text '$(TEXT)') $(if $(IMAGES),--images '$(IMAGES)')

bench: $(READY)  ## Measure everything: AUTHORS=their-repository TEXT=tinyshakespeare.txt IMAGES=cifar10.tar.xz (hours)
	@OMP_NUM_THREADS=1 $(BENCH) $(ARGS)

bench-quick: $(READY)  ## Run all benchmarks in tiny sizes to check that they work (less than 10 minutes)
	@OMP_NUM_THREADS=1 $(BENCH) --quick $(ARGS)

bench-core: $(READY)  ## Measure the core: exactness, convergence, cost, memory (about 10 minutes on an idle machine)
	@$(RUN) -m benchmarks.core $(ARGS)

bench-lm: $(READY)  ## Train the tiny Shakespeare table: DATA=tinyshakespeare.txt (hours on two cores)
	@$(RUN) -m benchmarks.quality.language_model --data '$(or $(DATA),data/tinyshakespeare.txt)' $(ARGS)

bench-image: $(READY)  ## Measure the classifiers against BPTT: time, memory, gradient (a few minutes)
	@$(RUN) -m benchmarks.core.classifier_cost $(ARGS)

bench-image-block: $(READY)  ## Train the variants tried for the modern classifier: DATA=folder-or-tar (an hour on one core)
	@$(RUN) -m benchmarks.quality.image_block --data '$(or $(DATA),data/cifar10)' $(ARGS)

bench-cifar: $(READY)  ## Train the CIFAR-10 table: DATA=folder-or-tar with train/CLASS/* (an hour on two cores)
	@$(RUN) -m benchmarks.quality.cifar10 --data '$(or $(DATA),data/cifar10)' $(ARGS)

bench-faults: $(READY)  ## Kill runs, fill disks, damage checkpoints, and measure what is lost (a few minutes; disks need root)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.cluster.faults $(ARGS)

bench-callbacks: $(READY)  ## Measure what the callbacks add to a training step (15 minutes on an idle core)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.cluster.callbacks $(ARGS)

bench-quality: $(READY)  ## Compare quality at equal cost: DATA=tinyshakespeare.txt ARGS="--images=cifar10-train.tar.xz" (an hour each on one core)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.quality --text '$(or $(DATA),data/tinyshakespeare.txt)' $(ARGS)

bench-reasoning: $(READY)  ## Compare gradients on mazes: ARGS="--only NAME --seeds 0" (hours)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.quality.reasoning $(ARGS)

bench-scaling: $(READY)  ## Model training steps on 8 to 1,024 GPUs, and measure two processes on this CPU
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.cluster.scaling --measure $(ARGS)

bench-gpu: $(READY)  ## Measure on a GPU: its tests, exactness, overhead, training steps (8 minutes; ARGS=--quick: tiny, also on a CPU)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.core.gpu $(ARGS)

bench-pairs: $(READY)  ## Measure every solver with every adjoint: gradient, evaluations, memory (a few minutes)
	@OMP_NUM_THREADS=1 $(RUN) -m benchmarks.core.pairs $(ARGS)

clean:  ## Remove the virtual environments and caches (never runs/)
	@rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache build site *.egg-info
