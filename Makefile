# The front door: every target calls a module, and `make help` lists them. Pass more flags on with ARGS='…'.
SHELL := /bin/bash
PYTHON ?= python3
PY := .venv/bin/python
# Large tensors on the CPU in huge pages: 1.7 times the speed of a step whose time goes into page faults.
export THP_MEM_ALLOC_ENABLE ?= 1

# Flink and Spark, for RUNNER=FlinkRunner and RUNNER=SparkRunner, fetched once by `make engines`; and in bin/
# an S3 server for the tests, made once by `make s3-server`.
export HARDNESS_ENGINES ?= $(CURDIR)/.engines

quoted = $(foreach word,$(1),'$(word)')
runner = $(if $(RUNNER),--runner $(RUNNER)) $(if $(FLINK_MASTER),--flink_master $(FLINK_MASTER))
required = $(foreach name,$(1),$(if $($(name)),,$(error $(name)=… is missing: see `make help`)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-faults lint format clean
.PHONY: engines flink-up flink-down s3-server
.PHONY: tokenize-corpus train-alm score-corpus status verify pretrain sweep simulate replay bench-scoring

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --progress-bar on -c constraints.txt -e '.[dev]'
	touch $@

setup: .venv/.installed  ## .venv with the exact versions of constraints.txt

demo: .venv/.installed  ## from text to trained models and results, on the CPU, in minutes
	$(PY) -m benchmarks.demo $(ARGS)

test: .venv/.installed  ## the whole test suite
	$(PY) -m pytest -n auto --dist loadgroup $(ARGS)

test-fast: .venv/.installed  ## the tests that are not marked slow
	$(PY) -m pytest -n auto --dist loadgroup -m 'not slow' $(ARGS)

test-faults: .venv/.installed  ## a fault of every kind: kill -9, a full disk, a flipped bit, … (minutes)
	$(PY) -m pytest -m faults $(ARGS)

lint: .venv/.installed  ## ruff, and mypy --strict
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/.installed  ## ruff's formatter and safe fixes
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## remove .venv and caches (never data)
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info build

tokenize-corpus: .venv/.installed  ## CORPUS='…/*.jsonl.gz' TOKENIZER=… BLOCKS=…
	$(call required,CORPUS TOKENIZER BLOCKS)
	$(PY) -m pipeline.tokenize_corpus --input $(call quoted,$(CORPUS)) --tokenizer $(TOKENIZER) --output $(BLOCKS) \
		$(runner) $(ARGS)

engines: .venv/.installed  ## fetches Flink, and Beam's job servers for Flink and Spark (Java, Maven)
	$(PY) -m pipeline.engines fetch $(ARGS)

flink-up: .venv/.installed  ## a JobManager, TaskManagers and a job server on this machine [TASKMANAGERS=2]
	$(PY) -m pipeline.engines fetch flink
	$(PY) -m pipeline.engines flink-up $(if $(TASKMANAGERS),--taskmanagers $(TASKMANAGERS)) $(ARGS)

flink-down: .venv/.installed  ## ends all of them, and whatever they started
	$(PY) -m pipeline.engines flink-down $(ARGS)

s3-server: $(HARDNESS_ENGINES)/bin/versitygw  ## an S3 server for the tests (Go)

$(HARDNESS_ENGINES)/bin/versitygw:
	GOBIN=$(abspath $(@D)) go install github.com/versity/versitygw/cmd/versitygw@v1.8.0

train-alm: .venv/.installed  ## BLOCKS=… ALM=…
	$(call required,BLOCKS ALM)
	$(PY) -m trainer.train_alm --blocks $(BLOCKS) --output_dir $(ALM) $(ARGS)

score-corpus: .venv/.installed  ## CORPUS='…/*.jsonl.gz' ALM=… SHARDS=… [TOKENIZER=…] [RUNNER=… FLINK_MASTER=…]
	$(call required,CORPUS ALM SHARDS)
	$(PY) -m pipeline.score_corpus --input $(call quoted,$(CORPUS)) --alm $(ALM) --output $(SHARDS) \
		$(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(runner) $(ARGS)

status: .venv/.installed  ## SHARDS=…
	$(call required,SHARDS)
	$(PY) -m pipeline.status $(SHARDS) $(ARGS)

verify: .venv/.installed  ## SHARDS=…
	$(call required,SHARDS)
	$(PY) -m pipeline.verify $(SHARDS) $(ARGS)

pretrain: .venv/.installed  ## SHARDS=… MODEL=… (or CONFIG=…) ALPHA=0.001 OUTPUT=…
	$(call required,SHARDS OUTPUT)
	$(PY) -m trainer.pretrain --shards $(SHARDS) $(if $(ALPHA),--alpha $(ALPHA)) --output_dir $(OUTPUT) \
		$(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(CONFIG),--config_name $(CONFIG)) $(ARGS)

sweep: .venv/.installed  ## SHARDS=… MODEL=… (or CONFIG=…) OUTPUT=… [ALPHAS='inf 0 0.001 0.005'] [SEEDS='0 1 2']
	$(call required,SHARDS OUTPUT)
	$(PY) -m trainer.sweep --shards $(SHARDS) --output_dir $(OUTPUT) \
		$(if $(ALPHAS),--alphas $(ALPHAS)) $(if $(SEEDS),--seeds $(SEEDS)) \
		$(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(CONFIG),--config_name $(CONFIG)) $(ARGS)

simulate: .venv/.installed  ## SHARDS=… [ALPHAS='inf 0.001 0']
	$(call required,SHARDS)
	$(PY) -m trainer.simulate --shards $(SHARDS) $(if $(ALPHAS),--alphas $(ALPHAS)) $(ARGS)

replay: .venv/.installed  ## SHARDS=… ALPHA=0.001
	$(call required,SHARDS)
	$(PY) -m trainer.replay --shards $(SHARDS) $(if $(ALPHA),--alpha $(ALPHA)) $(ARGS)

bench-scoring: .venv/.installed  ## scoring against the usual loops and the best matrix product (minutes)
	$(PY) -m benchmarks.scoring $(ARGS)
