# Sets itself up: a machine with Python >= 3.10 and a C++17 compiler is enough.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
SANITIZED := tests/test_gpu.py tests/test_newton_schulz_cuda.py tests/test_matrix_root_cuda.py \
  tests/test_orthonormalize_cuda.py tests/test_gram_cuda.py tests/test_multiply_cuda.py tests/test_newton_schulz.py tests/test_bitwise.py \
  -k 'test_gpu or newton_schulz_cuda or matrix_root_cuda or orthonormalize_cuda or gram_cuda or multiply_cuda or tiles or (cuda and (sizes or layouts or stochastic))'
# One architecture is enough to develop; a release has all of CMakeLists.txt's.
export STEPLADDER_CUDA_ARCHITECTURES ?= 90a
CXX_FILES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# The scripts that draw the figures of the essay; drawing.py is what they share.
FIGURES := $(filter-out drawing,$(patsubst examples/figures/%.py,%,$(wildcard examples/figures/*.py)))

.PHONY: build test sanitize bench docs lint format clean device device-build device-test device-sanitize device-bench

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

# Not with the rest, as a torchvision of another torch would replace this one: timm asks for any. A torch that none was
# published for goes without.
$(VENV)/.frameworks: pyproject.toml | $(VENV)/.built
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	@wanted=$$($(BIN)/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("stepladder") if "frameworks" in r))') && \
	$(BIN)/pip install --disable-pip-version-check --quiet --constraint $(VENV)/torch.txt $$wanted && touch $@ || \
	  echo "The extra 'frameworks' could not be installed beside this torch: its tests will be skipped" >&2

# Passive: workers that spin between the many small steps would only slow a machine that is shared.
test: build $(VENV)/.frameworks
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest

# The CUDA kernels in the emulator, under the compiler's sanitizers, then with its own detector of races.
sanitize: build
	OMP_WAIT_POLICY=passive STEPLADDER_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/python -m pytest $(SANITIZED)
	OMP_WAIT_POLICY=passive STEPLADDER_SANITIZE=races $(BIN)/python -m pytest $(SANITIZED)

bench: build
	$(BIN)/stepladder bench --processes 2
	$(BIN)/python examples/train_charlm.py --compare torch.AdamW:fused AdamW

# Draws the figures, then makes the site. A warning, as of a link that leads nowhere, is an error.
docs: build
	mkdir -p docs/figures
	for figure in $(FIGURES); do \
	  $(BIN)/python examples/figures/$$figure.py --output docs/figures/$$figure.png || exit; \
	done
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "The site begins at build/docs/index.html"

# On a machine with a GPU, by $(PYTHON) and its own torch: nothing is downloaded, and .venv is left alone.
device:
	$(PYTHON) -m bench.device

device-build device-test device-sanitize device-bench: device-%:
	$(PYTHON) -m bench.device $*

# Linters that $(PYTHON) already has leave no script in the environment, so they are installed there once more.
$(VENV)/.lint: $(VENV)/.built
	$(BIN)/pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@for tool in ruff mypy clang-format; do \
	  test -x $(BIN)/$$tool || $(BIN)/pip install --disable-pip-version-check --quiet --ignore-installed --no-deps \
	    $$tool==$$($(BIN)/python -c "from importlib.metadata import version; print(version('$$tool'))") || exit; \
	done
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
	rm -rf $(VENV) build dist docs/figures *.egg-info python/*.egg-info python/stepladder/_C*.so
