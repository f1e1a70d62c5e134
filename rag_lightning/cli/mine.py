"""``rag-lightning mine passages=P questions=Q output=F``: a question file with hard negatives."""

from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console

from rag_lightning.cli.build import instantiate, load_checkpoint
from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.corpora.questions import read_questions
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index import bm25
from rag_lightning.index.base import Index, Metric
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.snapshot import open_snapshot
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.hard_negatives import (
    MinedQuestion,
    Search,
    dense_search,
    mine_hard_negatives,
    write_mined,
)
from rag_lightning.text.token_store import open_or_build
from rag_lightning.utils.io import read_json_lines


def run(config: DictConfig) -> None:
    """Mines as configured and tells how many questions got fewer negatives than asked for."""
    output = Path(config.output)
    if not output.name.removesuffix(".gz").endswith(".jsonl"):
        raise ConfigError(f"output: expected a file ending in .jsonl or .jsonl.gz, got {output}")
    miners = {"sparse": _sparse, "dense": _dense}
    if config.miner not in miners:
        raise ConfigError(f"miner: expected sparse or dense, got {config.miner!r}")
    corpus = PassageCorpus.read(config.passages)
    questions = read_questions(config.questions, corpus=corpus)
    records = [record for _, record in read_json_lines(resolve(config.questions))]
    mined = mine_hard_negatives(
        questions,
        miners[config.miner](config, corpus),
        corpus,
        num_negatives=config.num_negatives,
        depth=config.depth,
        skip_top=config.skip_top,
        batch_size=config.batch_size,
        progress=True,
    )
    write_mined(output, records, mined)
    Console().print(f"{_summary(mined, config.num_negatives)}: {output}", markup=False, soft_wrap=True)


def _summary(mined: list[MinedQuestion], num_negatives: int) -> str:
    found = [len(one.scores) for one in mined]
    fewer = sum(count < num_negatives for count in found)
    return (
        f"{sum(found)} hard negatives for {len(found)} questions, {fewer} of them with fewer than {num_negatives} "
        f"({found.count(0)} with none)"
    )


def _sparse(config: DictConfig, corpus: PassageCorpus) -> Search:
    for setting in ("checkpoint", "snapshot"):
        if config[setting] is not None:
            raise ConfigError(f"{setting}: miner=sparse matches words and uses no encoder; set miner=dense or leave it")
    search: Search = bm25.open_or_build(corpus, cache_dir=Path(config.paths.cache_dir)).search
    return search


def _dense(config: DictConfig, corpus: PassageCorpus) -> Search:
    encoder, metric = _encoder_and_metric(config)
    device = torch.device(config.device)
    encoder.to(device).eval()
    if config.snapshot is None:
        return dense_search(encoder, _encoded(encoder, metric or "inner_product", config, corpus))
    place = Path(config.snapshot)
    snapshot = open_snapshot(place, encoder_hash=encoder.index_hash(), corpus_hash=corpus.hash, metric=metric)
    return dense_search(encoder, snapshot.index)


def _encoder_and_metric(config: DictConfig) -> tuple[BiEncoder, Metric | None]:
    """Returns the encoder, and what it ranks by where that is known: by the model's metric, or the one asked for."""
    if config.checkpoint is None:
        encoder = instantiate(config.encoder)
        assert isinstance(encoder, BiEncoder)
        return encoder, config.metric
    model, _ = load_checkpoint(config.checkpoint)
    if model.encoder is None:
        raise ConfigError(f"{config.checkpoint}: a closed-book model has no encoder to mine with")
    if config.metric not in (None, model.settings.metric):
        raise ConfigError(
            f"metric: expected {model.settings.metric}, by which the model of {config.checkpoint} was trained, came "
            f"{config.metric}. Leave metric out."
        )
    return model.encoder, model.settings.metric


def _encoded(encoder: BiEncoder, metric: Metric, config: DictConfig, corpus: PassageCorpus) -> Index:
    store = open_or_build(
        (encoder.passage_text(passage) for passage in corpus),
        encoder.tokenizer,
        cache_dir=Path(config.paths.cache_dir),
        corpus_hash=corpus.hash,
        template_key=encoder.passage_template,
        max_tokens=encoder.max_passage_tokens,
    )
    tokens = PassageTokens(encoder=encoder, corpus=corpus, store=store)
    vectors_ND, filled = torch.empty(len(corpus), encoder.dimension), 0
    for block_MD in encode_passages(encoder, tokens, range(len(corpus)), batch_size=config.batch_size):
        vectors_ND[filled : filled + len(block_MD)] = block_MD
        filled += len(block_MD)
    return ExactIndex(vectors_ND, metric=metric, device=config.device)
