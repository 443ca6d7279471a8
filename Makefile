# `make demo` and `make test` need make and Python 3.11 or newer; everything else goes into .venv.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: help demo test lint bench scoreboard clean

help:
	@echo "make demo        set everything up and pretrain UNITER on real pictures (about 10 minutes)"
	@echo "make test        set everything up, check the style and run the tests"
	@echo "make bench       speed, side by side with what people use today"
	@echo "make scoreboard  break it in every way we know and print what came of it (about 25 minutes)"
	@echo "make clean       remove .venv"

demo: .venv/demo.stamp
	$(BIN)/mmpre demo

test: .venv/test.stamp lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/test.stamp
	$(BIN)/mmpre bench --fetch

scoreboard: .venv/test.stamp
	$(BIN)/python -m tests.faults.scoreboard

clean:
	rm -rf .venv

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "mmpre needs Python 3.11 or newer; none was found. Install it, or say where: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/%.stamp: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing mmpre and what it needs (several minutes and some gigabytes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -c constraints.txt -e ".[$*]"
	@touch $@
