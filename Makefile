# Everything runs from a bare checkout: the first target builds .venv, later ones reuse it.
#   make demo      generate text with the embedded checkpoint: full cache beside three compressed ones
#   make test      the tests (CPU, two workers);  make test-all adds the slow ones
#   make lint      ruff and mypy;  make format mends what ruff can mend
#   make oracle TEXT=DIR   re-record tests/fixtures with torch, transformers and kvpress (in .venv-oracle);
#                  DIR holds public-domain books as .txt, for prompts of the embedded checkpoint
#   make clean     remove the environments, caches and outputs

# The first interpreter that is new enough; override with `make PYTHON=...`.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt
PACKAGES := kvjax pallas_kernels models launch

.PHONY: demo test test-all lint format oracle clean
.DELETE_ON_ERROR:

demo: $(VENV)/.run
	$(PY) -m launch.demo

test: $(VENV)/.dev
	$(PY) -m pytest -n $(JOBS) --dist loadgroup -m "not slow and not oracle and not gpu"

test-all: $(VENV)/.dev
	$(PY) -m pytest -n $(JOBS) --dist loadgroup -m "not oracle and not gpu"

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy $(PACKAGES)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix --exit-zero --quiet .
	$(PY) -m ruff format .

oracle: .venv-oracle/.oracle
	@test -d "$(TEXT)" || { echo "usage: make oracle TEXT=DIR (a folder of .txt books)" >&2; exit 2; }
	.venv-oracle/bin/python tools/record_model_fixtures.py --out=tests/fixtures/models --text=$(TEXT)
	.venv-oracle/bin/python tools/record_kvpress_scorers.py tests/fixtures/kvpress/scorers.npz

clean:
	rm -rf $(VENV) .venv-oracle .pytest_cache .ruff_cache .mypy_cache .hypothesis build out *.egg-info
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: one for what the programs need, one for what the tests add.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "kvjax needs Python 3.11 or newer with the venv module" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvjax and what it runs with into $(VENV) (a minute or two, once)"
	$(PIP) -e '.[eval]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvjax with the test tools into $(VENV) (two or three minutes, once)"
	$(PIP) -e '.[eval,dev,aot]'
	@touch $@ $(VENV)/.run

.venv-oracle/.oracle: pyproject.toml
	$(PYTHON) -m venv .venv-oracle
	.venv-oracle/bin/python -m pip install -qq --disable-pip-version-check -e '.[eval,oracle]'
	@touch $@
