# make demo   a virtual environment, the package, and the quick start: a federation of 40 clients on a real model
# make deploy-demo   a coordinator and three sites with processes, keys and ledgers of their own, on this machine
# make test   the same environment and the whole quick suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo deploy-demo test test-slow test-mutations test-quantized lint docs bench clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo:
	@echo "installs into $(VENV) (once), then runs four methods on MiniLM: some five minutes on two idle cores"
	@$(MAKE) --no-print-directory $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/ficpd run quickstart --out runs/demo

deploy-demo: $(VENV)/installed
	rm -rf runs/deploy-demo
	$(BIN)/ficpd deploy demo --out runs/deploy-demo

test: $(VENV)/installed
	$(BIN)/pytest -m "not slow" -n 2 --dist loadfile --durations=15

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow -n 2 --dist loadfile --durations=30

test-mutations: $(VENV)/installed
	$(BIN)/python tests/mutations/run.py

# Beside the environment: torchao and bitsandbytes print warnings wherever transformers finds them.
.quantized/installed: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps --target .quantized "torchao>=0.15" "bitsandbytes>=0.46.1"
	touch $@

test-quantized: .quantized/installed
	PYTHONPATH=.quantized $(BIN)/pytest tests/backbones/test_quantization.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The pages as a site in site/, with a page of all settings; a link that leads nowhere is an error.
docs: $(VENV)/installed
	$(BIN)/pip install --quiet "mkdocs-material>=9.6,<10"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(VENV)/installed
	@echo "one file each; run the one you want: $(BIN)/python bench/engine.py (see bench/README.md)"

clean:
	rm -rf $(VENV) .quantized runs site .pytest_cache .ruff_cache .hypothesis
