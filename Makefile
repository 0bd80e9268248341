# Every target makes the environment it needs and says so. `make` alone prints this list.
#   make pretrain RECIPE=mmc                     train, evaluate before and after, export: runs/mmc/latest
#   make pretrain RECIPE=mmc DATA=photos/        the same on your own pictures
#   make test VENV=~/envs/torch                  use an environment that exists already

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
RECIPE ?=
DATA ?=
MASKS ?=
BACKBONE ?= runs/mmc/latest/backbone
IMAGES ?=
OUT ?= report.html
RUNS ?= runs
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.glpretrain
# Our own environment gets exactly the files of requirements.lock; one that was there before keeps what it has.
PIP := "$(BIN)/python" -m pip install --disable-pip-version-check --progress-bar off --quiet
LOCKED := $(if $(filter-out .venv,$(wildcard $(VENV))),,yes)

.PHONY: help setup lock lint types test test-slow pretrain evaluate tables inspect bench bench-gpu notebooks docs clean

help:  ## print this list
	@echo "usage: make TARGET [NAME=value ...]"; echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo; echo "  RECIPE=$(RECIPE)  a name below recipes/ (mmc, paper/...) or a path"
	@echo "  DATA=folder MASKS=folder  your own pictures, and pictures with masks  ARGS=\"--trainer.max_steps 100\"  anything else"
	@echo "  VENV=$(VENV)  PYTHON=$(PYTHON)  BACKBONE=$(BACKBONE)  IMAGES=\"a.jpg b.jpg\"  OUT=$(OUT)"

setup: $(STAMP)  ## make .venv and install the package (VENV=path: reuse that environment)

$(STAMP): pyproject.toml requirements.lock
	@if [ ! -x "$(BIN)/python" ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "setup: $(PYTHON) is $$($(PYTHON) --version 2>&1); Python 3.11 or newer is needed (PYTHON=path chooses another)" >&2; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "setup: $(PYTHON) cannot make environments (no venv/ensurepip). On Debian: apt install python3-venv; or VENV=path of an environment that exists" >&2; exit 1; }; \
	  echo "setup: making the environment $(VENV)"; \
	  $(PYTHON) -m venv "$(VENV)"; \
	fi
	@echo "setup: installing glpretrain into $(VENV) (the first time this downloads torch, some 2 GB)"
# Every file is compared with its hash, and none runs code of its own while it is installed.
	@$(if $(LOCKED),$(PIP) --require-hashes --no-deps --only-binary :all: --requirement requirements.lock)
	@if "$(BIN)/python" -c 'import sys, setuptools; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null; then isolation=--no-build-isolation; fi; \
	  $(PIP) $$isolation $(if $(LOCKED),--no-deps) --editable '.[dev]'
	@touch "$(STAMP)"
	@echo "setup: done"

lock: $(STAMP)  ## after a change of pyproject.toml or constraints.txt: the hashes and the table of licences (needs uv)
	@command -v uv >/dev/null || { echo "lock: uv is needed (pip install uv)" >&2; exit 1; }
	uv pip compile pyproject.toml --extra dev --constraint constraints.txt --universal --generate-hashes --no-annotate \
	  --custom-compile-command "make lock" --quiet --output-file requirements.lock
	"$(BIN)/python" docs/licences.py

lint: $(STAMP)  ## ruff: errors, imports, formatting
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .

types: $(STAMP)  ## pyright: no error in the package
	"$(BIN)/pyright" --pythonpath "$(BIN)/python"

# Tests are many small computations: one thread each is as fast, and two files run side by side.
test: $(STAMP)  ## the tests, without those marked slow
	@echo "test: every test that is not marked slow"
	OMP_NUM_THREADS=1 WANDB_MODE=offline "$(BIN)/python" -m pytest -m "not slow" --numprocesses 2 --dist loadfile --durations 5 $(ARGS)

test-slow: $(STAMP)  ## the tests marked slow
	OMP_NUM_THREADS=1 WANDB_MODE=offline "$(BIN)/python" -m pytest -m slow --durations 5 $(ARGS)

pretrain: $(STAMP)  ## train a recipe: RECIPE=mmc [DATA=folder] [MASKS=folder] [ARGS="..."]
	@"$(BIN)/python" -m glpretrain.cli pretrain $(if $(RECIPE),"$(RECIPE)") $(if $(DATA),--data "$(DATA)") $(if $(MASKS),--masks "$(MASKS)") $(ARGS)

evaluate: $(STAMP)  ## score an exported backbone: [BACKBONE=folder] [RECIPE=name] [DATA=folder] [MASKS=folder]
	@"$(BIN)/python" -m glpretrain.cli evaluate "$(BACKBONE)" $(if $(RECIPE),--recipe "$(RECIPE)") $(if $(DATA),--data "$(DATA)") $(if $(MASKS),--masks "$(MASKS)") $(ARGS)

tables: $(STAMP)  ## the README's table of scores from run folders: [RUNS=folder] [ARGS="--data photos"]
	PYTHONPATH=tests "$(BIN)/python" tests/score_table.py "$(RUNS)" --write README.md $(ARGS)

inspect: $(STAMP)  ## a page to look into a backbone: IMAGES="a.jpg b.jpg" [BACKBONE=folder] [OUT=report.html] [ARGS=--untrained]
	@"$(BIN)/python" -m glpretrain.cli inspect "$(BACKBONE)" $(IMAGES) --out "$(OUT)" $(ARGS)

bench: $(STAMP)  ## what a step of a recipe costs, part by part: RECIPE=mmc [DATA=folder] [ARGS="--plan"]
	@"$(BIN)/python" -m glpretrain.cli bench $(if $(RECIPE),"$(RECIPE)") $(if $(DATA),--data "$(DATA)") $(ARGS)

bench-gpu: $(STAMP)  ## everything that is claimed of a GPU, measured on this one: [OUT=folder]
	PYTHONPATH=tests "$(BIN)/python" tests/gpu_table.py --out "$(if $(filter report.html,$(OUT)),gpu,$(OUT))" $(ARGS)

EXECUTED := $(patsubst notebooks/%,build/notebooks/%,$(wildcard notebooks/*.ipynb))

# Executed where the user's own runs are not: a notebook trains, and its folders stay in build/.
build/notebooks/%.ipynb: notebooks/%.ipynb $(STAMP)
	@echo "docs: executing $<"
	@mkdir -p build/notebooks/part && cp "$<" build/notebooks/part/ && cd build/notebooks/part \
	  && "$(abspath $(BIN))/jupyter-execute" --inplace "$(notdir $@)" >/dev/null && mv "$(notdir $@)" ..

docs: $(STAMP) $(EXECUTED)  ## the documents as a site, with executed notebooks: site/index.html; a link that leads nowhere is an error
	@"$(BIN)/python" -c 'import mkdocs, material, mkdocstrings, mkdocs_jupyter' 2>/dev/null || $(PIP) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --clean
	@echo "docs: site/index.html, open it in a browser"

notebooks: $(STAMP)  ## execute the notebooks
	@for notebook in notebooks/*.ipynb; do \
	  [ -e "$$notebook" ] || { echo "notebooks: there are none in notebooks/"; exit 0; }; \
	  echo "notebooks: $$notebook"; "$(BIN)/jupyter-execute" "$$notebook" || exit 1; \
	done

clean:  ## remove caches and build products; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
