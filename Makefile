# Reproduces five memory systems for small language models. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env cluster reproduce status bundle test lint unit notebooks lab bench clean

ENV ?= venv
PREFIX := $(if $(filter conda,$(ENV)),.conda,.venv)
PY := $(PREFIX)/bin/python
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Threads that spin long while they wait make two model processes on one machine many times slower.
export GOMP_SPINCOUNT := 20000
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export JUPYTER_PLATFORM_DIRS := 1
ifdef DTYPE
export KIT_DTYPE := $(DTYPE)
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(PREFIX)/ready ## create the environment (ENV=conda uses environment.yml) and fetch the bundled models
$(PREFIX)/ready: requirements.lock environment.yml
ifeq ($(ENV),conda)
	conda env create --yes --prefix $(PREFIX) --file environment.yml
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "The kit needs Python 3.11, found $$($(PYTHON) -V): make env PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(PREFIX)
	$(PY) -m pip install -q --disable-pip-version-check -c requirements.lock torch
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
endif
	@$(PY) -c 'import os, site; open(site.getsitepackages()[0] + "/kit.pth", "w").write(os.getcwd())'
	$(PY) -m kit.models
	$(PY) -m kit.embed
	@touch $@

cluster: $(PREFIX)/cluster ## add Ray, which the sweep of 06 runs on with WORKERS=N or RAY_ADDRESS
$(PREFIX)/cluster: $(PREFIX)/ready cluster.lock
	$(PY) -m pip install -q --disable-pip-version-check --no-deps -r cluster.lock
	@touch $@

reproduce: env ## run all notebooks, end with verdicts (PROFILE=tour|laptop|workstation DTYPE=float32 FROM=03 ONLY=02 FORCE=1)
	@$(PY) -m kit reproduce $(if $(PROFILE),--profile $(PROFILE)) $(if $(FROM),--from $(FROM)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(FORCE),--force)

status: env ## say which stages are done, stale or failed
	@$(PY) -m kit status $(if $(PROFILE),--profile $(PROFILE))

test: lint unit notebooks ## linters, unit tests, and all notebooks at tour size
lint: env
	$(PREFIX)/bin/ruff check kit tests notebooks
	$(PREFIX)/bin/ruff format --check kit tests
	$(PREFIX)/bin/lint-imports
unit: env cluster
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 2 --dist loadfile --ignore tests/test_workstation.py
NBVAL = $(PY) -m pytest -p tests.nbval_lost --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
  -p no:cacheprovider notebooks
notebooks: env
	$(NBVAL) || { [ $$? -eq 75 ] && echo "Only a lost kernel failed; once more." && $(NBVAL); }
	$(PY) -m pytest tests/test_workstation.py

bundle: env ## pack a run into outputs/PROFILE/bundle.zip, to attach to a paper
	@$(PY) -m kit bundle $(if $(PROFILE),--profile $(PROFILE))

lab: env ## open JupyterLab on the notebooks
	$(PREFIX)/bin/jupyter lab notebooks

bench: env ## run the benchmarks (ONLY=name for one), write outputs/bench.json
	@$(PY) -m tests.bench $(ONLY)

# kvpress caps transformers below 5.3, hence an environment of its own (1.4 GB).
.PHONY: bench-peers
PEERS := $(or $(KIT_OUTPUTS),outputs)/peers
bench-peers: env .venv-peers/ready ## compare eviction with kvpress, write outputs/peers.json
	@$(PY) -m tests.peers.compare prepare
	@.venv-peers/bin/python tests/peers/kvpress_kept.py $(PEERS)/job.json $(PEERS)/kept.json
	@$(PY) -m tests.peers.compare
.venv-peers/ready: tests/peers/requirements.txt | $(PREFIX)/ready
	$(PY) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@

clean: ## delete outputs and caches; the environment and the fetched model stay
	find outputs -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .import_linter_cache
	find kit tests -name __pycache__ -type d -prune -exec rm -rf {} +
