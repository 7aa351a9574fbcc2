# Everything runs in .venv, which `make setup` makes from requirements.lock.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test check protos deploy-check wheel bench crash flower quality-dipaco quality-dipaco-short quality-text quality-merge

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.venv/installed: requirements.lock pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable . && touch $@

setup: .venv/installed ## make .venv with the weft command in it

demo: setup ## serve, join three workers, merge, judge, pull: on this machine alone
	$(BIN)/weft demo

test: setup ## all tests but the long campaigns
	$(BIN)/python -m pytest -q -m "not slow"

check: setup protos-check deploy-check ## lint, types, layers, protos, deployments, wheel
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.links $(BIN)/lint-imports
	$(MAKE) wheel

.venv-protos/installed: protos/requirements.txt
	$(PYTHON) -m venv .venv-protos
	.venv-protos/bin/pip install --quiet --requirement protos/requirements.txt && touch $@

protos: .venv-protos/installed ## write the gRPC stubs
	PATH=.venv-protos/bin:$$PATH .venv-protos/bin/python protos/generate.py

protos-check: .venv-protos/installed
	PATH=.venv-protos/bin:$$PATH .venv-protos/bin/python protos/generate.py --check

.venv-deploy/installed: tests/deploy/requirements.txt
	$(PYTHON) -m venv .venv-deploy
	.venv-deploy/bin/pip install --quiet --no-deps --requirement tests/deploy/requirements.txt && touch $@

deploy-check: .venv-deploy/installed ## render and check manifests, chart and Compose files
	.venv-deploy/bin/python tests/deploy/check_deploy.py

wheel: setup ## build the wheel, install it outside the checkout and run its demo
	$(BIN)/python tests/wheel/check_wheel.py

crash: setup ## 1,000 kills of the coordinator at random points
	WEFT_CRASHES=1000 $(BIN)/python -m pytest -q tests/faults -k crash -o log_cli=true --log-cli-level=INFO

bench: setup ## all benchmarks, with their results written
	for script in benchmarks/*.py; do $(BIN)/python $$script --write || exit 1; done

flower: setup ## a Flower federation with TLS, and its simulation, as processes: five minutes
	$(BIN)/python -m pytest -q -m slow tests/integration/test_flower_federation.py tests/integration/test_flower_simulate.py

quality-dipaco: setup ## DiPaCo's findings on text of known entropy: an hour or two of two cores, resumes
	$(BIN)/python -m benchmarks.quality --write

quality-dipaco-short: setup ## the largest of these effects, in three minutes; fails when a sign is wrong
	$(BIN)/python -m benchmarks.quality --short --fresh --cache build/quality-short

quality-text: setup ## the same once on manual pages of Debian's packages, which it downloads
	$(BIN)/python -m benchmarks.quality.real_text

quality-merge: setup ## which merge rule to use when, on a real sentence encoder: downloads 130 MB, an hour, resumes
	$(BIN)/python -m benchmarks.quality_merge --write
