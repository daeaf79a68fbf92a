# Every target that needs an environment makes it first.
.DEFAULT_GOAL := help
.PHONY: help setup train quick test check conf format bench bench-nodes bench-step bench-startup bench-own-loop bench-ray bench-tensorflow live-scale live-race server-memory
.PHONY: compression replays methods reproduce reproduce-full adamw look-ahead look-ahead-nets scale chaos nodes journal clean race gpu

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ARGS ?=
# Tests are handed out one at a time: some take a minute, and the last of them would keep one core waiting for another.
# Where byte code is not written, each of the hundreds of processes that tests start would compile the package again.
PARALLEL := -n logical --maxprocesses 8 --maxschedchunk 1

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv was found; install one, or say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing PyTorch and the rest into .venv: a few minutes"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: .venv/ready  ## Make the environment in .venv (a few minutes, several GB: PyTorch)

train: .venv/ready  ## Train the default job: OrMo, 4 workers, handwritten digits (more: make train ARGS="workers=8")
	$(BIN)/python launch.py $(ARGS)

quick: .venv/ready  ## Format, lint and most unit tests, in little more than a minute: before every commit
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not live" --hypothesis-profile=quick tests/unit $(ARGS)

test: .venv/ready  ## Run all tests, on all cores (one after another: ARGS="-n 0")
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

check: .venv/ready  ## Format, lint and types, of the package and its tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

conf: .venv/ready  ## Write the files of conf/ that say what can be set, from the schema
	$(BIN)/python -m ormo_rpc.config.write_conf

format: .venv/ready  ## Put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv/ready  ## Throughput beside the peers, into results/ (half an hour; ARGS="--workers 2 4 --rounds 3")
	$(BIN)/python -m benchmarks.side_by_side $(ARGS)

bench-nodes: .venv/ready  ## The same between two network namespaces, server in one, workers in the other (needs root)
	$(BIN)/python -m benchmarks.side_by_side --namespaces $(ARGS)

bench-step: .venv/ready  ## The server's step: memory bandwidth, and each algorithm's step in copies of the parameters
	$(BIN)/python -m benchmarks.memory_bandwidth
	$(BIN)/python -m benchmarks.server_step $(ARGS)

bench-startup: .venv/ready  ## Start, recovery, end of live runs of two checkouts, into results/ (a quarter of an hour; ARGS="BEFORE")
	$(BIN)/python -m benchmarks.startup $(ARGS)

bench-own-loop: .venv/ready  ## A loop of one's own against the built-in task, time per update, into results/ (minutes)
	$(BIN)/python -m benchmarks.own_loop $(ARGS)

bench-ray: .venv-ray/ready  ## Make the environment of the peer Ray, in .venv-ray
bench-tensorflow: .venv-tensorflow/ready  ## Make the environment of the peer TensorFlow, in .venv-tensorflow

.venv-%/ready:
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv was found; say which: PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check '$*>=2' numpy psutil
	@touch $@

gpu: .venv/ready  ## Tests and benchmarks that need a GPU, on a machine that has one, into results/ (minutes; ARGS="--only server --sanitize")
	$(BIN)/python -m benchmarks.gpu $(ARGS)

live-scale: .venv/ready  ## The live server against the number of workers, 1 to 32, into results/ (minutes)
	$(BIN)/python -m benchmarks.live_scale $(ARGS)

live-race: .venv/ready  ## Time to an accuracy, live OrMo against DistributedDataParallel, into results/ (half an hour; ARGS="--root DIRECTORY")
	$(BIN)/python -m benchmarks.live_race $(ARGS)

server-memory: .venv/ready  ## The live server's peak memory, and that it does not grow, into results/ (minutes)
	$(BIN)/python -m benchmarks.server_memory $(ARGS)

replays: .venv/ready  ## Replay live runs and compare them bit for bit, into results/ (minutes; ARGS="--cifar DIRECTORY")
	$(BIN)/python -m experiments.replays $(ARGS)

methods: .venv/ready  ## The paper's six methods, simulated, into results/ (a quarter of an hour; ARGS="--root DIRECTORY")
	$(BIN)/python -m experiments.paper_methods $(ARGS)

reproduce: .venv/ready  ## The paper's methods with ResNet-20, 15 epochs, into results/ (a day of a core; goes on where it was; ARGS="--root DIRECTORY --plan")
	$(BIN)/python -m experiments.reproduce $(ARGS)

reproduce-full: .venv/ready  ## The same in all settings and at whole length, on a GPU, into results/ (ARGS="--root DIRECTORY --jobs 4 --plan")
	$(BIN)/python -m experiments.reproduce --full --device cuda $(ARGS)

adamw: .venv/ready  ## AdamW in order of arrival and in order, simulated, into results/ (a quarter of an hour)
	$(BIN)/python -m experiments.adamw $(ARGS)

look-ahead: .venv/ready  ## Look-aheads of ordered momentum on noisy quadratics, simulated, into results/ (minutes)
	$(BIN)/python -m experiments.look_ahead $(ARGS)

look-ahead-nets: .venv/ready  ## The same on the cnn and ResNet-20, beside DANA, SMEGA2, Nesterov, into results/ (a GPU; ARGS="--root DIRECTORY --device cuda --jobs 2")
	$(BIN)/python -m experiments.look_ahead_nets $(ARGS)

race: .venv/ready  ## The race against DDP, m-sync and local SGD, simulated, resumable, into results/ and docs/ (hours; ARGS="--root DIRECTORY")
	$(BIN)/python -m experiments.race $(ARGS)

compression: .venv/ready  ## Accuracy against bytes for each lossy wire format, simulated, into results/ (ten minutes; ARGS="--root DIRECTORY")
	$(BIN)/python -m experiments.compression $(ARGS)

scale: .venv/ready  ## Delay, queue and time to a target against the number of workers, simulated, into results/ (minutes)
	$(BIN)/python -m experiments.scale $(ARGS)

journal: .venv/ready  ## The cost of checkpoint.journal per push, into results/
	$(BIN)/python -m benchmarks.journal $(ARGS)

chaos: .venv/ready  ## Inject random faults into a live run and check every guarantee, into results/ (a quarter of an hour; ARGS="--transport gloo --journal")
	$(BIN)/python -m tests.chaos $(ARGS)

nodes: .venv/ready  ## Faults of whole nodes, in network namespaces of this machine (root), into results/ (minutes)
	$(BIN)/python -m tests.chaos.nodes $(ARGS)

clean:  ## Remove the environment and caches; runs and data stay
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
