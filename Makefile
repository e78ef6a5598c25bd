# `make help` lists every target. Each target that needs the environment creates it first.

PYTHON ?= python3
VENV ?= .venv
# Where the package index offers a CPU build of this version pip picks it up; elsewhere the same
# pin gives the CUDA build.
TORCH ?= torch==2.13.0
# To use an environment of your own, name its interpreter: `make test PY=python3`. Nothing is
# installed then.
PY ?= $(VENV)/bin/python
ifeq ($(PY),$(VENV)/bin/python)
ENVIRONMENT := $(VENV)/.complete
endif

CONFIG_latents := configs/pretrain/demo.yaml
CONFIG_data-report := configs/data/demo.yaml
CONFIG_finetune := configs/finetune/demo.yaml
CONFIG_pretrain := configs/pretrain/demo.yaml
CONFIG_generate := configs/finetune/demo.yaml
CONFIG_eval := configs/finetune/demo.yaml
CONFIG_capture := configs/finetune/demo.yaml
CONFIG_study := configs/study/arms.yaml
CONFIG_study-evaluator := configs/study/arms.yaml
ARGS ?=
RESUME ?=
# RECORD=1 keeps the summary of a run under results/.
RECORD ?=
CKPT ?=
OUT ?=
PROMPT ?=
PROMPTS ?=
# One word for the shell, whatever is in it.
quoted = '$(subst ','\'',$(1))'
config = $(or $(CONFIG),$(CONFIG_$@))
resume = $(if $(RESUME),run.resume=$(RESUME))
record = $(if $(RECORD),--record)

.DEFAULT_GOAL := help
.PHONY: help setup data study-data study-evaluator study-weights study latents data-report pretrain finetune generate eval bench bench-e2e flops tables capture analyse figures tensorboard notebooks screenshot test test-fast test-gpu sanitize lint format typecheck clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(ENVIRONMENT) ## create .venv with everything that the other targets need

$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) $(TORCH)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

data: $(ENVIRONMENT) ## build the demo set of real clips under data/demo
	$(PY) -m sla data $(ARGS)

study-data: $(ENVIRONMENT) ## make the study set of simulated clips: OUT= ARGS="--train 8000 --seed 0 --real"
	$(PY) -m sla study-data $(if $(OUT),--out $(OUT)) $(ARGS)

study-evaluator: $(ENVIRONMENT) ## train the study's evaluator network: CONFIG= OUT= ARGS=
	$(PY) -m sla study-evaluator --config $(config) $(if $(OUT),--out $(OUT)) $(ARGS)

study-weights: $(ENVIRONMENT) ## put the study's pretrained models and evaluators in place, from assets/study
	$(PY) -m sla study-weights join runs/study-pretrain/model.safetensors assets/study
	$(PY) -m sla study-weights join runs/study-evaluator/evaluator.safetensors assets/study
	$(PY) -m sla study-weights join runs/study-image-pretrain/model.safetensors assets/study/images
	$(PY) -m sla study-weights join runs/study-evaluator/image_evaluator.safetensors assets/study/images

study: $(ENVIRONMENT) ## run what is missing of the study: CONFIG= OUT= ARGS="--groups main --max-seconds 500"
	$(PY) -m sla study --config $(config) $(if $(OUT),--out $(OUT)) $(ARGS)

latents: $(ENVIRONMENT) ## encode a set into a latent cache: CONFIG= OUT= ARGS="latents.passes=4"
	$(PY) -m sla latents --config $(config) $(if $(OUT),--out $(OUT)) $(ARGS)

data-report: $(ENVIRONMENT) ## say what a set holds and what is wrong with it: CONFIG= OUT= ARGS=
	$(PY) -m sla data-report --config $(config) $(if $(OUT),--out $(OUT)) $(ARGS)

pretrain: $(ENVIRONMENT) ## train the demo model with full attention (for a GPU): CONFIG= ARGS= RESUME=
	$(PY) -m sla pretrain $(record) --config $(config) $(resume) $(ARGS)

finetune: $(ENVIRONMENT) ## fine-tune with SLA from the shipped weights: CONFIG= ARGS= RESUME=
	$(PY) -m sla finetune $(record) --config $(config) $(resume) $(ARGS)

generate: $(ENVIRONMENT) ## write videos: PROMPT="..." or PROMPTS=file, CKPT= CONFIG= OUT= ARGS=
	@test -n $(call quoted,$(PROMPT)$(PROMPTS)) || { echo 'usage: make generate PROMPT="what the video shows" [CKPT=model.safetensors], or PROMPTS=file with a prompt a line' >&2; exit 2; }
	$(PY) -m sla generate --config $(config) $(if $(PROMPT),--prompt=$(call quoted,$(PROMPT))) $(if $(PROMPTS),--prompts $(PROMPTS)) $(if $(CKPT),--weights $(CKPT)) $(if $(OUT),--out $(OUT)) $(ARGS)

eval: $(ENVIRONMENT) ## measure against full attention: CKPT= CONFIG= ARGS="eval.methods=[sla,sparse_only]"
	$(PY) -m sla eval $(record) --config $(config) $(if $(CKPT),--weights $(CKPT)) $(if $(OUT),--out $(OUT)) $(ARGS)

BENCH ?= kernels
bench: $(ENVIRONMENT) ## time the operator against exact attention: ARGS="--suite wan-1.3b --record", BENCH=attention
	$(PY) -m sla.benchmark $(BENCH) $(ARGS)

bench-e2e: $(ENVIRONMENT) ## time Wan2.1 from end to end: ARGS="--what step train --record"
	$(PY) -m sla.benchmark e2e $(ARGS)

flops: $(ENVIRONMENT) ## count every method's FLOPs beside the paper's: ARGS="--format csv"
	$(PY) -m sla flops $(ARGS)

tables: $(ENVIRONMENT) ## write the tables of README.md, REPRODUCTION.md and docs/ from results/
	$(PY) -m sla tables

capture: $(ENVIRONMENT) ## store a model's attention for figures: CKPT= CONFIG= PROMPT= OUT= ARGS="--timesteps 900,500"
	$(PY) -m sla capture --config $(config) $(if $(PROMPT),--prompt=$(call quoted,$(PROMPT))) $(if $(CKPT),--weights $(CKPT)) $(if $(OUT),--out $(OUT)) $(ARGS)

analyse: $(ENVIRONMENT) ## measure a capture: ARGS="--capture runs/NAME/capture --record"
	$(PY) -m sla analyse $(record) $(ARGS)

figures: $(ENVIRONMENT) ## draw the paper's figures from results/ and a capture: OUT= ARGS="--capture DIR"
	$(PY) -m sla figures $(if $(OUT),--out $(OUT)) $(ARGS)

tensorboard: $(ENVIRONMENT) ## serve the curves of runs/
	$(PY) -m tensorboard.main --logdir runs $(ARGS)

notebooks: $(ENVIRONMENT) ## run the notebooks and write their pictures to docs/pictures: ARGS="01 02"
	$(PY) -m sla notebooks $(if $(OUT),--out $(OUT)) $(ARGS)

screenshot: $(ENVIRONMENT) ## photograph TensorBoard on runs/ (extra screenshot, a Chromium): OUT= ARGS=
	$(PY) -m sla screenshot $(if $(OUT),--out $(OUT)) $(ARGS)

# A file's tests stay in one worker: they share what is slow to make.
test: $(ENVIRONMENT) ## run all tests, on all cores
	$(PY) -m pytest tests -n auto --dist loadfile $(ARGS)

test-fast: $(ENVIRONMENT) ## run the tests that take seconds
	$(PY) -m pytest tests -m "not slow" $(ARGS)

test-gpu: export SLA_TEST_GPU := 1
test-gpu: $(ENVIRONMENT) ## test the operator, and compiled layers of every method, on a GPU at real shapes
	$(PY) -m pytest tests/operator tests/attention/test_compiled.py tests/models/test_fusion.py $(ARGS)

# Without PyTorch's caching of memory, so that what lies beside a tensor is nobody's.
SANITIZED ?= test_sanitized and bfloat16
sanitize: export SLA_TEST_GPU := 1
sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
sanitize: $(ENVIRONMENT) ## run the kernels under compute-sanitizer on a GPU
	set -e; for tool in memcheck racecheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(PY) -m pytest tests/operator/test_triton.py -k '$(SANITIZED)' --timeout 0 $(ARGS); \
	done

lint: $(ENVIRONMENT) ## check format, lint and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENVIRONMENT) ## format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

typecheck: $(ENVIRONMENT) ## check types
	$(PY) -m mypy

clean: ## remove caches (never data, runs or the environment)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src kernels eval tests -name __pycache__ -type d -prune -exec rm -rf {} +
