# Sets itself up: a machine with Python >= 3.10 and a C++17 compiler is enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test bench lint format clean

build: $(VENV)/.built

# A torch that $(PYTHON) has is used where it is new enough, by a path file; else a pinned one is installed.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@site=$$($(PYTHON) -c 'import torch, pathlib; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9); print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null); \
	if [ -n "$$site" ]; then \
	  echo "Using the torch in $$site"; \
	  echo "$$site" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing_torch.pth"; \
	else \
	  $(BIN)/pip install --disable-pip-version-check --quiet $(TORCH); \
	fi
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[test]'
	@touch $@

# Passive: workers that spin between the many small steps would only slow a machine that is shared.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

bench: build
	$(BIN)/stepladder bench
	$(BIN)/python examples/train_charlm.py --compare torch.AdamW:fused AdamW

$(VENV)/.lint: $(VENV)/.built
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build dist *.egg-info python/*.egg-info python/stepladder/_C*.so
