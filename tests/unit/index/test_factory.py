"""What a factory string is said to take, against the files that FAISS writes."""

import inspect

import numpy as np
import pytest

from rag_lightning.errors import ConfigError
from rag_lightning.index.factory import index_size
from rag_lightning.index.faiss import INDEX_FILE, FaissIndex

DIMENSION = 32
FACTORIES = (
    "Flat SQ8 SQ6 SQ4 SQfp16 SQbf16 PQ8np PQ8x4 PQ8x4fs IVF16,Flat IVF32,SQ8 IVF16,PQ8np IVF16,PQ8x4fs "
    "IVF64_HNSW8,SQ8 IVF64(HNSW8),Flat HNSW32 HNSW16,Flat HNSW16,SQ8 HNSW32_SQ8 HNSW16_PQ8np PCA16,SQ8 PCAR16,Flat "
    "PCAW16,IVF16,Flat RR16,SQ8 OPQ4_16,IVF16,PQ4x4np OPQ4,PQ4x4np L2norm,Flat IVF16,PQ8np,RFlat"
).split()


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_size_is_that_of_the_file(factory, tmp_path):
    pytest.importorskip("faiss")
    vectors = np.random.default_rng(0).standard_normal((4000, DIMENSION), dtype=np.float32)
    size = index_size(factory, DIMENSION)
    measured = {}
    for rows in (2000, 4000):
        FaissIndex.build(vectors[:rows], factory=factory).save(tmp_path)
        measured[rows] = (tmp_path / INDEX_FILE).stat().st_size
        assert size.bytes_for(rows) == pytest.approx(measured[rows], rel=0.03)
    per_vector = (measured[4000] - measured[2000]) / 2000
    assert size.bytes_per_vector == pytest.approx(per_vector, rel=0.01)


@pytest.mark.parametrize(
    ("factory", "trains", "num_lists", "graph_links"),
    [
        ("Flat", False, 0, 0),
        ("HNSW32", False, 0, 32),
        ("HNSW32_SQ8", True, 0, 32),
        ("IVF100,Flat", True, 100, 0),
        ("OPQ8, IVF100_HNSW16, PQ8", True, 100, 0),
        ("RR16,Flat", False, 0, 0),
        ("PCA16,Flat", True, 0, 0),
    ],
)
def test_what_building_depends_on_is_told(factory, trains, num_lists, graph_links):
    size = index_size(factory, DIMENSION)
    assert (size.trains, size.num_lists, size.graph_links) == (trains, num_lists, graph_links)


@pytest.mark.parametrize(
    ("factory", "part"), [("NSG32,Flat", "NSG32"), ("IVF16,Residual2x6", "Residual2x6"), ("IVF16", "IVF16"), ("", "")]
)
def test_a_part_that_is_not_known_is_refused(factory, part):
    with pytest.raises(ConfigError, match="expected parts whose size is known") as caught:
        inspect.unwrap(index_size)(factory, DIMENSION)
    assert f"came {part!r}" in str(caught.value)
    assert "limits.check=false" in str(caught.value)
