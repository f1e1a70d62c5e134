"""``rag-lightning index action=build|verify|info``: from a corpus and an encoder to a snapshot, and its checks."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console

from rag_lightning.cli.build import instantiate
from rag_lightning.cli.evaluate import load_checkpoint
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.snapshot import SnapshotStore, open_snapshot
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.text.token_store import open_or_build


def run(config: DictConfig) -> None:
    """Builds, verifies or describes a snapshot."""
    actions = {"build": _build, "verify": _verify, "info": _info}
    if config.action not in actions:
        raise ConfigError(f"index: expected action=build, verify or info, got {config.action!r}")
    actions[config.action](config)


def _encoder(config: DictConfig) -> BiEncoder:
    if config.checkpoint is not None:
        encoder = load_checkpoint(config.checkpoint)[0].encoder
    else:
        encoder = instantiate(config.encoder)
    if encoder is None:
        raise ConfigError(f"{config.checkpoint}: a closed-book model has no encoder to build an index with")
    assert isinstance(encoder, BiEncoder)
    return encoder


def _build(config: DictConfig) -> None:
    if config.passages is None:
        raise ConfigError("index action=build: expected passages=FILE, came none")
    encoder = _encoder(config).to(torch.device(config.device)).eval()
    corpus = PassageCorpus.read(config.passages)
    store = open_or_build(
        (encoder.passage_text(passage) for passage in corpus),
        encoder.tokenizer,
        cache_dir=Path(config.paths.cache_dir),
        corpus_hash=corpus.hash,
        template_key=encoder.passage_template,
        max_tokens=encoder.max_passage_tokens,
    )
    tokens = PassageTokens(encoder=encoder, corpus=corpus, store=store)
    snapshots = SnapshotStore(config.output, nprobe=config.index.nprobe, ef_search=config.index.ef_search)
    snapshot = snapshots.publish(
        encode_passages(encoder, tokens, range(len(corpus)), batch_size=config.batch_size),
        encoder_hash=encoder.passage_hash(),
        corpus_hash=corpus.hash,
        pooling=encoder.passage_tower().pooling,
        factory=config.index.factory,
        metric=config.metric,
    )
    Console().print(f"snapshot of {len(corpus)} passages: {snapshot.path}", markup=False, soft_wrap=True)


def _verify(config: DictConfig) -> None:
    if config.snapshot is None:
        raise ConfigError("index action=verify: expected snapshot=FOLDER, came none")
    corpus_hash = PassageCorpus.read(config.passages).hash if config.passages is not None else None
    encoder_hash = _encoder(config).passage_hash() if config.checkpoint is not None else None
    snapshot = open_snapshot(Path(config.snapshot), encoder_hash=encoder_hash, corpus_hash=corpus_hash)
    checked = ["checksums", *(["encoder"] if encoder_hash else []), *(["corpus"] if corpus_hash else [])]
    Console().print(f"{snapshot.id}: {', '.join(checked)} verified", markup=False, soft_wrap=True)


def _info(config: DictConfig) -> None:
    if config.snapshot is None:
        raise ConfigError("index action=info: expected snapshot=FOLDER, came none")
    snapshot = open_snapshot(Path(config.snapshot), verify=False)
    print(json.dumps(asdict(snapshot.manifest), indent=2))
