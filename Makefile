# Python >= 3.10 and make are all that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help venv demo test test-all check bench bench-dp bench-secagg bench-audit bench-poc clean

help: ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

venv: $(BIN)/.installed ## create .venv and install fedct with what was tested

$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing: about 6 GB, a few minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[he]'
	touch $@

$(BIN)/.installed-test: $(BIN)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[he,test]'
	@# Google's accountant, a reference in tests, asks for an older attrs than the rest can use, and works with this one.
	$(BIN)/python -m pip install --quiet --no-deps dp-accounting==0.6.0 dm-tree==0.1.10 immutabledict==4.3.1
	@# jax-privacy's auditing module, a reference for bounds on epsilon, is read without the JAX that the rest of it needs.
	$(BIN)/python -m pip install --quiet --no-deps jax-privacy==2.0.0
	touch $@

demo: venv ## train on the embedded cohort in NVFlare's simulator (10 minutes on 2 cores)
	@mkdir -p runs && touch runs/.demo-started
	PATH="$(CURDIR)/$(BIN):$$PATH" nvflare simulator jobs/ct_ddpm
	@$(BIN)/fedct receipt ct_ddpm --newer-than runs/.demo-started

check: $(BIN)/.installed-test ## lint, format and types
	@# No cache: it does not see that a module has become first-party.
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check ## lint, types and the tests (about 50 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow"

test-all: check ## the same with the tests that take minutes each
	$(BIN)/python -m pytest

bench: venv ## training benchmark: throughput against bare loops, NVFlare's overhead
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench,he]'
	$(BIN)/python tests/benchmarks/training.py

bench-dp: $(BIN)/.installed-test ## cost of differential privacy in time and memory, against plain training and Opacus
	$(BIN)/python tests/benchmarks/dp.py

bench-secagg: $(BIN)/.installed-test ## secure aggregation beside Flower's and CKKS, and what it adds to a round
	$(BIN)/python tests/benchmarks/secagg.py
	$(BIN)/python tests/benchmarks/secagg_round.py

bench-audit: $(BIN)/.installed-test ## what the audit says of an overfitted, an untrained and a private model (an hour)
	$(BIN)/python tests/benchmarks/audit.py runs/bench_audit

bench-poc: venv ## the demo's job in a provisioned federation beside the simulator (20 minutes)
	$(BIN)/python tests/benchmarks/provisioned_job.py runs/bench_poc

clean: ## remove what can be made again; runs/ and sites/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
