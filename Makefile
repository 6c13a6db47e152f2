# Targets: demo, test, lint, soak, check-published. Each installs what it needs into .venv first.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
export PATH := $(VENV)/bin:$(PATH)

.PHONY: demo test lint soak setup check-published
.DEFAULT_GOAL := demo

INSTALL = $(VENV)/bin/pip install --quiet --disable-pip-version-check

setup: $(VENV)/installed

# The packages to train, evaluate and report, in the versions of requirements.txt. pip allows no extras in constraints.
$(VENV)/packages: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	sed 's/\[.*\]//' requirements.txt > $(VENV)/constraints.txt
	$(INSTALL) --constraint $(VENV)/constraints.txt '.[data,eval,report]'
	touch $@

# All packages, with the tools of test and lint.
$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	touch $@

demo: $(if $(wildcard $(VENV)/installed),$(VENV)/installed,$(VENV)/packages)
	rm -rf logs/demo
	python -m demo.stories --out data/stories
	python fineweb.py --source data/stories/stories.jsonl --encoding data/stories --out data/demo --val-tokens 100000 --overwrite
	python train.py --data data/demo --run demo --preset demo --device cpu --recipe speedrun --tokens 1_700_000 --val-every 200 --save-every 240 --log-every 40 --eval-lambada data/stories/lambada.txt --eval-every 200
	python eval_lambada.py --ckpt logs/demo --data data/stories/lambada.txt --text other --device cpu
	python eval_cbt.py --ckpt logs/demo --data data/stories/stories_NE_valid.txt data/stories/stories_CN_valid.txt --device cpu
	python sample.py --ckpt logs/demo --device cpu
	python report.py --runs demo --out logs/demo --floor data/stories/stories.jsonl

test: setup
	python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Models to check against published figures: make check-published SIZES="gpt2 gpt2-xl"
SIZES ?= gpt2

check-published: setup
	python -m core.train.check_published --ckpt $(SIZES)

soak: setup
	SOAK_KILLS=25 python -m pytest -q tests/test_kills.py
	SOAK_KILLS=30 python -m pytest -q tests/test_preparation.py -k killed_again

lint: setup
	ruff check .
	ruff format --check .
	mypy
