# `make demo` and `make test` need only Python >= 3.10 with venv, and make. Everything else they install into .venv.
PYTHON ?= python3
VENV   ?= .venv
# which versions: constraints-oldest.txt has the lower bounds, see `make oldest`
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test oldest lint types docs format bench gpu clean help

help:
	@echo "make demo    train GPT, GPT + QK-norm and nGPT side by side on the embedded text; write runs/demo/report.html"
	@echo "make test    lint, types, the docs and every test"
	@echo "make oldest  every test with the oldest versions that pyproject.toml allows, in an environment of its own"
	@echo "make docs    the guides and the reference, as pages in docs/_build/html"
	@echo "make bench   the benchmarks, tables and JSON"
	@echo "make gpu     on a machine with a GPU: its tests and every benchmark, in nine minutes, into OUT (results/gpu)"
	@echo "make clean   remove the environment and the runs"

demo: $(VENV)/.train
	@# goes on where an interrupted demo was; `rm -r runs/demo` starts a new one
	$(BIN)/nsphere compare --preset demo --out runs/demo --resume

test: $(VENV)/.dev
	$(MAKE) --jobs=3 --output-sync=target lint types docs
	$(BIN)/python -m pytest -n auto --dist worksteal

# not lint and types: an old linter knows other rules
oldest:
	$(MAKE) .venv-oldest/.dev VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx -q -W --keep-going docs docs/_build/html

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

RESULTS ?= benchmarks/results
bench: $(VENV)/.dev
	@# a processor without bf16 needs ten seconds for a step of d512: hence the bounds, which others do not meet
	$(BIN)/nsphere bench step --modes compiled --rounds 15 --seconds 30 --json $(RESULTS)/step.json
	$(BIN)/python benchmarks/step_parts.py --layers 2 --seconds 30 --json $(RESULTS)/step_parts.json
	$(BIN)/nsphere bench optimizer --json $(RESULTS)/optimizer.json
	$(BIN)/nsphere bench ops --tokens 4096 --head-dims 128 --widths 1024 --rounds 9 --json $(RESULTS)/ops.json
	$(BIN)/nsphere bench memory --json $(RESULTS)/memory.json
	$(BIN)/nsphere bench decode --size demo --json $(RESULTS)/decode.json
	$(BIN)/nsphere bench peers --json $(RESULTS)/peers.json
	$(BIN)/python benchmarks/loss.py --vocab-sizes 8192 --rounds 3 --json $(RESULTS)/loss.json
	$(BIN)/python benchmarks/qk.py --rounds 7 --json $(RESULTS)/qk.json
	$(BIN)/python benchmarks/kernels.py --json $(RESULTS)/kernels.json

# with what is installed beside $(PYTHON): no environment is made, nothing is fetched
OUT ?= results/gpu
gpu:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --out $(OUT)

clean:
	rm -rf $(VENV) .venv-oldest runs build dist docs/_build

# A stamp per level of set-up; each is made anew when what is to be installed changes.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nsphere needs Python 3.10 or newer, this is %d.%d; set PYTHON=python3.11, say" % sys.version_info[:2])'
	@# without Debian's python3-venv this leaves a half-made environment, which must not pass for one next time
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.train: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "installing nsphere and what it needs into $(VENV) (about a minute)"
	$(PIP) install -c $(CONSTRAINTS) -e '.[train]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "installing nsphere and its test tools into $(VENV) (about two minutes)"
	$(PIP) install --no-compile -c $(CONSTRAINTS) -e '.[train,hf,docs,dev]'
	@# what pip would do on one core; a few files of packages are for newer Pythons and can't be compiled
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@ $(VENV)/.train
