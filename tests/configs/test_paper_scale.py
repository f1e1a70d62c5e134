"""Recipes at the size of their papers: built with all their settings, of models and files that are tiny.

Replaced is what cannot be here alone: pretrained weights, Wikipedia and the data sets, GPUs. Tiny models have the
positions of those that they stand for, so that a prompt which is too long for BART is too long here.
"""

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
)

from rag_lightning.cli.build import build_run, build_task_run, build_trainer
from rag_lightning.cli.prepared import with_prepared
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.objectives import Contrastive, MarginalObjective
from rag_lightning.training.optim import build_optimizer
from rag_lightning.training.reindex import ReindexCallback, ReindexSchedule
from rag_lightning.utils.io import read_json
from tests.labelled_files import write_labelled
from tests.recipe_files import FILMS, MAKERS, NUMBER, write_published
from tests.recipe_rows import COLUMNS, HEADS, composed

RAG = {"query_encoder": 3e-5, "generator": 3e-5}
READER = {"generator": 3e-5}
HNSW, FLAT = ("HNSW128,SQ8", "int8", 128), ("Flat", "float16", None)
REALM = ("HNSW64", "float32", 128)
OWN: dict[str, tuple[str, int, dict[str, float], tuple[str, str, int | None] | None]] = {
    # objective, K, the rate of each part that learns, the index: factory, storage, breadth of search
    "rag/table1_rag_token": ("rag_token", 5, RAG, HNSW),
    "rag/table1_rag_sequence": ("rag_sequence", 5, RAG, HNSW),
    "rag/table2_bart": ("closed_book", 0, READER, None),
    "rag/table2_rag_token": ("rag_token", 10, RAG, HNSW),
    "rag/table2_rag_sequence": ("rag_sequence", 10, RAG, HNSW),
    "rag/table6_rag_token": ("rag_token", 5, RAG, HNSW),
    "rag/table6_rag_token_frozen": ("rag_token", 5, READER, HNSW),
    "rag/table6_rag_token_bm25": ("rag_token", 5, READER, None),
    "rag/table6_rag_sequence": ("rag_sequence", 5, RAG, HNSW),
    "rag/table6_rag_sequence_frozen": ("rag_sequence", 5, READER, HNSW),
    "rag/table6_rag_sequence_bm25": ("rag_sequence", 5, READER, None),
    "rag/hotswap": ("rag_token", 5, RAG, HNSW),
    "rag_end2end/squad_original": ("rag_token", 5, RAG, ("HNSW128", "float32", 128)),
    "rag_end2end/squad_end2end": ("rag_token", 5, {**RAG, "passage_encoder": 3e-5}, ("HNSW128", "float32", 128)),
    "realm/ict": ("contrastive", 5, {"query_encoder": 1e-4, "passage_encoder": 1e-4}, REALM),
    "realm/fresh": ("rag_sequence", 7, {**RAG, "passage_encoder": 3e-5}, REALM),
    "realm/stale": ("rag_sequence", 7, {**RAG, "passage_encoder": 3e-5}, REALM),
    "realm/finetune": ("rag_sequence", 5, {"query_encoder": 1e-5, "generator": 1e-5}, REALM),
    "fid/base": ("fid", 100, {"generator": 1e-4}, FLAT),
    "fid/large": ("fid", 100, {"generator": 5e-5}, FLAT),
    "atlas/nq_64_shot": ("fid", 40, {"query_encoder": 4e-5, "generator": 4e-5}, FLAT),
    "dpr/single_nq": ("contrastive", 20, {"query_encoder": 2e-5, "passage_encoder": 2e-5}, FLAT),
    "dpr/single_nq_mined_negatives": ("contrastive", 20, {"query_encoder": 2e-5, "passage_encoder": 2e-5}, FLAT),
}
REFRESHED = {"rag_end2end/squad_end2end": 62, "realm/fresh": 500, "realm/stale": 15_000}  # steps between two indexes
PASSAGES = 128  # FiD reads 100 of them
SOURCES = {  # a source of the hub, and which tiny model stands for it
    "facebook/dpr-question_encoder-single-nq-base": "dpr_query",
    "facebook/dpr-ctx_encoder-single-nq-base": "dpr_passage",
    "facebook/contriever": "bert",
    "google-bert/bert-base-uncased": "bert",
    "google-bert/bert-base-cased": "bert",
    "facebook/bart-base": "bart",
    "facebook/bart-large": "bart",
    "google-t5/t5-base": "t5",
    "google-t5/t5-large": "t5",
    "google/t5-large-lm-adapt": "t5",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny saved models of the types that recipes name, with their numbers of positions."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    pairs = zip(FILMS, MAKERS, strict=True)
    texts = [f"who made {film} {maker} is by . it made question : title context" for film, maker in pairs]
    words = train_word_tokenizer(texts, vocab_size=200)
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    width |= {"vocab_size": len(words), "max_position_embeddings": 512}
    BertModel(BertConfig(**width)).save_pretrained(root / "bert")
    DPRQuestionEncoder(DPRConfig(**width)).save_pretrained(root / "dpr_query")
    DPRContextEncoder(DPRConfig(**width)).save_pretrained(root / "dpr_passage")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 1024}
    layers = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    bart = AutoConfig.for_model("bart", **layers, **heads, **special, vocab_size=len(words), forced_eos_token_id=2)
    AutoModelForSeq2SeqLM.from_config(bart).save_pretrained(root / "bart")
    narrow = {"d_model": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    t5 = AutoConfig.for_model("t5", **narrow, vocab_size=len(words), decoder_start_token_id=0, eos_token_id=2)
    AutoModelForSeq2SeqLM.from_config(t5).save_pretrained(root / "t5")
    folders = {path.name: path for path in root.iterdir()}
    for folder in folders.values():
        words.save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data sets as published, with more passages than any recipe reads."""
    root = write_published(tmp_path_factory.mktemp("published") / "data")
    with gzip.open(root / "wikipedia" / "psgs_w100.tsv.gz", "at") as stream:
        stream.writelines(f"{n}\tNobody made {n}.\tOther {n}\n" for n in range(NUMBER + 1, PASSAGES + 1))
    write_labelled(root)
    return root


def replacements(config: DictConfig, models: dict[str, Path], published: Path) -> dict[str, Any]:
    """Returns what stands for the parts of a recipe that cannot be here: settings with their values.

    Rows share the cache: many read the same files.
    """
    found: dict[str, Any] = {
        f"{group}.{key}": str(models[SOURCES[config[group][key]]])
        for group in ("encoder", "generator", "reader")
        for key in ("source", "passage_source")
        if config.get(group) is not None and config[group].get(key) in SOURCES
    }
    assert found, "every recipe starts from pretrained weights"
    found |= {"task.folder": str(published), "paths.cache_dir": str(published / "cache")}
    found |= {"trainer.accelerator": "cpu", "trainer.devices": 1, "trainer.precision": "32-true"}
    return {**found, "trainer.enable_progress_bar": "false"}


def tiny(recipe: DictConfig, models: dict[str, Path], published: Path, folder: Path) -> DictConfig:
    """Returns a copy with the replacements: all else stays as the recipe says it."""
    config = recipe.copy()
    OmegaConf.set_readonly(config, False)
    values = {**replacements(recipe, models, published), "paths.run_dir": str(folder / "run")}
    for key, value in values.items():
        OmegaConf.update(config, key, value)
    config.trainer.enable_progress_bar = False
    return config


def test_every_recipe_is_built() -> None:
    assert set(OWN) == set(COLUMNS)
    assert HEADS == ("bert/conll2003_ner",), "built below"


@pytest.mark.parametrize("row", OWN)
def test_a_recipe_is_built_at_the_size_of_its_paper(
    row: str, models: dict[str, Path], published: Path, tmp_path: Path
) -> None:
    """Constructors take what the recipe says, data are read, the index is built as it says; nothing is trained."""
    recipe = composed(row, COLUMNS[row][0])
    kind, num_passages, rates, index = OWN[row]
    if index is not None:
        pytest.importorskip("faiss", reason="needs the extra faiss")
    if row.endswith("_bm25"):
        pytest.importorskip("bm25s", reason="needs the extra bm25")
    config = with_prepared(tiny(recipe, models, published, tmp_path))
    module, data = build_run(config)
    assert isinstance(module, RagLightningModule)
    assert isinstance(data, RagDataModule)
    trainer = build_trainer(config, config.callbacks)

    check_objective(module, recipe, kind)
    assert module.model.settings.num_passages == num_passages
    assert module.trained == tuple(part for part in ("query_encoder", "passage_encoder", "generator") if part in rates)
    assert {part: getattr(module.optim, f"lr_{part}") for part in rates} == rates
    groups = build_optimizer(module.model, module.optim).param_groups
    assert {group["lr"] for group in groups} == {*rates.values()}
    assert {group["weight_decay"] for group in groups} == {recipe.optim.weight_decay, 0.0}
    check_settings(module, data, trainer, recipe)
    check_reindexing(trainer, module, REFRESHED.get(row))
    data.setup("fit")
    assert data.questions["train"]
    data.ensure_index(step=0)
    check_index(data, row, index)


def check_objective(module: RagLightningModule, recipe: DictConfig, kind: str) -> None:
    objective = module.objective
    if kind == "contrastive":
        assert isinstance(objective, Contrastive)
        assert objective.num_negatives == recipe.objective.hard_negatives
    elif kind != "closed_book":
        assert isinstance(objective, MarginalObjective)
        assert objective.kind == kind
        assert [*objective.retriever_losses] == [*recipe.objective.get("retriever_losses", {})]
    if (smoothing := recipe.objective.get("label_smoothing")) is not None:
        assert objective.label_smoothing == smoothing
    if (examples := recipe.objective.get("examples")) is not None:
        assert objective.examples == examples


def check_settings(module: RagLightningModule, data: RagDataModule, trainer: L.Trainer, recipe: DictConfig) -> None:
    """Every setting of optimiser, model, prompt and decoding reaches what reads it."""
    plain: Any = OmegaConf.to_container(recipe.optim, resolve=True)
    plain.pop("_target_")
    assert {key: asdict(module.optim)[key] for key in plain} == plain
    model = module.model
    for name in ("temperature", "metric", "max_target_tokens", "null_passage", "hf_compat"):
        assert getattr(model.settings, name) == recipe.model[name]
    told: Any = OmegaConf.to_container(recipe.model.prompt)
    assert {key: getattr(model.prompt, key) for key in told} == told
    assert model.settings.decoding == (recipe.decoding.mode or default_mode(recipe.model.objective))
    for name in ("num_beams", "max_new_tokens"):
        assert getattr(model.decoding_options, name) == recipe.decoding[name]
    assert (model.encoder is None) == (recipe.model.num_passages == 0 or recipe.retriever.kind == "sparse")
    if model.encoder is not None:
        assert model.encoder.max_query_tokens == recipe.encoder.max_query_tokens
        assert model.encoder.max_passage_tokens == recipe.encoder.max_passage_tokens
        assert model.encoder.dimension == (recipe.encoder.get("projection_dim") or 16)
    assert data.retriever_settings.kind == recipe.retriever.kind
    assert (data.batch_size, data.eval_batch_size) == (recipe.data.batch_size, recipe.data.eval_batch_size)
    assert data.sample_answers == recipe.data.sample_answers
    assert trainer.max_steps == recipe.trainer.max_steps
    assert trainer.max_epochs == recipe.trainer.max_epochs
    assert trainer.gradient_clip_val == recipe.trainer.gradient_clip_val
    assert trainer.accumulate_grad_batches == recipe.trainer.accumulate_grad_batches


def default_mode(objective: str) -> str:
    return "rag_sequence_thorough" if objective == "rag_sequence" else objective


def check_reindexing(trainer: L.Trainer, module: RagLightningModule, period: int | None) -> None:
    (callback,) = (one for one in trainer.callbacks if isinstance(one, ReindexCallback))
    assert callback.schedule == ReindexSchedule.parse(period)
    if period is not None:
        assert callback.mode == "async", "training goes on meanwhile, as in the papers"
        assert "passage_encoder" in module.trained, "or each refresh would build the same index"


def check_index(data: RagDataModule, row: str, index: tuple[str, str, int | None] | None) -> None:
    if index is None:
        assert data.dense is None
        assert (data.bm25 is not None) == row.endswith("_bm25")
        return
    settings = data.index_settings
    assert (settings.factory, settings.storage, settings.ef_search) == index
    assert data.dense is not None
    manifest = data.dense.snapshot.manifest
    assert (manifest.factory, manifest.storage) == index[:2]


def test_the_tagging_recipe_is_built(models: dict[str, Path], published: Path, tmp_path: Path) -> None:
    recipe = composed("bert/conll2003_ner", None)
    config = tiny(recipe, models, published, tmp_path)
    config.task.data.allow_unknown = True  # of a vocabulary of films
    module, data = build_task_run(config)
    trainer = build_trainer(config, config.callbacks)
    assert (trainer.max_epochs, trainer.max_steps, data.batch_size) == (5, -1, 16)
    assert (module.optim.lr_reader, module.optim.lr_heads, module.optim.warmup_steps) == (2e-5, 2e-5, 0)
    assert module.model.reader.max_tokens == 128
    assert module.tasks["conll2003"].kind == "tagging"


def test_ms_marco_is_learned_from_its_published_form(
    models: dict[str, Path], published: Path, cli: Any, tmp_path: Path
) -> None:
    """Two steps at the paper's size, since nothing of MS-MARCO is small and at hand."""
    pytest.importorskip("faiss", reason="needs the extra faiss")
    row = "rag/table2_rag_sequence"
    values = replacements(composed(row, "msmarco"), models, published)
    short = "trainer.strategy=auto trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_test_batches=1"
    short += " trainer.limit_val_batches=1 data.batch_size=4 data.eval_batch_size=2 optim.warmup_steps=1"
    short += " tracking.plots=false decoding.max_new_tokens=8"
    told = [*(f"{key}={value}" for key, value in values.items()), *short.split()]
    cli("train", tmp_path / "run", f"experiment={row}", "dataset=msmarco", *told)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert {"rougeL", "bleu1", "distinct3"} <= set(metrics)
    lines = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {len(json.loads(line)["passages"]) for line in lines} == {10}
    saved = read_json(tmp_path / "run" / "model" / "rag_config.json")
    assert saved["settings"]["decoding"] == "rag_sequence_fast", "as the paper's appendix says of MS-MARCO"
