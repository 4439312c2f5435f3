# Everything is set up in .venv and build/, nothing outside this folder. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
export OPD_WERROR ?= ON
export OPD_EMULATOR ?= ON
export PIP_DISABLE_PIP_VERSION_CHECK := 1

py := .venv/bin/python
pip := $(py) -m pip install --quiet
torch_stamp := .venv/.installed-$(subst /,_,$(subst =,-,$(subst >,-,$(TORCH))))
c_sources := '*.cpp' '*.h' '*.cu' '*.cuh'
build_requires := 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.24' ninja
# Extras whose packages want another torch would replace it silently; the constraint makes that an error.
constraint := .venv/torch-constraint.txt

.PHONY: help run test test-integrations build lint format docs check clean distclean
.PHONY: gpu gpu-machine gpu-build gpu-truth gpu-check gpu-bench gpu-bench-linear gpu-bench-step

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 24

run: build ## Do the main job: distil two small teachers into a student on policy
	$(py) -m opd_engine train examples/arithmetic.toml

test: build lint ## Lint, floors, unit tests, gloo ranks, a reduced main job, the README's example
	$(py) -m pytest python_tests --ignore python_tests/integration --ignore python_tests/megatron_actor -n 2 --dist loadfile --durations 15 $(PYTEST_ARGS)

test-integrations: build .venv/.installed-integrations ## Foreign frameworks and the longer examples
	$(py) -m pytest python_tests/integration python_tests/megatron_actor --durations 15 $(PYTEST_ARGS)

build: .venv/.installed-dev ## Build or refresh opd_engine/_C in place; .venv imports opd_engine from here
	@$(py) setup.py --quiet build_ext --inplace

lint: .venv/.installed-dev ## ruff and clang-format, changing nothing
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	@sources=$$(git ls-files $(c_sources)); \
	  [ -z "$$sources" ] || .venv/bin/clang-format --dry-run --Werror $$sources

format: .venv/.installed-dev ## Let ruff and clang-format rewrite the sources
	$(py) -m ruff check --fix .
	$(py) -m ruff format .
	.venv/bin/clang-format -i $$(git ls-files $(c_sources))

docs: build .venv/.installed-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(py) -m mkdocs build --strict --quiet

check: build ## The conformance table on this machine, in 2 processes
	$(py) -m opd_engine check --tp 2

# ---- A GPU machine, offline: its own Python with torch, nvcc, cmake, ninja, pybind11, pytest; no .venv -----------------
# OUT: a folder for what the machine found, logs and records; without it records join those of the project.
GPU_ARCHS ?= 90a-real
OUT ?=
GPU_RECORDS ?= $(if $(OUT),$(OUT)/cuda_readme.jsonl,benchmarks/results/cuda_readme.jsonl)
# The seconds of each step, 480 in all. What one leaves over, the next has; none has the time of those that follow.
GPU_STEPS ?= machine:10 build:140 truth:100 bench:90 bench-linear:50 bench-step:30 check:60
GPU_LIMIT ?= 540
gpu_limited = timeout --signal=INT --kill-after=5 $(GPU_LIMIT)
gpu_log = $(if $(OUT),2>&1 | tee $(OUT)/$@.log)
gpu_tests = OPD_GPU_SECONDS=$$(($(GPU_LIMIT) - 25)) $(gpu_limited) $(PYTHON) -m pytest -m cuda -q --durations 5 $(PYTEST_ARGS)
gpu_bench = $(gpu_limited) $(PYTHON) -m opd_engine bench --device cuda --seconds 1 --out $(GPU_RECORDS)
# Records are written one shape at a time, so what time has cut off is said and is no failure.
gpu_cut = || { rc=$$?; [ $$rc -eq 124 ] || exit $$rc; echo "$@: time is up; not measured: the last [n/m] above and what \
  follows it. 'make $@' goes on there."; }

gpu: ## On a machine with a GPU: look, build, truth on CUDA, records, checks; 8 minutes at most
	@failed=; total=0; for step in $(GPU_STEPS); do total=$$((total + $${step#*:})); done; later=$$total; \
	for step in $(GPU_STEPS); do \
	  name=gpu-$${step%:*}; later=$$((later - $${step#*:})); limit=$$((total - later - SECONDS - 5)); \
	  echo "== $$name: $$limit s at most"; \
	  $(MAKE) --no-print-directory $$name GPU_LIMIT=$$limit || failed="$$failed $$name"; \
	  case "$$failed" in *gpu-machine*|*gpu-build*) break;; esac; \
	done; \
	echo "== $$SECONDS of $$total s"; [ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

gpu-machine:
	$(gpu_limited) $(PYTHON) cmake/check_gpu_machine.py $(gpu_log)

gpu-build:  # a warning of a compiler that was not tried must not cost the hour
	OPD_CUDA=ON OPD_CUDA_ARCHS=$(GPU_ARCHS) OPD_EMULATOR=OFF OPD_WERROR=OFF \
	  $(gpu_limited) $(PYTHON) setup.py --quiet build_ext --inplace $(gpu_log)
	$(PYTHON) -m opd_engine env

gpu-truth:  # values and gradients against float64, before anything else is believed
	$(gpu_tests) python_tests/gpu/test_truth_on_cuda.py $(gpu_log)

gpu-check:  # streams, graphs, opcheck, sanitizers; tests that would begin in the last 25 s are skipped, each by name
	$(gpu_tests) python_tests/gpu --ignore python_tests/gpu/test_truth_on_cuda.py $(gpu_log)

gpu-bench:
	$(gpu_bench) --shapes gpu --compile-seconds 40 $(gpu_log) $(gpu_cut)

gpu-bench-linear:
	$(gpu_bench) --shapes linear-gpu --compile-seconds 10 $(gpu_log) $(gpu_cut)

gpu-bench-step:
	$(gpu_bench) step --shapes model-gpu --no-compile $(gpu_log) $(gpu_cut)

clean: ## Remove what was built, keep .venv
	rm -rf build dist site *.egg-info opd_engine/_C*.so

distclean: clean ## Remove .venv too
	rm -rf .venv

# ---- .venv -----------------------------------------------------------------------------------------------------------
$(py):
	@command -v $(PYTHON) >/dev/null || { echo "opd_engine: no $(PYTHON) on PATH; on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev" >&2; exit 1; }
	@$(PYTHON) cmake/check_system.py
	$(PYTHON) -m venv .venv

$(torch_stamp): | $(py)
	@$(py) cmake/check_system.py
	$(pip) '$(TORCH)'
	@rm -f .venv/.installed-*
	@$(py) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(constraint)
	@touch $@

.venv/.installed-build: $(torch_stamp)
	$(pip) $(build_requires) wheel
	@touch $@

# The editable install compiles the module and brings what the main job and the tests need.
.venv/.installed-dev: pyproject.toml .venv/.installed-build
	$(pip) --no-build-isolation -c $(constraint) -e '.[train,lora,dev]'
	@touch $@

.venv/.installed-docs: pyproject.toml .venv/.installed-dev
	$(pip) --no-build-isolation -c $(constraint) -e '.[docs]'
	@touch $@

.venv/.installed-integrations: pyproject.toml .venv/.installed-dev
	$(pip) --no-build-isolation -c $(constraint) -e '.[megatron]'
	$(py) -m pip download --quiet --no-deps --dest .venv/build-requires $(build_requires)  # for isolated installs, offline
	@touch $@
