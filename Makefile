# Reproduces five memory systems for small language models. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env cluster lock reproduce verify status bundle test lint unit notebooks rehearse lab bench clean

ENV ?= venv
PREFIX := $(if $(filter conda,$(ENV)),.conda,.venv)
PY := $(PREFIX)/bin/python
# PYTHON names one, else it is the first of these that runs and has a version that the kit knows.
PYTHONS := python3 python3.13 python3.12 python3.11
SPAN := >=3.11,<3.14
KNOWS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
UV := $(shell command -v uv)
INSTALL := $(if $(UV),uv pip install -q --compile-bytecode --python $(PY),$(PY) -m pip install -q --disable-pip-version-check)
# What may be said on the command line, besides what others read from the environment.
READ := ENV PYTHON UV PROFILE FROM ONLY SET FORCE KEEP_GOING DTYPE MODEL WORKERS FILE DRY PUBLISH WEIGHTS SMALL
OTHERS := KIT_% OMP_% CUDA_% RAY_% HF_% PIP_% UV_% TORCH_% TRITON_%
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
$(foreach v,$(filter-out $(READ) $(OTHERS),$(GIVEN)),$(warning nothing reads $v; there are $(READ)))
# Threads that spin long while they wait make two model processes on one machine many times slower.
export GOMP_SPINCOUNT := 20000
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
export JUPYTER_PLATFORM_DIRS := 1
ifdef DTYPE
export KIT_DTYPE := $(DTYPE)
endif
ifdef MODEL
export KIT_MODEL := $(MODEL)
endif

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(PREFIX)/ready ## create the environment (by uv if there is one, ENV=conda by conda) and fetch the bundled models
$(PREFIX)/ready: requirements.lock environment.yml
ifeq ($(ENV),conda)
	conda env create --yes --prefix $(PREFIX) --file environment.yml
else ifneq ($(UV),)
	UV_VENV_CLEAR=1 uv venv -q --seed --python "$(or $(PYTHON),$(SPAN))" $(PREFIX)
	@$(PY) -c '$(KNOWS)' || { echo "The kit needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none."; exit 2; }
else
	@for python in $(if $(PYTHON),"$(PYTHON)",$(PYTHONS)); do \
	  if "$$python" -c '$(KNOWS)' 2>/dev/null; \
	  then echo "$$python -m venv $(PREFIX)"; exec "$$python" -m venv --clear $(PREFIX); fi; done; \
	echo "The kit needs Python 3.11, 3.12 or 3.13, and $(if $(PYTHON),$(PYTHON) is none,there is none as $(PYTHONS)):" \
	  "install uv, which finds or fetches one, or name one by make env PYTHON=/path/to/python3.12"; exit 2
endif
	@$(PY) -c 'import pathlib, shutil, sys, sysconfig; sys.exit(not (shutil.which("cc") or shutil.which("gcc")) or not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' || \
	  { echo "One package (pycosat) is compiled here, which needs a C compiler and Python's headers; install" \
	    "gcc and python3-dev (Debian, Ubuntu), gcc and python3-devel (Fedora) or, on macOS, xcode-select --install"; exit 2; }
	$(INSTALL) --no-deps --require-hashes -r requirements.lock
	$(INSTALL) torch==2.13.0
	@$(PY) -c 'import os, site; open(site.getsitepackages()[0] + "/kit.pth", "w").write(os.getcwd())'
	$(PY) -m ipykernel install --sys-prefix --name kit --display-name "Python (kit)"
	$(PY) -m kit fetch
	@touch $@

cluster: $(PREFIX)/cluster ## add Ray, which the sweep of 06 runs on with WORKERS=N or RAY_ADDRESS
$(PREFIX)/cluster: $(PREFIX)/ready cluster.lock
	$(INSTALL) --no-deps --require-hashes -r cluster.lock
	@touch $@

COMPILE := uv pip compile -q --universal --generate-hashes --python-version 3.11 --no-header --no-annotate
lock: ## write requirements.lock and cluster.lock anew from pyproject.toml, with uv
	$(COMPILE) pyproject.toml --group dev -o requirements.lock
	awk '/^[a-z]/ {keep = !/^(torch|cuda-|nvidia-)/ || /^nvidia-ml-py/} keep' requirements.lock > requirements.part
	mv requirements.part requirements.lock
	$(COMPILE) --group cluster -c requirements.lock -o cluster.lock

reproduce: env ## run all notebooks, end with verdicts (PROFILE=tour|quick|laptop|workstation DTYPE=float32 MODEL=... FROM=03 ONLY="01 03" SET="NAME=VALUE ..." DRY=1 FORCE=1 KEEP_GOING=1)
	@$(PY) -m kit reproduce $(if $(PROFILE),--profile $(PROFILE)) $(if $(FROM),--from $(FROM)) \
	  $(if $(ONLY),--only "$(ONLY)") $(foreach value,$(SET),--set '$(value)') $(if $(DRY),--dry-run) \
	  $(if $(FORCE),--force) $(if $(KEEP_GOING),--keep-going)

verify: env ## judge the published runs again from their records, without a model (about a minute)
	@$(PY) -m kit verify $(FILE)

status: env ## say which stages are done, stale or failed
	@$(PY) -m kit status $(if $(PROFILE),--profile $(PROFILE))

test: lint unit notebooks ## linters, unit tests, and all notebooks at tour size
lint: env
	$(PREFIX)/bin/ruff check kit tests notebooks
	$(PREFIX)/bin/ruff format --check kit tests
	$(PREFIX)/bin/lint-imports
unit: env cluster # three workers, as many tests wait for processes of their own
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -n 3 --dist loadfile --durations=10
NBVAL = OMP_NUM_THREADS=1 $(PY) -m pytest -p tests.nbval_lost --nbval-lax --nbval-current-env --nbval-cell-timeout=300 \
  -n 2 --dist loadfile --durations=10 -p no:cacheprovider notebooks
notebooks: env
	$(NBVAL) || { [ $$? -eq 75 ] && echo "Only a lost kernel failed; once more." && $(NBVAL); }

rehearse: env cluster ## what takes minutes: the workstation profile on toys, Ray, accelerate, gpu-check on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -m slow -n 2 --dist loadfile --durations=5

bundle: env ## pack a run into outputs/PROFILE/bundle.zip, to attach to a paper
	@$(PY) -m kit bundle $(if $(PROFILE),--profile $(PROFILE))

LAB := outputs/lab
lab: env ## open JupyterLab on copies of the notebooks, which stay in outputs/lab with what you change
	@mkdir -p "$(LAB)"; for book in notebooks/*.ipynb; do \
	  [ -e "$(LAB)/$${book##*/}" ] || cp "$$book" "$(LAB)"; done
	$(PREFIX)/bin/jupyter lab --ServerApp.root_dir=. "$(LAB)/00_tour.ipynb"

bench: env ## run the benchmarks (ONLY=name for one), write outputs/bench.json
	@$(PY) -m tests.bench $(ONLY)

.PHONY: gpu-check gpu-pack
gpu-check: env ## what one CUDA GPU says of the kit, in 8 minutes (DRY=1 on the CPU, ONLY="NAME ...", PUBLISH=1)
	@$(PY) -m tests.gpu_check $(ONLY) $(if $(DRY),--dry) $(if $(PUBLISH),--publish)
gpu-pack: env ## pack what gpu-check needs where there is no network, print the command (WEIGHTS=1)
	@$(PY) -m tests.gpu_pack $(if $(WEIGHTS),--weights)
.PHONY: gpu-study
gpu-study: env ## pack a study of 8 minutes for one CUDA GPU without network, in pieces (SMALL=1 for 0.5B)
	@$(PY) -m tests.gpu_study $(if $(SMALL),--small)

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

.PHONY: clean-outputs
clean: ## delete the caches of tests and linters; runs, environment and fetched models stay
	rm -rf .pytest_cache .ruff_cache .import_linter_cache
	find kit tests -name __pycache__ -type d -prune -exec rm -rf {} +
clean-outputs: ## delete all runs, but for the published ones
	find "$(or $(KIT_OUTPUTS),outputs)" -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} +
