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

.PHONY: help setup tools lock-tools demo serve test-fast test lint k8s-settings k8s-secrets bench-engine bench-rounds bench-scheduler bench-estimator bench-formats bench-draft bench-stream bench-load bench-scaling bench-handoff chaos images images-test compose clean

help: ## show this list
	@echo "Usage: make TARGET"
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo "Variables: PORT=8000 (serve), PYTHON=python3.12, TORCH_INDEX=URL of a package index, ARGS=\"options of the command\""

setup: ## make the virtual environment and the default model, once; other targets do this first
	@$(PYTHON) services/tools/local/bootstrap.py --torch-index "$(TORCH_INDEX)"
	@$(BIN)/wisp models prepare --quiet

demo: setup ## ask the whole suite two questions and compare with plain decoding
	@$(BIN)/wisp demo $(ARGS)

serve: setup ## run the suite in the foreground, for any OpenAI client; Ctrl-C stops it
	@$(BIN)/wisp up --port $(PORT) $(ARGS)

tools: ## install the checkers of images and manifests, once, with their digests checked
	@.ci/tools

lock-tools: ## write .ci/tools.txt after a change of .ci/tools.in
	@$(PYTHON) -m venv .wisp/lock && .wisp/lock/bin/pip install --quiet uv==0.13.8
	@.wisp/lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		.ci/tools.in --output-file .ci/tools.txt

k8s-settings: setup ## write the services' default settings to k8s/, after a change of settings
	@for service in gateway drafter scheduler estimator verifier; do \
		$(BIN)/wisp settings $$service > k8s/base/settings/$$service.env || exit 1; done
	@$(BIN)/wisp settings drainorder > k8s/drain-order/settings.env

k8s-secrets: ## draw the passwords of the Kubernetes overlay 'local', once
	@$(PYTHON) k8s/overlays/local/draw_secrets.py

images: ## build images with docker, podman or buildah; ARGS="services cpu cuda" for all
	@docker/build.sh $(ARGS)

compose: images ## run the whole stack from the images with docker compose or podman-compose; Ctrl-C stops it
	@docker/compose.sh up

images-test: setup tools ## build the images and test them in containers; needs root and Debian
	@$(BIN)/python -m pytest docker/images_test.py $(ARGS)

test-fast: setup ## run the tests that need no brokers and no default model, in two minutes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not big_model and not slow" tests/pure tests/model \
		$(if $(wildcard .wisp/tools/installed),tests/manifests) $(ARGS)

test: setup tools ## run all tests on private brokers; one after another with ARGS="-n 0"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: setup ## run the linter, formatter and type checker
	@status=0; \
	for check in "ruff check" "ruff format --check" mypy; do $(BIN)/$$check || status=1; done; \
	exit $$status

bench-engine: setup ## time the engine, transformers and llama.cpp; writes .wisp/results/engine.json
	@$(BIN)/wisp bench engine $(ARGS)

bench-rounds: setup ## time the parts of a round outside the model; writes .wisp/results/rounds.json
	@$(BIN)/wisp bench rounds $(ARGS)

bench-scheduler: setup ## time the scheduler's decisions and its service; writes .wisp/results/scheduler.json
	@$(BIN)/wisp bench scheduler $(ARGS)

bench-estimator: setup ## measure the error of predicted batch times; writes .wisp/results/estimator.json
	@$(BIN)/wisp bench estimator $(ARGS)

bench-formats: setup ## measure quality, memory and speed by format of weights; writes .wisp/results/formats.json
	@$(BIN)/wisp bench formats $(ARGS)

bench-draft: setup ## measure acceptance and cost of drafts on held-out prompts; writes .wisp/results/draft.json
	@$(BIN)/wisp bench draft $(ARGS)

bench-stream: setup ## time one stream with and without drafts, and transformers; writes .wisp/results/stream.json
	@$(BIN)/wisp bench stream $(ARGS)

bench-load: setup ## measure SLO attainment under load, by policy; writes .wisp/results/load.json
	@$(BIN)/wisp bench load $(ARGS)

bench-handoff: setup ## measure the delay of streams when a verifier drains; writes .wisp/results/handoff.json
	@$(BIN)/wisp bench handoff $(ARGS)

chaos: setup ## inject 200 failures under load and check every token; writes .wisp/results/chaos.json
	@$(BIN)/wisp chaos $(ARGS)

bench-scaling: setup ## measure throughput by number of verifiers, and start times; writes .wisp/results/scaling.json
	@$(BIN)/wisp bench scaling $(ARGS)

clean: ## remove the environment, models, results, logs and caches; keep training runs
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@[ ! -d .wisp ] || find .wisp -mindepth 1 -maxdepth 1 ! -name training -exec rm -rf {} +
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
