# make quickstart     install, train four models on the bundled films, print the table, show three answers
# make test           the default tests, in .venv
# make bench          ratios on this machine beside those kept in results/benchmark.json; BENCH_ARGS adds settings
# make lint types imports wheel      what .ci/run does besides
#
# PYTHON=python3.12 names another interpreter. On Linux the default build of torch brings gigabytes of CUDA; without a GPU
# point pip at PyTorch's CPU builds first (PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
QUICKSTART := outputs/quickstart
FILMS_MODEL := outputs/films_model

.PHONY: install install-dev quickstart test lint types imports wheel bench films-model clean
.DELETE_ON_ERROR:

# ---------------------------------------------------------------- environment: stamps, so that a second call is quick

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("rag_lightning needs Python 3.10 or newer, came " + sys.version if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: its version, local build included, then stands for everything that asks for a torch
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# ---------------------------------------------------------------- what a user runs

quickstart: $(VENV)/.installed
	$(BIN)/rag-lightning train -m sweep=quickstart
	$(BIN)/rag-lightning report runs=$(QUICKSTART) 'order=[closed_book,frozen,joint,joint_reindex]'
	$(BIN)/rag-lightning predict checkpoint=$(QUICKSTART)/joint questions=bundled:films/test.jsonl.gz limit=3

# ---------------------------------------------------------------- what a developer runs

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(TEST_ARGS)

# fails where a ratio is worse than the kept one by more than the tolerance; seconds are never compared
bench: $(VENV)/.installed
	$(BIN)/rag-lightning benchmark baseline=results/benchmark.json $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

wheel: $(VENV)/.installed-dev
	.ci/wheel $(BIN)/python

# ---------------------------------------------------------------- how the bundled warm-up checkpoint is made

# Retriever: spans of passages as queries. Reader: training questions on their gold passages, and spans to repeat, then a
# second, gentler round with some spans to restore. Most of both with renamed entities. Neither reads a validation or test
# question, nor a passage that one is about. About 25 minutes on 2 CPU cores.
films-model: $(VENV)/.installed
	$(BIN)/rag-lightning train experiment=films/warm_retriever hydra.run.dir=$(FILMS_MODEL)/retriever
	$(BIN)/rag-lightning train experiment=films/warm_reader hydra.run.dir=$(FILMS_MODEL)/reader_start
	$(BIN)/rag-lightning train experiment=films/warm_reader hydra.run.dir=$(FILMS_MODEL)/reader \
		generator=hf generator.source=$(FILMS_MODEL)/reader_start/model/generator generator.tokenizer=bundled:films/tokenizer \
		optim.lr_generator=1e-3 data.denoising.infill_share=0.3 trainer.max_steps=1400
	$(BIN)/python -m rag_lightning.corpora.films.pack $(FILMS_MODEL)/retriever $(FILMS_MODEL)/reader

# ----------------------------------------------------------------

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find rag_lightning tests -name __pycache__ -type d -prune -exec rm -rf {} +
