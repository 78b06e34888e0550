# Everything a fresh clone needs: sh, make and a Python with venv and pip. `make help` lists the targets.

PYTHON      ?= python3
VENV        := .venv
BIN         := $(VENV)/bin
STAMP       := $(VENV)/.ragged-serve-installed

# Where torch alone comes from. Empty: the ordinary package index, whose torch for Linux is the CUDA build (several GB).
# For a machine without a GPU: make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# What `make serve` serves.
CONFIG      ?= deploy/config.yaml

# What pytest runs: paths and options, e.g. make test T="tests/engine -k name"
T           ?=

# What `make load` sends, and where to: docs/load_testing.md. Set on the command line alone: shells have a HOST of their own.
HOST        = http://127.0.0.1:8000
RATE        = 2
USERS       = 8
SECONDS     = 60
WORKLOAD    = synthetic
SHAPE       = steady
SLO         = --slo-ttft-ms 2000 --slo-tpot-ms 200
KILLS       =
REPORT      = load_report.html
LOAD        =

# A test that hangs fails under its name after ten minutes and the next one runs; where it hangs in C and cannot be told,
# the run ends five minutes later. Both show every thread's stack.
PYTEST      := $(BIN)/python -m pytest --timeout 600 --override-ini faulthandler_exit_on_timeout=true

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help setup serve test lint format types bench load drill soak clean

help: ## list the targets and variables
	@$(PYTHON) -c 'import re; \
	text = open("Makefile").read(); \
	[print("  make %-8s %s" % row) for row in re.findall(r"^(\w+):[^\n#]*## (.*)", text, re.M)]'
	@echo
	@echo '  PYTHON=python3.12          the Python that .venv is made from (3.11 or newer)'
	@echo '  TORCH_INDEX=<index url>    take torch alone from there, e.g. the CPU build (hundreds of MB, not GB):'
	@echo '                             make test TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	@echo '  CONFIG=<file>              what make serve serves (deploy/config.yaml)'
	@echo '  T="tests/engine -k name"   make test runs only that, without lint and types'
	@echo '  HOST RATE USERS SECONDS    make load: where to, requests a second (0: so many USERS instead), how long'
	@echo '  WORKLOAD SHAPE SLO KILLS   what it sends, and what is asked of it: docs/load_testing.md'

setup: $(STAMP) ## make .venv and install everything in it (again only if pyproject.toml or constraints.txt changed)

# torch goes first and without its dependencies, so that TORCH_INDEX decides on torch and on nothing else; the second
# installation finds it there and brings what it depends on.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
	"$(PYTHON) is Python %d.%d; ragged-serve needs 3.11 or newer: make setup PYTHON=..." % sys.version_info[:2])'
	@if test -x $(BIN)/pip; then echo '==> $(VENV) is there'; \
	else echo '==> making $(VENV)'; $(PYTHON) -m venv $(VENV); fi
	@echo '==> installing torch $(if $(TORCH_INDEX),from $(TORCH_INDEX),(large; TORCH_INDEX can name a CPU build))'
	$(BIN)/python -m pip install --no-deps --constraint constraints.txt \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@echo '==> installing ragged-serve, editable, with what its tests and checks need'
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@echo '==> compiling the CPU kernels for this machine (else the first start would)'
	-@$(BIN)/python -c 'import yaml; from serve_app.config import ServeArgs; from serve_app.replica.load import load_engine; \
	load_engine(ServeArgs.parse(yaml.safe_load(open("deploy/config.yaml"))["applications"][0]["args"]))'
	@echo installed > $(STAMP)

serve: $(STAMP) ## start the server of CONFIG; Ctrl-C drains and ends all of it
	@$(BIN)/python -m serve_app.launch $(CONFIG)

test: $(STAMP) $(if $(T),,lint types) ## lint, types and all tests; with T=... only those tests
ifneq ($(T),)
	$(PYTEST) $(T)
else
	$(PYTEST) --ignore tests/service
	@# In a process of its own: Ray keeps what an earlier cluster of the same process left behind.
	$(PYTEST) tests/service
endif

lint: $(STAMP) ## ruff: rules and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: write the format, fix what is safe to fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy: strict on the core, ordinary on the rest
	$(BIN)/mypy

bench: ## list the benches; each runs by itself
	@$(PYTHON) -c 'import ast, glob; \
	first = lambda p: ((ast.get_docstring(ast.parse(open(p).read())) or "").splitlines() or [""])[0]; \
	[print("  $(BIN)/python %-36s %s" % (p, first(p))) for p in sorted(glob.glob("loadtests/bench_*.py"))] \
	or print("  loadtests/ holds no bench yet")'

load: $(STAMP) ## locust against a running server (HOST): figures, SLO, report; with KILLS=1 replicas die meanwhile
	$(BIN)/locust -f loadtests/locustfile.py --headless --only-summary --host $(HOST) \
		--rate $(RATE) --users $(USERS) --spawn-rate $(USERS) --run-time $(SECONDS)s \
		--workload $(WORKLOAD) --shape $(SHAPE) $(SLO) --report $(REPORT) \
		$(if $(filter-out 0,$(KILLS)),--kill-period 20) $(LOAD)

drill: $(STAMP) ## kill replicas and the router under streams, and compare every byte (some minutes)
	$(BIN)/python -m loadtests.drill

soak: $(STAMP) ## twenty minutes of traffic, bad input and kills; then nothing may be left over
	$(BIN)/python -m loadtests.soak

clean: ## remove caches and build outputs (.venv stays: rm -r .venv makes the next setup start over)
	@$(PYTHON) -c 'import pathlib, shutil; \
	names = ["build", "dist", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"]; \
	folders = [f for f in map(pathlib.Path, names) if f.is_dir()]; \
	folders += [f for t in ("serve_app", "tests", "loadtests") for f in pathlib.Path(t).rglob("__pycache__")]; \
	[(print("removing", f), shutil.rmtree(f)) for f in folders]'
