# make demo | test | lint | bench: each makes its own .venv first; Python >= 3.10, make and a C++ compiler are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint format bench gpu clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n 2

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready
	$(BIN)/python bench/clip.py

# On a GPU machine, with the system's python3: no install, no network.
gpu:
	python3 -m bench.gpu

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
