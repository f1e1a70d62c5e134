# make quickstart     install, train four models on the bundled films, print the table, show three answers
# make test           the default tests, in .venv; TEST_WORKERS=1 on one core, TEST_ARGS="-k marginal" for some of them
# make reproduce      what papers found, small enough for 2 CPU cores and two hours, three seeds each; interrupted, it goes on.
#                     DATA=DIR holds the folders squad_open and nq_passages; without them the parts on the films alone
# make bench          ratios on this machine beside those kept in results/benchmark.json; BENCH_ARGS adds settings
# make lint types imports wheel      what .ci/run does besides
#
# PYTHON=python3.12 names another interpreter. On Linux the default build of torch brings gigabytes of CUDA; without a GPU
# point pip at PyTorch's CPU builds first (PIP_EXTRA_INDEX_URL).

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TEST_ARGS ?=
TEST_WORKERS ?= 2
BENCH_ARGS ?=

BIN := $(VENV)/bin
RAG := $(BIN)/rag-lightning
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
QUICKSTART := outputs/quickstart
REPRODUCE := outputs/reproduce
DATA ?= $(wildcard ../shared/data)
JOBS ?= hydra/launcher=workers
FILMS_MODEL := outputs/films_model

.PHONY: install install-dev quickstart reproduce reproduce-films reproduce-paragraphs test lint types imports wheel bench films-model clean
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

$(VENV)/.installed-reproduce: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[faiss,bm25,plots,minilm,sweeps]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

# ---------------------------------------------------------------- what a user runs

quickstart: $(VENV)/.installed
	$(RAG) train -m sweep=quickstart
	$(RAG) report runs=$(QUICKSTART) 'order=[closed_book,frozen,joint,joint_reindex]'
	$(RAG) predict checkpoint=$(QUICKSTART)/joint questions=bundled:films/test.jsonl.gz limit=3

# every sweep leaves out what is done already, so that the same command goes on where it was interrupted
reproduce: $(VENV)/.installed-reproduce $(if $(DATA),reproduce-paragraphs,reproduce-films)
	$(RAG) report runs=$(REPRODUCE)/passages/rag_token_joint curve=num_passages
	$(RAG) report runs=$(REPRODUCE)/passages/rag_sequence_joint curve=num_passages
	$(RAG) report runs=$(REPRODUCE)/index curve=search 'metrics=[index_recall@5,recall@5,exact_match]' \
		'order=[exact,hnsw_64,ivf_16,ivf_4,ivf_1,pq_8,hnsw_1]'
	$(RAG) report runs=$(REPRODUCE) findings=reproduce
	$(if $(DATA),,@echo "films alone: give DATA=DIR, with the folders squad_open and nq_passages, for the other rows")

reproduce-films: $(VENV)/.installed-reproduce
	$(RAG) train -m sweep=reproduce/table6 $(JOBS)
	$(BIN)/python -m rag_lightning.corpora.films.changed $(REPRODUCE)/changed
	$(RAG) evaluate -m sweep=reproduce/passages $(JOBS)
	$(RAG) evaluate -m sweep=reproduce/hot_swap $(JOBS)
	$(RAG) evaluate -m sweep=reproduce/index $(JOBS)

reproduce-paragraphs: reproduce-films
	$(RAG) train -m sweep=reproduce/reader task.folder=$(DATA)
	$(RAG) train -m sweep=reproduce/end2end task.folder=$(DATA) $(JOBS)
	$(RAG) train -m sweep=reproduce/natural_questions task.folder=$(DATA) $(JOBS)

# ---------------------------------------------------------------- what a developer runs

# a process on each of two cores, a file to each in turn: models this small gain nothing from a second thread, and threads
# that wait for one another on a busy machine are several times slower
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(TEST_ARGS)

# fails where a ratio is worse than the kept one by more than the tolerance; seconds are never compared
bench: $(VENV)/.installed
	$(RAG) benchmark baseline=results/benchmark.json $(BENCH_ARGS)

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
	$(RAG) train experiment=films/warm_retriever hydra.run.dir=$(FILMS_MODEL)/retriever
	$(RAG) train experiment=films/warm_reader hydra.run.dir=$(FILMS_MODEL)/reader_start
	$(RAG) train experiment=films/warm_reader hydra.run.dir=$(FILMS_MODEL)/reader \
		generator=hf generator.source=$(FILMS_MODEL)/reader_start/model/generator generator.tokenizer=bundled:films/tokenizer \
		optim.lr_generator=1e-3 data.denoising.infill_share=0.3 trainer.max_steps=1400
	$(BIN)/python -m rag_lightning.corpora.films.pack $(FILMS_MODEL)/retriever $(FILMS_MODEL)/reader

# ----------------------------------------------------------------

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find rag_lightning tests -name __pycache__ -type d -prune -exec rm -rf {} +
