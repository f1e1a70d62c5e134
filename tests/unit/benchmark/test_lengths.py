"""Drawn lengths follow their quantiles; tables that are none are refused."""

import numpy as np
import pytest

from rag_lightning.benchmark.lengths import LengthTables, drawn_lengths
from rag_lightning.errors import ConfigError

ROW = [5, 10, 20]


def test_quantiles_are_kept():
    drawn = drawn_lengths([10, 20, 100], 20_000, shortest=1, longest=1000, rng=np.random.default_rng(0))
    np.testing.assert_allclose(np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]), [10, 15, 20, 60, 100], atol=1.5)


def test_limits():
    drawn = drawn_lengths([1, 100], 1000, shortest=30, longest=40, rng=np.random.default_rng(0))
    assert (drawn.min(), drawn.max()) == (30, 40)


@pytest.mark.parametrize("row", [[], [5], [5, 4], [0, 4]])
def test_refusals(row):
    with pytest.raises(ConfigError, match="token_lengths.answers: expected at least two quantiles"):
        LengthTables(passages=ROW, questions=ROW, answers=row)


def test_a_missing_table_is_refused():
    with pytest.raises(ConfigError, match="expected .*'passages'.*came \\['answers'\\]"):
        LengthTables.of({"answers": ROW})
