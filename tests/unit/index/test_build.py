import sys

import pytest
import torch

from rag_lightning.errors import ConfigError, MissingExtraError
from rag_lightning.index.build import build_index
from rag_lightning.index.exact import ExactIndex
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
