# `make` or `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PORT ?= 8000
# The first Python of version 3.11 or newer. Without one, the set-up explains the next step.
PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done),python3)
# Package index for torch, for example one with the much smaller CPU builds.
TORCH_INDEX ?=
# Further arguments for the command: make serve ARGS="--verifiers 2", make test ARGS="-k engine".
ARGS ?=
BIN := .venv/bin

.PHONY: help setup demo serve test-fast test test-brokers test-clients test-gpu lint clean tools lock-tools lock-clients k8s-settings bench-engine bench-formats gpu-check gpu-bundle bench-draft bench-edits bench-learning bench-stream bench-rounds bench-scheduler bench-estimator bench-load bench-scaling bench-handoff bench-twin bench-gateway bench-grammar bench-vocabulary calibrate chaos images compose images-test k8s-secrets

## Use

help: ## show this list
	@awk 'BEGIN {print "Usage: make TARGET [ARGS=\"options of the command\"]"} \
		/^## / {print "\n" substr($$0, 4)} \
		/^[a-z0-9-]+:.*## / {name = text = $$0; sub(/:.*/, "", name); sub(/.*## /, "", text); \
			printf "  %-16s %s\n", name, text} \
		END {print "\nVariables: PORT=8000, PYTHON=python3.12, TORCH_INDEX=URL (index of torch)"}' $(MAKEFILE_LIST)

# A target that is not here, such as a misspelt one.
.DEFAULT:
	+@$(PYTHON) -c 'import difflib, re, sys; wanted, path = sys.argv[1:]; \
		names = re.findall(r"^([a-z0-9-]+):.*## ", open(path).read(), re.MULTILINE); \
		near = difflib.get_close_matches(wanted, names, 1); \
		sys.exit(f"make: there is no target {wanted}" + (f"; did you mean {near[0]}?" if near else ".") \
			+ " `make help` lists them.")' $@ $(firstword $(MAKEFILE_LIST))

setup: ## make environment and default model; others do this first
	@$(PYTHON) -m services.tools.local.bootstrap --torch-index "$(TORCH_INDEX)"

demo: setup ## ask the suite three questions; compare with plain decoding
	@$(BIN)/wisp demo $(ARGS)

serve: setup ## run the suite in the foreground; Ctrl-C stops it (PORT=8000)
	@$(BIN)/wisp up --port $(PORT) $(ARGS)

## Develop

# Two workers take the groups of tests (tests/groups.py) in order: the longest come first. On two cores, three workers
# take twice as long for all tests, and tests of timeouts fail. Many fast tests only wait: there a third worker pays.
WORKERS = 2
PARALLEL = -n $(WORKERS) --no-loadscope-reorder

test-fast: WORKERS = 3
test-fast: setup ## run the tests that need no brokers and no default model
	@$(BIN)/python -m pytest $(PARALLEL) -m "not big_model and not slow" --hypothesis-profile fast \
		tests/model $(if $(wildcard .wisp/tools/installed),tests/manifests) tests/pure $(ARGS)

test: setup tools ## run all tests on private brokers (ARGS="-n 0": one by one)
	@$(BIN)/python -m pytest $(PARALLEL) --durations=25 --durations-min=5 $(ARGS)

test-brokers: setup ## test on the newest RabbitMQ and Redis; needs root and Debian
	@.ci/brokers $(BIN)/python -m pytest -n 0 tests/broker tests/stack/test_cluster.py \
		tests/stack/test_least_privilege.py $(ARGS)

test-clients: setup ## try clients of others: OpenAI's, Anthropic's, agents
	@PYTHON=$(PYTHON) .ci/clients
	@$(BIN)/python -m pytest -n 0 tests/clients $(ARGS)

# Triton is 200 MB to fetch and 700 MB on disk, too much for every set-up.
test-gpu: setup ## test the kernels for GPUs in Triton's interpreter; needs no GPU
	@$(BIN)/pip install --quiet --constraint constraints.txt $$(grep '^triton==' constraints.txt)
	@$(BIN)/python -m pytest $(PARALLEL) tests/model/test_gpu_*.py tests/model/test_bench_gpu.py $(ARGS)

lint: setup ## run linter, formatter and type checker
	@status=0; \
	for check in "ruff check" "ruff format --check" mypy; do $(BIN)/$$check || status=1; done; \
	exit $$status

clean: ## remove all that was made here, except training runs
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@[ ! -d .wisp ] || find .wisp -mindepth 1 -maxdepth 1 ! -name training -exec rm -rf {} +
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

tools: ## install the checkers of images and manifests
	@.ci/tools

lock-tools: ## pin the checkers anew, after a change of .ci/tools.in
	@$(PYTHON) -m venv .wisp/lock && .wisp/lock/bin/pip install --quiet uv==0.13.8
	@.wisp/lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		.ci/tools.in --output-file .ci/tools.txt

lock-clients: ## pin the clients for Python anew
	@$(PYTHON) -m venv .wisp/lock && .wisp/lock/bin/pip install --quiet uv==0.13.8
	@.wisp/lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 --upgrade \
		tests/clients/requirements.in --output-file tests/clients/requirements.txt

k8s-settings: setup ## write default settings to k8s/, after a change of settings
	@for service in gateway drafter scheduler estimator verifier; do \
		$(BIN)/wisp settings $$service > k8s/base/settings/$$service.env || exit 1; done
	@$(BIN)/wisp settings drainorder > k8s/drain-order/settings.env

## Measure, each into .wisp/results

bench-engine: setup ## engine, transformers, llama.cpp
	@$(BIN)/wisp bench engine $(ARGS)

bench-formats: setup ## quality, memory and speed by weight format
	@$(BIN)/wisp bench formats $(ARGS)

gpu-check: setup ## kernels for GPUs: bits, speed, cost models (ARGS=--tiny without a GPU)
	@$(BIN)/wisp bench gpu $(ARGS)

gpu-bundle: setup ## gpu-check for a machine without a network, in pieces
	@$(BIN)/python -m services.tools.bench.gpu.bundle $(ARGS)

bench-draft: setup ## acceptance and cost of drafts on held-out prompts
	@$(BIN)/wisp bench draft $(ARGS)

bench-edits: setup ## predicted outputs on 50 edits
	@$(BIN)/wisp bench edits $(ARGS)

bench-learning: setup ## a draft that learns from its requests
	@$(BIN)/wisp bench learning $(ARGS)

bench-vocabulary: setup ## drafts by models with other vocabularies
	@$(BIN)/wisp bench vocabulary $(ARGS)

bench-stream: setup ## one stream with and without drafts, and transformers
	@$(BIN)/wisp bench stream $(ARGS)

bench-rounds: setup ## parts of a round outside the model
	@$(BIN)/wisp bench rounds $(ARGS)

bench-scheduler: setup ## scheduler's decisions and service
	@$(BIN)/wisp bench scheduler $(ARGS)

bench-estimator: setup ## error of predicted batch times
	@$(BIN)/wisp bench estimator $(ARGS)

bench-load: setup ## SLO attainment under load, by policy
	@$(BIN)/wisp bench load $(ARGS)

bench-scaling: setup ## throughput by number of verifiers, and start times
	@$(BIN)/wisp bench scaling $(ARGS)

bench-gateway: setup ## a gateway's streams, with a stub behind the queues
	@$(BIN)/wisp bench gateway $(ARGS)

bench-grammar: setup ## cost of grammars' masks in a round
	@$(BIN)/wisp bench grammar $(ARGS)

bench-handoff: setup ## delay of streams when a verifier drains
	@$(BIN)/wisp bench handoff $(ARGS)

bench-twin: setup ## the suite with emulated models against the simulator
	@$(BIN)/wisp bench twin $(ARGS)

calibrate: setup ## times of a model here, as a target profile
	@$(BIN)/wisp calibrate $(ARGS)

chaos: setup ## 200 failures under load, every token checked
	@$(BIN)/wisp chaos $(ARGS)

## Deploy

images: ## build images (ARGS="services cpu cuda" for all)
	@docker/build.sh $(ARGS)

compose: images ## run the stack from the images; Ctrl-C stops it
	@docker/compose.sh up

images-test: setup tools ## build the images and test them; needs root and Debian
	@$(BIN)/python -m pytest docker/images_test.py $(ARGS)

k8s-secrets: ## draw the passwords of the Kubernetes overlay 'local', once
	@$(PYTHON) k8s/overlays/local/draw_secrets.py
