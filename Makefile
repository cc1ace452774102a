# `make` or `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PORT ?= 8000
# The first Python that is new enough; the set-up says what to do if there is none.
PYTHON ?= $(or $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done),python3)
# Address of a package index to take torch from (for example one of CPU builds, which are much smaller).
TORCH_INDEX ?=
# More words for the command itself: make serve ARGS="--verifiers 2", make test ARGS="-k engine".
ARGS ?=
BIN := .venv/bin

.PHONY: help setup tools lock-tools demo serve test-fast test lint k8s-settings k8s-secrets bench-engine bench-rounds bench-scheduler bench-estimator bench-draft bench-stream bench-load bench-scaling bench-handoff chaos images images-test compose clean

help: ## this list
	@echo "make TARGET, one of:"
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /  \1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'
	@echo "Variables: PORT=8000 (serve), PYTHON=python3.12, TORCH_INDEX=address of a package index, ARGS=\"...\""

setup: ## the virtual environment and the default model, once; all other targets do it by themselves
	@$(PYTHON) services/tools/local/bootstrap.py --torch-index "$(TORCH_INDEX)"
	@$(BIN)/wisp models prepare --quiet

demo: setup ## ask two questions through the whole suite, and compare with plain decoding
	@$(BIN)/wisp demo $(ARGS)

serve: setup ## keep the suite in the foreground, for any OpenAI client; Ctrl-C stops it
	@$(BIN)/wisp up --port $(PORT) $(ARGS)

tools: ## the checkers of images and manifests, once; each is checked against its digest
	@.ci/tools

lock-tools: # after a change of .ci/tools.in
	@$(PYTHON) -m venv .wisp/lock && .wisp/lock/bin/pip install --quiet uv==0.13.8
	@.wisp/lock/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 \
		.ci/tools.in --output-file .ci/tools.txt

k8s-settings: setup ## write the services' defaults into k8s/, after a setting has changed
	@for service in gateway drafter scheduler estimator verifier; do \
		$(BIN)/wisp settings $$service > k8s/base/settings/$$service.env || exit 1; done
	@$(BIN)/wisp settings drainorder > k8s/drain-order/settings.env

k8s-secrets: ## draw the passwords of the Kubernetes overlay `local`, once
	@$(PYTHON) k8s/overlays/local/draw_secrets.py

images: ## build the images with docker, podman or buildah: make images ARGS="services cpu cuda"
	@docker/build.sh $(ARGS)

compose: images ## the whole stack from the images, with docker compose or podman-compose; Ctrl-C stops it
	@docker/compose.sh up

images-test: setup tools ## build the images and try them in containers; needs root and Debian
	@$(BIN)/python -m pytest docker/images_test.py $(ARGS)

test-fast: setup ## the tests without brokers and without the default model, in less than two minutes on two cores
	@$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not big_model" tests/pure tests/model \
		$(if $(wildcard .wisp/tools/installed),tests/manifests) $(ARGS)

test: setup tools ## all tests, on private brokers; one after another with ARGS="-n 0"
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: setup ## linter, formatter and type checker
	@status=0; \
	for check in "ruff check" "ruff format --check" mypy; do $(BIN)/$$check || status=1; done; \
	exit $$status

bench-engine: setup ## time the engine against transformers; writes .wisp/results/engine.json
	@$(BIN)/wisp bench engine $(ARGS)

bench-rounds: setup ## time a verification round outside the model; writes .wisp/results/rounds.json
	@$(BIN)/wisp bench rounds $(ARGS)

bench-scheduler: setup ## time the scheduler's decisions and its service; writes .wisp/results/scheduler.json
	@$(BIN)/wisp bench scheduler $(ARGS)

bench-estimator: setup ## how well batch times are predicted, by kind of batch; writes .wisp/results/estimator.json
	@$(BIN)/wisp bench estimator $(ARGS)

bench-draft: setup ## drafts on held-out prompts: what is accepted, what it costs; writes .wisp/results/draft.json
	@$(BIN)/wisp bench draft $(ARGS)

bench-stream: setup ## one stream with and without drafts, and transformers; writes .wisp/results/stream.json
	@$(BIN)/wisp bench stream $(ARGS)

bench-load: setup ## promises kept under load, by policy; writes .wisp/results/load.json
	@$(BIN)/wisp bench load $(ARGS)

bench-handoff: setup ## what a verifier that leaves costs the streams; writes .wisp/results/handoff.json
	@$(BIN)/wisp bench handoff $(ARGS)

chaos: setup ## let 200 things fail under load and check every token; writes .wisp/results/chaos.json
	@$(BIN)/wisp chaos $(ARGS)

bench-scaling: setup ## throughput with more verifiers, and how long a new one takes; writes .wisp/results/scaling.json
	@$(BIN)/wisp bench scaling $(ARGS)

clean: ## remove the environment, models, results, logs and caches; training runs stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@[ ! -d .wisp ] || find .wisp -mindepth 1 -maxdepth 1 ! -name training -exec rm -rf {} +
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
