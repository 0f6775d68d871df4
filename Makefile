# Every target works as the first command on a fresh clone: the environment is made where it is missing or out of date.

# Containers often set it. Each of the many processes of the tests would compile the package and its tests anew.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= python3
BIN := .venv/bin
INSTALLED_FOR_DEMO := .venv/.installed-for-demo
INSTALLED := .venv/.installed
DEMO_EXTRAS := cli,examples
EXTRAS := cli,examples,plot,safetensors,tensorboard,lightning,transformers,accelerate,ignite,s3,wandb,test,docs,dev
BENCH_INSTALLED := .venv-bench/.installed

# For pytest wherever it runs, such as --durations=25.
PYTEST_ARGS ?=
PYTEST := $(BIN)/pytest -q $(PYTEST_ARGS)

.PHONY: demo test quick faults fuzz test-versions test-slurm test-hosts test-browser test-cuda soak check docs clean bench bench-setup

# Trains a small network on two ranks and keeps its best checkpoints in runs/digits.
demo: $(INSTALLED_FOR_DEMO)
	rm -rf runs/digits
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m keepbest train examples/digits/config.yaml

# Three at a time on two cores, because tests often wait for the disk or for ranks. worksteal, because a few tests take
# seconds and most take milliseconds.
test: $(INSTALLED)
	$(PYTEST) -n 3 --dist worksteal

# All tests that start no process, with fewer random histories, power cuts and refusals. Under a minute on two cores.
quick: $(INSTALLED)
	$(PYTEST) -n 2 --dist worksteal --quick

# Kills runs two hundred times, and cuts the power at every point of a commit. Minutes.
faults: $(INSTALLED)
	$(PYTEST) -s tests/faults --kills 200 --crash-points all

# Gives files that are nearly right to all that reads a run folder, for so many seconds.
FUZZ_SECONDS ?= 60
fuzz: $(INSTALLED)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(PYTEST) -s --override-ini faulthandler_timeout=0 tests/fuzz

# All tests except faults, SLURM, hosts and pages, on the oldest torch that is supported and on the newest that there is.
# One after the other, each in a temporary folder. Needs a C compiler, and Python 3.11 or newer.
test-versions:
	$(PYTHON) -m tests.versions $(PYTEST_ARGS)

# Starts a SLURM cluster of two nodes on this machine, and submits the scripts of launch/. As root, it installs SLURM.
test-slurm: $(INSTALLED)
	$(PYTEST) --slurm --override-ini faulthandler_timeout=600 tests/slurm

# Trains on two hosts, which are network namespaces of this machine, and cuts the network between them. As root.
test-hosts: $(INSTALLED)
	$(PYTEST) tests/hosts

# Opens the report of a run in Chromium. As root on Debian, it installs Chromium.
test-browser: $(INSTALLED)
	$(PYTEST) --browser tests/cli/test_report_in_browser.py

# Needs a GPU, and the environment that knows it: PYTHON has torch, numpy, pydantic, xxhash and pytest. Installs nothing.
test-cuda:
	PYTHONPATH=src:.:$$PYTHONPATH $(PYTHON) -m pytest -c tests/cuda/pytest.ini $(PYTEST_ARGS) tests/cuda

# Interrupts jobs five times in each way: by a signal, by their return to the queue, and by time limits, which SLURM keeps
# to the minute.
soak: $(INSTALLED)
	$(PYTEST) --slurm --rounds 5 --override-ini faulthandler_timeout=1800 tests/slurm/test_requeue.py

check: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(PYTEST) tests/test_architecture.py
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run

# Builds the site of the documentation in site/, without a network. A warning is an error, also about a link that leads
# nowhere. The variable silences what the theme prints at each start about its own future; it says nothing of our pages.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Measures every figure of docs/performance.md on this machine and prints it beside its bar. Half an hour; a quiet disk.
bench: $(BENCH_INSTALLED)
	.venv-bench/bin/python -m benchmarks
	.venv-bench/bin/python -m benchmarks.plots

# The peers that are measured beside keepbest, in an environment of their own.
bench-setup: $(BENCH_INSTALLED)

$(BENCH_INSTALLED): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --requirement benchmarks/requirements.txt --editable .
	touch $@

# What the demo needs, and then the rest. The stamps come last, so that an installation that was interrupted is done again.
$(INSTALLED_FOR_DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(DEMO_EXTRAS)]'
	touch $@

$(INSTALLED): $(INSTALLED_FOR_DEMO)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-bench .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist runs site
	find src -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +
