from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, StaleIndexError
from rag_lightning.index.bm25 import Bm25Index, Bm25Settings
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.retrieval.build import (
    RetrieverSettings,
    build_fusion,
    build_retriever,
    open_bm25,
    open_cross_encoder,
)
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.fusion import ConvexFusion, GatedFusion, ReciprocalRankFusion
from rag_lightning.retrieval.hybrid import HybridRetriever
from rag_lightning.retrieval.rerank import CrossEncoderReranker, LiveReranker
from rag_lightning.retrieval.sparse import SparseRetriever
from rag_lightning.types import Passage

CONF = Path(__file__).parents[3] / "conf" / "retriever"


@pytest.fixture(scope="module")
def corpus():
    return PassageCorpus.from_passages([Passage(f"p{n}", "", f"amber {n}") for n in range(4)])


@pytest.fixture
def dense(tmp_path, corpus):
    snapshot = SnapshotStore(tmp_path).publish(torch.eye(4), encoder_hash="e", corpus_hash=corpus.hash, pooling="mean")
    return DenseRetriever(snapshot, corpus)


@pytest.fixture(scope="module")
def bm25(corpus):
    pytest.importorskip("bm25s")
    return Bm25Index.build(corpus)


class Judge:
    def score(self, questions, passages, *, batch_size=32):
        return torch.zeros(len(questions))


def reencode(ids_BL):
    return torch.eye(4)[ids_BL]


def hybrid(**settings):
    return RetrieverSettings(kind="hybrid", **settings)


def test_each_kind_is_put_together_from_its_parts(dense, bm25, corpus):
    assert build_retriever(RetrieverSettings(), corpus=corpus, dense=dense) is dense
    sparse = build_retriever(RetrieverSettings(kind="sparse"), corpus=corpus, bm25=bm25)
    assert isinstance(sparse, SparseRetriever)
    assert sparse.index is bm25
    settings = hybrid(fusion="convex", fusion_weight=0.3, num_candidates=7)
    fusion = build_fusion(settings, dimension=4)
    found = build_retriever(settings, corpus=corpus, dense=dense, bm25=bm25, fusion=fusion)
    assert isinstance(found, HybridRetriever)
    assert (found.dense, found.fusion, found.num_candidates) == (dense, fusion, 7)
    live = build_retriever(
        RetrieverSettings(rerank="live", rerank_candidates=3), corpus=corpus, dense=dense, reencode=reencode
    )
    assert isinstance(live, LiveReranker)
    assert (live.retriever, live.reencode, live.num_candidates) == (dense, reencode, 3)


@pytest.mark.parametrize("kind", ["dense", "sparse", "hybrid"])
def test_a_cross_encoder_stands_over_any_kind(dense, bm25, corpus, kind):
    settings = RetrieverSettings(
        kind=kind,
        fusion="rrf" if kind == "hybrid" else None,
        rerank="cross_encoder",
        cross_encoder="a/model",
        rerank_candidates=3,
        cross_encoder_batch_size=2,
    )
    judge = Judge()
    found = build_retriever(
        settings,
        corpus=corpus,
        dense=dense,
        bm25=bm25,
        fusion=build_fusion(settings, dimension=4),
        cross_encoder=judge,
    )
    assert isinstance(found, CrossEncoderReranker)
    assert (found.cross_encoder, found.num_candidates, found.batch_size) == (judge, 3, 2)
    expected = {"dense": DenseRetriever, "sparse": SparseRetriever, "hybrid": HybridRetriever}
    assert isinstance(found.retriever, expected[kind])


def test_fusions_are_built_with_their_settings():
    assert build_fusion(RetrieverSettings(), dimension=4) is None
    assert build_fusion(hybrid(fusion="rrf", rrf_k=9), dimension=4).k == 9
    convex = build_fusion(hybrid(fusion="convex", fusion_weight=0.2, normalisation="z_score"), dimension=4)
    assert isinstance(convex, ConvexFusion)
    assert (convex.weight, convex.normalisation) == (0.2, "z_score")
    gate = build_fusion(hybrid(fusion="gate", gate_hidden=3, dense_floor=-1.0), dimension=4)
    assert isinstance(gate, GatedFusion)
    assert (gate.dimension, gate.hidden, gate.dense_floor) == (4, 3, -1.0)


def test_only_what_is_needed_is_opened(corpus, tmp_path):
    pytest.importorskip("bm25s")
    assert open_bm25(RetrieverSettings(), corpus, cache_dir=tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    settings = RetrieverSettings(kind="sparse", bm25_k1=1.2, bm25_b=0.7, bm25_stop_words="none")
    index = open_bm25(settings, corpus, cache_dir=tmp_path)
    assert index.settings == Bm25Settings(k1=1.2, b=0.7, stop_words="none") == settings.bm25
    assert open_cross_encoder(settings) is None
    needs = {kind: (RetrieverSettings(kind=kind).needs_vectors, RetrieverSettings(kind=kind).needs_words)
             for kind in ("dense", "sparse")}  # fmt: skip
    assert needs == {"dense": (True, False), "sparse": (False, True)}
    assert (hybrid(fusion="rrf").needs_vectors, hybrid(fusion="rrf").needs_words) == (True, True)


@pytest.mark.parametrize(
    ("settings", "missing", "what"),
    [
        ({}, "dense", "an index of vectors for kind=dense"),
        ({"kind": "sparse"}, "bm25", "a BM25 index for kind=sparse"),
        ({"kind": "hybrid", "fusion": "rrf"}, "dense", "an index of vectors for kind=hybrid"),
        ({"kind": "hybrid", "fusion": "rrf"}, "bm25", "a BM25 index for kind=hybrid"),
        ({"kind": "hybrid", "fusion": "rrf"}, "fusion", "the model's fusion for kind=hybrid"),
        ({"rerank": "live"}, "reencode", "a passage encoder for kind=dense, rerank=live"),
        ({"rerank": "cross_encoder", "cross_encoder": "x"}, "cross_encoder", "a cross-encoder for kind=dense"),
    ],
)
def test_a_missing_part_is_named(dense, bm25, corpus, settings, missing, what):
    parts = {
        "dense": dense,
        "bm25": bm25,
        "fusion": ReciprocalRankFusion(),
        "reencode": reencode,
        "cross_encoder": Judge(),
    }
    parts[missing] = None
    with pytest.raises(ConfigError, match=f"retriever: expected {what}.*, came none. Open or build it first"):
        build_retriever(RetrieverSettings(**settings), corpus=corpus, **parts)


def test_parts_made_with_other_settings_are_refused(dense, bm25, corpus):
    with pytest.raises(ConfigError, match=r"expected a BM25 index with Bm25Settings\(k1=2.0.*came one with .*k1=0.9"):
        build_retriever(RetrieverSettings(kind="sparse", bm25_k1=2.0), corpus=corpus, bm25=bm25)
    other = PassageCorpus.from_passages([Passage("x", "", "other")])
    with pytest.raises(StaleIndexError, match="expected one of corpus"):
        build_retriever(RetrieverSettings(kind="sparse"), corpus=other, bm25=bm25)
    settings = hybrid(fusion="convex", fusion_weight=0.3)
    for fusion in (ConvexFusion(weight=0.4), ReciprocalRankFusion()):
        with pytest.raises(ConfigError, match=r"expected the fusion .*'weight': 0.3.* came the model's .*'kind'"):
            build_retriever(settings, corpus=corpus, dense=dense, bm25=bm25, fusion=fusion)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hybrid"}, "retriever.fusion: expected one of rrf, convex, gate for kind=hybrid, came none"),
        ({"rerank": "cross_encoder"}, "retriever.cross_encoder: expected a folder or hub id"),
        ({"kind": "sparse", "rerank": "live"}, "live re-scores similarities, expected kind=dense, came sparse"),
        (
            {"kind": "hybrid", "fusion": "rrf", "num_candidates": 0},
            "retriever.num_candidates: expected at least 1, came 0",
        ),
        ({"rerank": "live", "rerank_candidates": 0}, "retriever.rerank_candidates: expected at least 1, came 0"),
        ({"kind": "sparse", "bm25_b": 2.0}, "bm25 b: expected a number from 0 to 1, came 2.0"),
        ({"kind": "hybrid", "fusion": "convex", "fusion_weight": 2.0}, "expected a weight from 0 .* came 2.0"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RetrieverSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"fusion": "rrf"},
        {"num_candidates": 7},
        {"kind": "hybrid", "fusion": "convex", "rrf_k": 7},
        {"kind": "hybrid", "fusion": "gate", "fusion_weight": 0.7},
        {"kind": "hybrid", "fusion": "rrf", "normalisation": "z_score"},
        {"kind": "hybrid", "fusion": "rrf", "dense_floor": -1.0},
        {"kind": "hybrid", "fusion": "convex", "gate_hidden": 7},
        {"bm25_k1": 1.2},
        {"bm25_b": 0.7},
        {"bm25_stop_words": "none"},
        {"rerank_candidates": 7},
        {"rerank": "live", "cross_encoder": "x"},
        {"rerank": "live", "cross_encoder_max_tokens": 7},
        {"cross_encoder_batch_size": 7},
    ],
)
def test_a_setting_that_nothing_reads_is_refused(settings):
    name = list(settings)[-1]
    with pytest.raises(ConfigError, match=rf"retriever.{name}: came .*, which nothing reads with kind="):
        RetrieverSettings(**settings)


@pytest.mark.parametrize("name", ["kind", "fusion", "rerank", "normalisation"])
def test_an_unknown_choice_is_refused(name):
    settings = hybrid(fusion="convex")
    object.__setattr__(settings, name, "other")  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match=rf"{name}: expected one of \w+, \w+, .*came 'other'"):
        settings.__post_init__()


FILES = "dense sparse hybrid_rrf hybrid_convex hybrid_gate rerank_live rerank_cross_encoder".split()


def test_every_file_of_the_group_is_a_setting_that_differs():
    found = {}
    for path in CONF.glob("*.yaml"):
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert record.pop("_target_") == "rag_lightning.retrieval.build.RetrieverSettings"
        found[path.stem] = RetrieverSettings(**record)
    assert sorted(found) == sorted(FILES)
    assert len(set(found.values())) == len(FILES)
    assert found["dense"] == RetrieverSettings()
    assert replace(found["sparse"], kind="dense") == RetrieverSettings()  # the files repeat the defaults
