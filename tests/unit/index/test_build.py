import sys

import pytest
import torch

from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.index.build import build_index
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.factory import index_size
from rag_lightning.index.faiss import FaissIndex


def test_the_factory_string_chooses_the_class():
    pytest.importorskip("faiss")
    assert isinstance(build_index(torch.eye(3), factory="exact", metric="l2"), ExactIndex)
    index = build_index(torch.eye(3), factory="HNSW8", metric="l2", ef_search=32)
    assert isinstance(index, FaissIndex)
    assert (index.factory, index.metric) == ("HNSW8", "l2")


def test_exact_search_needs_no_faiss_and_others_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert build_index(torch.eye(3), factory="exact").search(torch.eye(3), 1)[1].flatten().tolist() == [0, 1, 2]
    with pytest.raises(MissingExtraError, match=r"pip install 'rag_lightning\[faiss\]'"):
        build_index(torch.eye(3), factory="Flat")


def test_a_setting_that_exact_search_does_not_have_is_not_ignored():
    with pytest.raises(ConfigError, match="nprobe: came 4, but factory 'exact' has no such setting"):
        build_index(torch.eye(3), factory="exact", nprobe=4)


def test_the_graph_of_the_rag_recipe_is_compressed_and_finds_its_vectors() -> None:
    """A graph of whole vectors takes 86 GB for 21 million passages; ``storage: int8`` is of those on disk alone."""
    pytest.importorskip("faiss", reason="needs the extra faiss")
    drawn_ND = torch.randn(1500, 64, generator=torch.Generator().manual_seed(0))
    vectors_ND = torch.nn.functional.normalize(drawn_ND, dim=-1)
    index = build_index(vectors_ND, factory="HNSW128,SQ8", ef_search=128)
    exact = build_index(vectors_ND)
    found, wanted = (one.search(vectors_ND[:100], 5)[1] for one in (index, exact))
    assert torch.equal(found[:, 0], torch.arange(100))
    shared = [len(set(row) & set(true)) for row, true in zip(found.tolist(), wanted.tolist(), strict=True)]
    assert sum(shared) >= 0.9 * 500
    sizes = {factory: index_size(factory, 768).bytes_for(21_015_324) / 1e9 for factory in ("HNSW128", "HNSW128,SQ8")}
    assert sizes == {"HNSW128": pytest.approx(86, abs=0.5), "HNSW128,SQ8": pytest.approx(38, abs=0.5)}
