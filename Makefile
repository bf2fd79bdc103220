# `make run` and `make test` set up all they need; nothing is needed before them but Python 3.11+ and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
BENCH  := $(VENV)/.installed-bench
PEERS  := $(VENV)-peers/.installed

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help run test check format bench bench-peers simulate mutants chaos soak docs stubs clean

help:
	@echo 'make run       serve the models that desired/ declares'
	@echo 'make test      make check, then every test'
	@echo 'make check     formatting, lint, types, one-way imports'
	@echo 'make format    format the code and fix what ruff can fix'
	@echo 'make bench     measure edit-to-answer latency, request cost, memory, and large directories'
	@echo 'make bench-peers  our node beside mosec, LitServe, MLServer and Triton, installed into $(VENV)-peers: docs/benchmarks.md'
	@echo 'make simulate  the whole loop on a simulated machine: EPISODES=2000 from FIRST=0; SEED=n shows one'
	@echo 'make mutants   seeded bugs, each of which the simulation must find: a table; ONLY="words of a name"'
	@echo 'make chaos     real faults on real processes: STARTS=200 kills, swaps, full disks, dead watchers'
	@echo 'make soak      MINUTES=10 of nothing changing: memory, files and threads must not grow'
	@echo 'make docs      make docs/cli.md from the command line itself, with examples recorded beside a node'
	@echo 'make stubs     generate the gRPC stubs from the .proto file'
	@echo 'make clean     remove the virtual environment and all caches'

# setuptools comes first, pinned, so that the build needs no second, isolated environment.
# silero-vad is a real TorchScript model for the tests; its own dependencies (torchaudio) are not needed.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'splitlearn-manager needs Python 3.11 or newer; $(PYTHON) is '"$$($(PYTHON) -V)"'. Try: make PYTHON=python3.11 $(MAKECMDGOALS)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps silero-vad
	@touch $@

run: $(READY)
	$(BIN)/python -m splitlearn_manager.reconcile desired/

# Two processes share the files of tests, in their order: those that take longest come first. Those that look at
# a GPU's memory have it for themselves.
test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/gpu
	$(BIN)/python -m pytest tests/gpu

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[bench]'
	@touch $@

bench: $(BENCH)
	$(BIN)/python -m pytest tests/benchmarks -o python_files='bench_*.py' -q -s --timeout 1800 --ignore tests/benchmarks/bench_peers.py

# Triton's package is for Linux on x86-64 only; elsewhere its rows say that it is not measured.
$(PEERS): tests/benchmarks/peers/requirements.txt tests/benchmarks/peers/requirements-alone.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet -r tests/benchmarks/peers/requirements.txt
	-$(VENV)-peers/bin/python -m pip install --quiet --no-deps -r tests/benchmarks/peers/requirements-alone.txt
	@touch $@

bench-peers: $(BENCH) $(PEERS)
	$(BIN)/python -m pytest tests/benchmarks/bench_peers.py -q -s --timeout 3600

# One seed: as small as it still fails, and with WHOLE=1 with all that happens in it.
simulate: $(READY)
	cd tests && ../$(BIN)/python -m simulation $(if $(SEED),--seed '$(SEED)' $(if $(WHOLE),--whole),\
		$(if $(EPISODES),--episodes '$(EPISODES)') $(if $(FIRST),--first '$(FIRST)') $(if $(JOBS),--jobs '$(JOBS)'))

mutants: $(READY)
	cd tests && ../$(BIN)/python -m mutants $(if $(ONLY),--only '$(ONLY)') $(if $(EPISODES),--episodes '$(EPISODES)') $(if $(JOBS),--jobs '$(JOBS)')

chaos: $(READY)
	STARTS='$(STARTS)' SEED='$(SEED)' $(BIN)/python -m pytest tests/chaos -o python_files='chaos_*.py' -v -s

soak: $(READY)
	MINUTES='$(MINUTES)' $(BIN)/python -m pytest tests/soak -o python_files='soak_*.py' -q -s

docs: $(READY)
	cd tests && ../$(BIN)/python -m support.cli_examples ../docs/cli.md

# From an older compiler than the installed one, in an environment of its own: generated code works with
# every protobuf runtime that is as new or newer, and pyproject.toml promises 6.31.1.
stubs:
	$(PYTHON) -m venv $(VENV)-stubs
	$(VENV)-stubs/bin/python -m pip install --quiet grpcio-tools==1.76.0 setuptools
	$(VENV)-stubs/bin/python -m grpc_tools.protoc --proto_path=src --python_out=src --pyi_out=src \
		--grpc_python_out=src src/splitlearn_comm/protocol/compute.proto
	rm -rf $(VENV)-stubs

clean:
	rm -rf $(VENV) $(VENV)-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build src/*.egg-info
