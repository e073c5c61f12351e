# make demo | test | lint | docs | bench: each makes its own .venv first; Python >= 3.10, make and a C++ compiler are enough.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long test-integrations test-isas test-torch lint format docs wheel bench gpu gpu-sanitize clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: .venv/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# Compilers, sanitizers and a dry run of `make gpu`.
test-long: .venv/ready
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m long

# With the frameworks that fastclip goes into, in an environment of their own. timm without torchvision, which this torch
# has none for, and torchtitan without what only its trainer needs.
test-integrations: .venv-integrations/ready
	.venv-integrations/bin/python -m pytest -q -n 2 tests/integrations tests/test_guides.py tests/test_wrapped.py tests/test_rules_agc.py

# What depends on the instructions of the CPU, with those that other CPUs have (torch's and ours); and without the compiled
# packer.
ISAS = ATEN_CPU_CAPABILITY=default,FASTCLIP_CPU_ISA=portable ATEN_CPU_CAPABILITY=avx2,FASTCLIP_CPU_ISA=avx2 FASTCLIP_PACKER=python
comma := ,
test-isas: .venv/ready
	for isa in $(ISAS); do \
	  echo $$isa; \
	  env $$(echo $$isa | tr $(comma) ' ') $(BIN)/python -m pytest -q -n 2 -m "isa and not slow" -k "not triton and not cuda" || exit 1; \
	done

# The tests with another torch: `make test-torch TORCH=2.14.1`, in an environment of its own.
test-torch: $(if $(TORCH),.venv-torch-$(TORCH)/ready)
	@test -n "$(TORCH)" || (echo "usage: make test-torch TORCH=2.14.1"; exit 2)
	.venv-torch-$(TORCH)/bin/python -m pytest -q -n 2 --dist worksteal -m "not long"

CXX_SOURCES = $(wildcard csrc/*.h csrc/*/* $(foreach folder,emulation native no_float64,tests/$(folder)/*.h tests/$(folder)/*.cpp))
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# What is published, as far as this machine can build it, in dist/: the sources, the wheel for this machine (with the CUDA
# kernels where nvcc is) and the one without libraries. .github/workflows/release.yml builds for the others.
wheel: .venv/ready
	rm -rf dist
	FASTCLIP_MUST_COMPILE=1 $(BIN)/python -m build --outdir dist
	$(BIN)/python -m build --wheel --outdir dist -C wheel.cmake=false -C wheel.py-api=py3
	$(BIN)/python -m twine check --strict dist/*
	if $(BIN)/python -c "import auditwheel" 2>/dev/null; then $(BIN)/python -m auditwheel show dist/*-linux_*.whl; fi

# The documentation site, in docs/_build/html. Warnings are errors.
docs: .venv-docs/ready
	.venv-docs/bin/python -m sphinx -q -W --keep-going -n -b html docs docs/_build/html

# On the GPU if there is one. Some twenty minutes; writes bench/results/, docs/benchmarks.md and the README's table.
DEVICE = $(shell $(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")
bench: .venv/ready
	$(BIN)/python -m bench.clip --minutes 4.4 --json bench/results/$(DEVICE)-clip.json
	$(BIN)/python -m bench.clip --growth --minutes 1.6 --json bench/results/$(DEVICE)-growth.json
	$(BIN)/python -m bench.step --minutes 3.4 --json bench/results/$(DEVICE)-step.json
	$(BIN)/python -m bench.backward --minutes 2.5 --json bench/results/$(DEVICE)-backward.json
	$(BIN)/python -m bench.memory --json bench/results/$(DEVICE)-memory.json
	$(BIN)/python -m bench.rules --minutes 0.7 --json bench/results/$(DEVICE)-rules.json
	$(BIN)/python -m bench.monitor --json bench/results/$(DEVICE)-monitor.json
	$(BIN)/python -m bench.platform --json bench/results/cpu-platform.json
	$(BIN)/python -m bench.isas --json bench/results/cpu-isas.json
	$(BIN)/python -m bench.distributed --quick --json bench/results/cpu-distributed.json
	$(BIN)/python -m bench.report

# On a GPU machine, with the system's python3: no install, no network. `python3 -m bench.gpu --plan` tells how long.
gpu:
	python3 -m bench.gpu

gpu-sanitize:
	python3 -m bench.gpu --only sanitize

clean:
	rm -rf .venv .venv-docs .venv-integrations .venv-torch-* docs/_build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-docs/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

.venv-integrations/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-integrations
	.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test-integrations]'
	.venv-integrations/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps timm torchtitan spmd_types
	touch $@

# As constraints.txt has it, but for torch, and with the Triton that this torch brings; one without a GPU brings none.
.venv-torch-%/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-torch-$*
	(grep -v -E '^(torch|triton)==' constraints.txt; echo torch==$*) > .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==$*
	.venv-torch-$*/bin/python -c "import triton" 2>/dev/null || grep '^triton==' constraints.txt >> .venv-torch-$*/constraints.txt
	.venv-torch-$*/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-torch-$*/constraints.txt -e '.[test]'
	touch $@
