import pytest

from rag_lightning.errors import ConfigError
from rag_lightning.index import calibrate as module
from rag_lightning.index.calibrate import BuildSpeed, calibrate
from rag_lightning.index.factory import index_size


@pytest.fixture
def small(monkeypatch):
    """Builds of hundreds of rows: what is measured then is only that something is."""
    monkeypatch.setattr(module, "_ROWS", 1500)
    monkeypatch.setattr(module, "_LISTS", (8, 24))
    monkeypatch.setattr(module, "_FIRST_GRAPH_ROWS", 250)


@pytest.mark.parametrize("factory", ["exact", "Flat", "HNSW8", "HNSW8_SQ8", "IVF16,Flat", "PQ4x4np", "IVF16,PQ4x4np"])
def test_more_vectors_take_longer(factory, small, tmp_path):
    if factory != "exact":
        pytest.importorskip("faiss")
    speed = calibrate(factory, 16, num_vectors=4000, folder=tmp_path / "index", storage="int8")
    assert list((tmp_path / "index").iterdir()) == [], "nothing is left there"
    seconds = [speed.build_s(rows, 16, factory) for rows in (10**4, 10**5, 10**6)]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert seconds[2] < 10_000
    assert speed.write_s > 0
    if factory != "exact":
        assert speed.add != (0.0, 0.0)


def test_seconds_of_a_graph_are_the_sum_over_its_vectors():
    speed = BuildSpeed(write_s=1e-5, byte_s=1e-9, add=(2e-5, 0.2))
    rows = 50_000
    adding = sum(2e-5 * n**0.2 for n in range(1, rows + 1))
    expected = 1e-5 * rows + 1e-9 * index_size("HNSW32", 64).bytes_for(rows) + adding
    assert speed.build_s(rows, 64, "HNSW32") == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("num_vectors", "doublings"), [(100, 2), (4_000, 2), (8_000, 3), (16_000, 4)])
def test_a_graph_is_grown_to_a_quarter_of_what_is_wanted(num_vectors, doublings, small, monkeypatch):
    pytest.importorskip("faiss")
    parts = []

    def cost(index, rows_MD):
        parts.append(len(rows_MD))
        return 1e-6 * (1.5 * len(rows_MD)) ** 0.3

    monkeypatch.setattr(module, "_seconds_a_row", cost)
    size = index_size("HNSW4", 8)
    _, (factor, exponent) = module._graph_speed("HNSW4", size, 8, "inner_product", num_vectors, 0)
    assert parts == [250 * 2**step for step in range(doublings)]
    assert exponent == pytest.approx(0.3)
    assert factor == pytest.approx(1e-6)


def test_growing_a_graph_ends_when_the_time_is_up(small, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(module, "_GRAPH_SECONDS", 0.0)
    parts = []
    monkeypatch.setattr(module, "_seconds_a_row", lambda index, rows_MD: parts.append(len(rows_MD)) or 1.0)
    module._graph_speed("HNSW4", index_size("HNSW4", 8), 8, "inner_product", 10**9, 0)
    assert parts == [250, 500]


def test_seconds_of_inverted_lists_are_training_and_adding():
    speed = BuildSpeed(write_s=0.0, byte_s=0.0, train=(1e-3, 1e-7), add=(1e-5, 1e-8))
    # 100,000 training rows: codes take 65,536 of them, 128 lists 256 each
    expected = 1e-3 * 65_536 + 1e-7 * (256 * 128) * 128 + 10**6 * (1e-5 + 1e-8 * 128)
    assert speed.build_s(10**6, 64, "IVF128,PQ8np", num_training_vectors=100_000) == pytest.approx(expected)
    fewer = 1e-3 * 5_000 + 1e-7 * 5_000 * 128 + 10**6 * (1e-5 + 1e-8 * 128)
    assert speed.build_s(10**6, 64, "IVF128,PQ8np", num_training_vectors=5_000) == pytest.approx(fewer)
    assert speed.build_s(10**6, 64, "exact") == 0


@pytest.mark.parametrize(("first", "second"), [(3.0, 0.5), (0.0, 2.0), (4.0, 0.0)])
def test_constants_are_found_again(first, second):
    terms = [(1.0, x) for x in (2.0, 5.0, 9.0)]
    assert module._solve(terms, [first + second * x for _, x in terms]) == pytest.approx((first, second), abs=1e-9)


def test_noise_never_makes_a_larger_build_take_less():
    terms = [(1.0, x) for x in (2.0, 5.0, 9.0)]
    a, b = module._solve(terms, [3.0, 2.0, 1.0])  # falling
    assert (a, b) == (pytest.approx(2.0), 0.0)
    a, b = module._solve(terms, [0.0, 4.0, 8.0])  # would start below zero
    assert a == 0
    assert b > 0.5
    assert module._solve([(1.0, 0.0)], [2.0]) == (2.0, 0.0)


def test_a_factory_that_cannot_be_planned_is_refused(small, tmp_path):
    with pytest.raises(ConfigError, match="expected parts whose size is known"):
        calibrate("NSG16,Flat", 16, num_vectors=10, folder=tmp_path)
