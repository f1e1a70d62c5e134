"""One process: the vectors of the plain encoder, shards that outlive a failure, and what reaches the snapshot."""

import gc
import time
from statistics import median

import lightning as L
import numpy as np
import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.encode import BATCHES_PER_BLOCK, PassageTokens, encode_passages
from rag_lightning.training import encode_corpus as module
from rag_lightning.training.encode_corpus import BuildSettings, RowBlocks, corpus_shards, encode_corpus
from rag_lightning.types import Passage

NUM_PASSAGES = 150


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    torch.manual_seed(0)
    return tiny_encoder(dropout=0.5)


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    words = ["amber", "bridge", "copper", "dawn", "was", "made", "by", "ada", "ash", "in", "it"]
    texts = [" ".join(rng.choice(words, size=1 + (7 * number) % 50)) for number in range(NUM_PASSAGES)]
    return PassageCorpus.from_passages(
        [Passage(id=str(number), title=f"Film {number}", text=text) for number, text in enumerate(texts)]
    )


@pytest.fixture(scope="module")
def expected(encoder, corpus):
    tokens = PassageTokens(encoder=encoder, corpus=corpus)
    return torch.cat(list(encode_passages(encoder, tokens, range(len(corpus)), batch_size=1, progress=False)))


@pytest.fixture
def build(encoder, corpus, tmp_path):
    """Returns ``build(settings, **arguments)``: one batch is one passage, so a block is 32 and there are 5 shards."""

    def trainer(callbacks):
        return L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(tmp_path),
        )

    def run(settings=None, **arguments):
        return encode_corpus(
            make_trainer=trainer,
            encoder=arguments.pop("encoder", encoder),
            corpus=arguments.pop("corpus", corpus),
            output=tmp_path / "index",
            settings=settings or BuildSettings(),
            cache_dir=tmp_path / "cache",
            progress=False,
            **{"batch_size": 1, "shard_rows": 20, **arguments},
        )

    return run


def vectors_of(snapshot) -> torch.Tensor:
    return snapshot.vectors(torch.arange(snapshot.manifest.num_vectors))


@pytest.fixture
def encoded(monkeypatch):
    """The blocks that are encoded, as they are."""
    blocks = []
    plain = module.encode_block

    def watched(*arguments, **named):
        blocks.append(arguments[2])
        return plain(*arguments, **named)

    monkeypatch.setattr(module, "encode_block", watched)
    return blocks


@pytest.mark.parametrize("num_passages", [1, 31, 32, 33, 64, 1000])
@pytest.mark.parametrize("shard_rows", [1, 32, 33, 100, 5000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_shards_are_whole_blocks_and_make_up_the_corpus(num_passages, shard_rows, batch_size):
    shards = corpus_shards(num_passages, shard_rows=shard_rows, batch_size=batch_size)
    assert [row for rows in shards for row in rows] == list(range(num_passages))
    block = batch_size * BATCHES_PER_BLOCK
    assert all(rows.start % block == 0 for rows in shards)
    assert len({len(rows) for rows in shards[:-1]}) <= 1
    if len(shards) > 1:
        assert shard_rows <= len(shards[0]) < shard_rows + block


def test_a_process_goes_through_the_blocks_of_its_shards():
    loader = RowBlocks([(1, range(64, 128)), (4, range(256, 300))], batch_size=1)
    assert len(loader) == 4
    seen = [(block.shard, block.rows, block.last) for block in loader]
    assert seen == [
        (1, range(64, 96), False),
        (1, range(96, 128), True),
        (4, range(256, 288), False),
        (4, range(288, 300), True),
    ]


def test_vectors_are_those_of_the_plain_encoder_to_the_bit(build, expected, encoder, corpus, tmp_path):
    encoder.train()
    snapshot = build(step=7)
    assert encoder.passage.training, "left as it was"
    assert torch.equal(vectors_of(snapshot), expected)
    manifest = snapshot.manifest
    assert (manifest.encoder_hash, manifest.corpus_hash) == (encoder.passage_hash(), corpus.hash)
    assert (manifest.step, manifest.pooling, manifest.factory) == (7, "mean", "exact")
    assert [path.name for path in (tmp_path / "index").iterdir()] == [snapshot.id]


def test_how_the_corpus_is_cut_changes_nothing(build, expected):
    first = build(shard_rows=32)
    second = build(shard_rows=10_000)
    assert first.id == second.id
    assert torch.equal(vectors_of(second), expected)


def test_the_settings_reach_the_index(build, expected):
    faiss = pytest.importorskip("faiss")
    settings = BuildSettings(
        factory="IVF4,Flat", metric="l2", storage="int8", nprobe=2, num_training_vectors=140, seed=3
    )
    snapshot = build(settings, recall_queries=expected[:40], recall_at=5)
    manifest = snapshot.manifest
    assert (manifest.factory, manifest.metric, manifest.storage) == ("IVF4,Flat", "l2", "int8")
    assert 0 < manifest.recall["recall@5"] <= 1
    assert faiss.extract_index_ivf(snapshot.index._index).nprobe == 2
    worst = (vectors_of(snapshot) - expected).abs().max()
    assert 0 < worst <= expected.abs().max() / 127


def test_a_failed_build_goes_on_with_the_missing_shards(build, expected, encoded, monkeypatch, tmp_path):
    plain = SnapshotStore.write_shard

    def failing(self, path, rank, vectors):
        if rank == 3:
            raise RuntimeError("the power went")
        plain(self, path, rank, vectors)

    monkeypatch.setattr(SnapshotStore, "write_shard", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        build()
    gc.collect()  # the failed build's lock, which a process that ends gives back
    assert SnapshotStore(tmp_path / "index").ids() == []
    assert [block.start for block in encoded] == [0, 32, 64, 96]
    monkeypatch.setattr(SnapshotStore, "write_shard", plain)
    encoded.clear()
    snapshot = build()
    assert [block.start for block in encoded] == [96, 128], "shards 0, 1 and 2 were whole"
    assert torch.equal(vectors_of(snapshot), expected)
    assert [path.name for path in (tmp_path / "index").iterdir()] == [snapshot.id], "the building folder is gone"


def test_a_build_that_failed_behind_the_encoding_encodes_nothing_again(build, expected, encoded, monkeypatch):
    plain = SnapshotStore.finish

    def failing(self, *arguments, **named):
        raise RuntimeError("the power went")

    monkeypatch.setattr(SnapshotStore, "finish", failing)
    with pytest.raises(RuntimeError, match="the power went"):
        build()
    gc.collect()
    monkeypatch.setattr(SnapshotStore, "finish", plain)
    encoded.clear()
    assert torch.equal(vectors_of(build()), expected)
    assert encoded == []


@pytest.mark.parametrize("change", ["encoder", "storage", "step", "shards"])
def test_shards_of_something_else_are_not_used(change, build, encoded, monkeypatch, tiny_encoder):
    monkeypatch.setattr(SnapshotStore, "finish", lambda *_, **__: None)
    build()
    gc.collect()
    encoded.clear()
    torch.manual_seed(1)
    settings = BuildSettings(storage="float16" if change == "storage" else "float32")
    other = {"encoder": {"encoder": tiny_encoder()}, "step": {"step": 1}, "shards": {"shard_rows": 64}}
    build(settings, **other.get(change, {}))
    assert len(encoded) == 5


def test_bad_sizes_and_settings_are_refused(build, encoder):
    for sizes in ({"shard_rows": 0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="expected shard_rows and batch_size of at least 1, came"):
            build(**sizes)
    with pytest.raises(ConfigError, match="factory: expected 'exact' or a FAISS factory string"):
        build(BuildSettings(factory=" "))
    bare = BiEncoder(query=encoder.query, passage=encoder.passage, tokenizer=None)
    with pytest.raises(ConfigError, match="this encoder has no tokenizer"):
        build(encoder=bare)


@pytest.mark.slow
def test_throughput_is_that_of_the_bare_encoder(build, tiny_world, monkeypatch):
    """From token store to shard on disk, against the tower alone on the same padded batches in memory (MiniLM's size).

    Bare forwards and launched runs alternate, and the medians of three are compared. What starting a trainer takes is
    taken off: a run over one batch.
    """
    monkeypatch.setattr(SnapshotStore, "finish", lambda *_, **__: None)
    size = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    large = BiEncoder.from_config(
        model_type="bert", settings=size, tokenizer=str(tiny_world.tokenizer), shared=True, max_passage_tokens=128
    )
    large.eval()
    rng = np.random.default_rng(0)
    words = ["amber", "bridge", "copper", "dawn", "was", "made", "by", "ada", "ash", "in", "it"]

    def passages(count):
        texts = (" ".join(rng.choice(words, size=rng.integers(20, 120))) for _ in range(count))
        made = [Passage(id=str(number), title="", text=text) for number, text in enumerate(texts)]
        return PassageCorpus.from_passages(made)

    def launched(corpus, step):
        start = time.perf_counter()
        build(encoder=large, corpus=corpus, step=step, batch_size=32, shard_rows=50_000)
        return time.perf_counter() - start

    few, many = passages(1), passages(512)
    tokens = PassageTokens(encoder=large, corpus=many)
    rows = sorted(tokens.token_ids(np.arange(len(many))), key=len, reverse=True)
    batches = [tokens.padded(rows[first : first + 32]) for first in range(0, len(rows), 32)]

    @torch.no_grad()
    def bare():
        start = time.perf_counter()
        for batch in batches:
            large.passage_tower()(batch)
        return time.perf_counter() - start

    bare()
    launched(many, step=99)  # makes the token store
    times = [(bare(), launched(few, turn), launched(many, turn)) for turn in range(3)]
    forward, start_up, whole = (median(column) for column in zip(*times, strict=True))
    figures = {"bare": forward, "launched": whole, "start": start_up, "ratio": forward / (whole - start_up)}
    print(figures)
    assert figures["ratio"] >= 0.95, figures
