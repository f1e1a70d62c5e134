import numpy as np
import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.index import generated
from rag_lightning.index.generated import GeneratedVectors


def all_rows(vectors: GeneratedVectors, rows: range | None = None) -> torch.Tensor:
    return torch.cat(list(vectors.blocks(rows)))


@pytest.mark.parametrize("rows", [range(55), range(7, 8), range(9, 31), range(20, 40), range(50, 55)])
def test_a_row_is_the_same_in_whatever_part_it_is_asked_for(rows, monkeypatch):
    monkeypatch.setattr(generated, "BLOCK_ROWS", 10)
    vectors = GeneratedVectors(num_vectors=55, dimension=6, num_clusters=4, seed=1)
    whole = all_rows(vectors)
    assert whole.shape == (55, 6)
    assert torch.equal(all_rows(vectors, rows), whole[rows.start : rows.stop])
    assert max(len(block) for block in vectors.blocks()) == 10


def test_the_seed_decides_all_and_the_hash_tells_it():
    one, same = (GeneratedVectors(num_vectors=20, dimension=6, seed=1) for _ in range(2))
    other = GeneratedVectors(num_vectors=20, dimension=6, seed=2)
    assert torch.equal(all_rows(one), all_rows(same))
    assert one.hash == same.hash
    assert not torch.equal(all_rows(one), all_rows(other))
    assert len({one.hash, other.hash, GeneratedVectors(num_vectors=20, dimension=7, seed=1).hash}) == 3
    assert not np.isclose(one.queries(20) @ all_rows(one).T, 1, atol=1e-6).any(), "queries are none of the rows"


def test_rows_lie_in_clusters_on_the_unit_sphere():
    vectors = all_rows(GeneratedVectors(num_vectors=3000, dimension=96, num_clusters=10))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3000))
    similar = vectors @ vectors.T
    similar.fill_diagonal_(0)
    assert 0.05 < (similar > 0.5).float().mean() < 0.2, "about one in ten shares the cluster"
    spread = torch.linalg.svdvals(vectors - vectors.mean(0))
    assert spread[:64].square().sum() / spread.square().sum() > 0.95, "64 of 96 dimensions hold nearly all"
    assert spread[0] > 3 * spread[60], "and the first of them the most"


@pytest.mark.parametrize("text", ["generated:10", "generated:10x", "generated:ax4", "vectors.npy", "generated:1x2x3"])
def test_another_text_is_refused(text):
    with pytest.raises(ConfigError, match="expected generated:NUMBERxDIMENSION such as generated:1000000x384"):
        GeneratedVectors.parse(text)


def test_nothing_to_make_is_refused():
    with pytest.raises(ConfigError, match="expected at least 1 vector, dimension and cluster, came 0, 4"):
        GeneratedVectors.parse("generated:0x4")
