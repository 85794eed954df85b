# Everything a developer types. Needs Python 3.11 or newer and make; `make demo` and `make test` create the rest.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
PROJECTS := pyproject.toml integrations/llama-index-umr/pyproject.toml integrations/langchain-umr/pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help install demo test newer lint types check format crash memory codes rerank training latency verify-checkpoints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## Create .venv with the three distributions (editable) at the versions of constraints.txt

demo: $(STAMP) ## Index the sample corpus, run its queries, write demo-output/report.html
	$(BIN)/umr demo --out demo-output $(ARGS)

test: $(STAMP) ## Run all tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(ARGS)

newer: $(STAMP) ## Run the LangChain tests with langchain-core 1.8 as well (fetches one wheel)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(VENV)/langchain-core-1.8 "langchain-core==1.8.1"
	PYTHONPATH=$(VENV)/langchain-core-1.8 $(BIN)/python -m pytest integrations/langchain-umr $(ARGS)

lint: $(STAMP) ## Check style, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## Check types of the core
	$(BIN)/mypy

check: lint types test ## lint, types and test

format: $(STAMP) ## Rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

crash: $(STAMP) ## Kill `umr index` 60 times at random moments and check what is left, beside bare Chroma
	$(BIN)/python benchmarks/crash/kill_index.py --kills 60 --bare --out benchmarks/results/crash.json $(ARGS)

memory: $(STAMP) ## Measure the peak memory of loading a checkpoint against the size of its weights
	$(BIN)/python benchmarks/loading/peak_memory.py --out benchmarks/results/loading.json

codes: $(STAMP) ## Measure what int8 and binary codes lose and save (fetches one npm package)
	$(BIN)/python benchmarks/codes/loss.py --out benchmarks/results/codes.json $(ARGS)

rerank: $(STAMP) ## Time reranking beside a loop over pairs and sentence-transformers (fetches two wheels, 15 minutes)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision torchvision==0.28.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/dashscope dashscope
	TORCHVISION_FOLDER=$(VENV)/torchvision $(BIN)/python benchmarks/bench_rerank.py \
	  --vocabulary $(VENV)/dashscope/dashscope/resources/qwen.tiktoken --out benchmarks/results/rerank.json $(ARGS)
	$(BIN)/python benchmarks/bench_rerank.py --vocabulary $(VENV)/dashscope/dashscope/resources/qwen.tiktoken \
	  --memory 50 1000 --out benchmarks/results/rerank_memory.json

training: $(STAMP) ## Time training beside sentence-transformers, and its memory (fetches four wheels, 40 minutes)
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/torchvision torchvision==0.28.0
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/dashscope dashscope
	$(BIN)/python -m pip install --quiet --constraint constraints.txt datasets
	TORCHVISION_FOLDER=$(VENV)/torchvision $(BIN)/python benchmarks/bench_train.py \
	  --vocabulary $(VENV)/dashscope/dashscope/resources/qwen.tiktoken --out benchmarks/results/train.json $(ARGS)
	TORCHVISION_FOLDER=$(VENV)/torchvision $(BIN)/python benchmarks/bench_train.py --memory 64 1024 \
	  --vocabulary $(VENV)/dashscope/dashscope/resources/qwen.tiktoken --out benchmarks/results/train_memory.json

latency: $(STAMP) ## Measure how long the event loop stands still under 64 concurrent queries (12 minutes)
	$(BIN)/python benchmarks/bench_async.py --out benchmarks/results/async.json $(ARGS)

verify-checkpoints: $(STAMP) ## Compare real GME-2B and MM-Embed weights with published values (needs the hub, 25 GB)
	$(BIN)/python benchmarks/verify_checkpoints.py $(ARGS)

clean: ## Remove everything that make created
	rm -rf $(VENV) demo-output build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: a broken download leaves none, and the next `make` goes on from there.
$(STAMP): constraints.txt $(PROJECTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "umr-plugins needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Point make at a newer one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "This Python can't create environments: on Debian and Ubuntu install python3-venv."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
	  --editable ".[demo,dev]" --editable integrations/llama-index-umr --editable integrations/langchain-umr
	@touch $@
