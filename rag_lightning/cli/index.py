"""``rag-lightning index plan|build|verify|info|benchmark``: from corpus and encoder to a snapshot, and its checks."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from rag_lightning.cli import index_benchmark
from rag_lightning.cli.build import instantiate, load_checkpoint
from rag_lightning.cli.plan import check_plan, figures_of, plan_of, show_plan, timed
from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.corpora.questions import read_questions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.base import as_metric
from rag_lightning.index.generated import GeneratedVectors
from rag_lightning.index.manifest import Snapshot, open_snapshot
from rag_lightning.index.plan import gigabytes
from rag_lightning.index.quality import measure_quality, noisy_rows, recall_of_originals
from rag_lightning.index.vectors import DTYPES
from rag_lightning.retrieval.encode import PassageTokens, encode_questions, encoding_seconds
from rag_lightning.training.encode_corpus import BuildSettings, encode_corpus
from rag_lightning.utils.io import write_json
from rag_lightning.utils.memory import peak_memory

_GENERATED_ROWS = 100_000
"""How many are made to see how long all will take."""


def run(config: DictConfig) -> None:
    """Plans, builds, verifies or describes a snapshot."""
    actions: dict[str, Callable[[DictConfig], None]] = {
        "plan": _plan,
        "build": _build,
        "verify": _verify,
        "info": _info,
        "benchmark": index_benchmark.run,
    }
    if config.action not in actions:
        raise ConfigError(f"index: expected action={', '.join(actions)}; got {config.action!r}")
    L.seed_everything(config.seed, verbose=False)
    actions[config.action](config)


# ---------------------------------------------------------------------- plan


def _plan(config: DictConfig) -> None:
    settings = _settings(config)
    encoder, encode_s = None, None
    if config.vectors is not None:
        vectors = GeneratedVectors.parse(config.vectors, seed=config.seed)
        num_vectors, dimension = vectors.num_vectors, vectors.dimension
        encode_s = _generating_seconds(vectors)
    elif config.passages is not None:
        encoder = _encoder(config).to(torch.device(config.device)).eval()
        corpus = PassageCorpus.read(config.passages)
        num_vectors, dimension = len(corpus), encoder.dimension
        tokens = PassageTokens(encoder=encoder, corpus=corpus)
        encode_s = encoding_seconds(encoder, tokens, batch_size=config.batch_size, seed=config.seed)
    elif config.num_vectors is not None and config.dimension is not None:
        num_vectors, dimension = config.num_vectors, config.dimension
    else:
        raise ConfigError("index action=plan: expected passages=FILE, or num_vectors=N dimension=D; came neither")
    plan = plan_of(config, settings, num_vectors, dimension, encoder)
    plan = timed(plan, settings, Path(config.output), encode_s)
    show_plan(plan, config, encoder)
    _write_figures(config, figures_of(plan))
    if config.limits.check:
        check_plan(config, plan)


def _generating_seconds(vectors: GeneratedVectors) -> float:
    """Seconds to make generated vectors, as others are encoded."""
    rows = range(min(_GENERATED_ROWS, vectors.num_vectors))
    next(vectors.blocks(rows))  # the first block finds everything cold
    start = time.perf_counter()
    for _ in vectors.blocks(rows):
        pass
    return (time.perf_counter() - start) * vectors.num_vectors / len(rows)


# ---------------------------------------------------------------------- build


def _build(config: DictConfig) -> None:
    start = time.perf_counter()
    snapshot = _build_generated(config) if config.vectors is not None else _build_from_passages(config)
    if snapshot is None:  # another process of the group has it
        return
    manifest = snapshot.manifest
    seconds, memory, disk = time.perf_counter() - start, peak_memory(), sum(manifest.num_bytes.values())
    figures = {"snapshot": str(snapshot.path), "seconds": seconds, "peak_memory_bytes": memory, "disk_bytes": disk}
    _write_figures(config, figures | manifest.recall)
    measured = "".join(f", {name} {value:.3f}" for name, value in manifest.recall.items())
    _say(f"snapshot of {manifest.num_vectors} passages: {snapshot.path}")
    _say(
        f"{manifest.factory}, {manifest.storage}: {seconds:.1f} s, {gigabytes(disk)} on disk, "
        f"at most {gigabytes(memory)} of memory{measured}"
    )


def _build_from_passages(config: DictConfig) -> Snapshot | None:
    if config.passages is None:
        raise ConfigError("index action=build: expected passages=FILE, came none")
    settings = _settings(config)
    encoder = _encoder(config).eval()
    corpus = PassageCorpus.read(config.passages)
    if config.limits.check:
        check_plan(config, plan_of(config, settings, len(corpus), encoder.dimension, encoder))
    measures = settings.factory != "exact" and config.questions is not None
    return encode_corpus(
        make_trainer=lambda callbacks: _trainer(config, callbacks),
        encoder=encoder,
        corpus=corpus,
        output=Path(config.output),
        settings=settings,
        cache_dir=Path(config.paths.cache_dir),
        batch_size=config.batch_size,
        shard_rows=config.shard_rows,
        step=config.step,
        recall_queries=_question_vectors(config, encoder) if measures else None,
        recall_at=min(config.recall_at, len(corpus)),
        progress=config.trainer.enable_progress_bar,
    )


def _build_generated(config: DictConfig) -> Snapshot:
    vectors = GeneratedVectors.parse(config.vectors, seed=config.seed)
    settings = _settings(config)
    if config.limits.check:
        check_plan(config, plan_of(config, settings, vectors.num_vectors, vectors.dimension))
    return settings.store(config.output).publish(
        vectors.blocks(),
        encoder_hash=vectors.hash,
        corpus_hash=vectors.hash,
        pooling="none",
        factory=settings.factory,
        metric=settings.metric,
        step=config.step,
    )


def _trainer(config: DictConfig, callbacks: list[L.Callback]) -> L.Trainer:
    shown = [RichProgressBar()] if config.trainer.enable_progress_bar else []
    fixed = {"logger": False, "enable_checkpointing": False, "use_distributed_sampler": False}
    trainer: L.Trainer = instantiate(config.trainer, callbacks=[*callbacks, *shown], **fixed)
    return trainer


# ---------------------------------------------------------------------- verify, info


def _verify(config: DictConfig) -> None:
    if config.snapshot is None:
        raise ConfigError("index action=verify: expected snapshot=FOLDER, came none")
    corpus_hash = PassageCorpus.read(config.passages).hash if config.passages is not None else None
    encoder = _encoder(config) if config.checkpoint is not None or config.questions is not None else None
    encoder_hash = encoder.index_hash() if encoder is not None else None
    snapshot = open_snapshot(Path(config.snapshot), encoder_hash=encoder_hash, corpus_hash=corpus_hash)
    checked = ["checksums", *(["encoder"] if encoder_hash else []), *(["corpus"] if corpus_hash else [])]
    _say(f"{snapshot.id}: {', '.join(checked)} verified")
    queries_PD, of_what = _queries(config, snapshot, encoder)
    num_passages = min(config.recall_at, snapshot.manifest.num_vectors)
    quality = measure_quality(snapshot.index, snapshot.vectors_ND, queries_PD, num_passages=num_passages)
    figures = {**asdict(quality), "queries_per_s": quality.queries_per_s, "peak_memory_bytes": peak_memory()}
    of_originals = ""
    if config.vectors is not None:
        blocks = GeneratedVectors.parse(config.vectors, seed=config.seed).blocks()
        recall = recall_of_originals(snapshot.index, blocks, queries_PD, num_passages=num_passages)
        figures["recall_of_originals"] = recall
        of_originals = f" ({recall:.4f} against the vectors before they were stored)"
    _write_figures(config, figures)
    _say(
        f"recall@{num_passages} against exact search: {quality.recall:.4f} on {quality.num_queries} {of_what}"
        f"{of_originals}; {quality.ms_per_batch:.1f} ms for {quality.batch_size} queries "
        f"(exact: {quality.exact_ms_per_batch:.1f} ms)"
    )


def _queries(config: DictConfig, snapshot: Snapshot, encoder: BiEncoder | None) -> tuple[Float[Tensor, "P D"], str]:
    """Returns what to search for, and what it is."""
    if config.questions is not None:
        assert encoder is not None
        return _question_vectors(config, encoder), "questions"
    if config.vectors is not None:
        vectors = GeneratedVectors.parse(config.vectors, seed=config.seed)
        return vectors.queries(config.sample), "further draws of the generated mixture"
    flattering = "sampled passages moved by a tenth of their length, which flatters (give questions=FILE for real ones)"
    return noisy_rows(snapshot.vectors_ND, config.sample, seed=config.seed), flattering


def _info(config: DictConfig) -> None:
    if config.snapshot is None:
        raise ConfigError("index action=info: expected snapshot=FOLDER, came none")
    snapshot = open_snapshot(Path(config.snapshot), verify=False)
    print(json.dumps(asdict(snapshot.manifest), indent=2))


# ---------------------------------------------------------------------- what several of them need


def _encoder(config: DictConfig) -> BiEncoder:
    if config.checkpoint is not None:
        encoder = load_checkpoint(config.checkpoint)[0].encoder
    else:
        encoder = instantiate(config.encoder)
    if encoder is None:
        raise ConfigError(f"{config.checkpoint}: a closed-book model has no encoder to build an index with")
    assert isinstance(encoder, BiEncoder)
    return encoder


def _settings(config: DictConfig) -> BuildSettings:
    if config.index.storage not in DTYPES:
        raise ConfigError(f"storage: expected one of {', '.join(DTYPES)}; came {config.index.storage!r}.")
    return BuildSettings(
        factory=config.index.factory,
        metric=as_metric(config.metric),
        storage=config.index.storage,
        num_training_vectors=config.index.num_training_vectors,
        nprobe=config.index.nprobe,
        ef_search=config.index.ef_search,
        seed=config.seed,
    )


def _question_vectors(config: DictConfig, encoder: BiEncoder) -> Float[Tensor, "P D"]:
    questions = read_questions(resolve(config.questions))[: config.sample]
    encoder = encoder.to(torch.device(config.device))
    return encode_questions(encoder, [question.question for question in questions], batch_size=config.batch_size)


def _write_figures(config: DictConfig, figures: dict[str, Any]) -> None:
    if config.figures is not None:
        write_json(Path(config.figures), figures)


def _say(text: str) -> None:
    Console(highlight=False).print(text, markup=False, soft_wrap=True)
