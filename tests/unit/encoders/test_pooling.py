import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.encoders.pooling import check_pooling, pool_cls, pool_mean, unit_length
from rag_lightning.errors import ConfigError

STATES = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [100.0, -100.0]], [[5.0, 6.0], [7.0, 8.0], [9.0, 1.0]]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_cls_is_the_first_state():
    assert pool_cls(STATES).tolist() == [[1.0, 2.0], [5.0, 6.0]]


def test_mean_is_over_the_real_tokens():
    assert pool_mean(STATES, MASK).tolist() == [[2.0, 3.0], [7.0, 5.0]]


def test_the_mean_of_no_token_is_zero():
    assert pool_mean(STATES, torch.tensor([[0, 0, 0], [0, 0, 1]])).tolist() == [[0.0, 0.0], [9.0, 1.0]]


def test_unit_length_leaves_zero_alone():
    assert unit_length(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0, 0],
    ]


@given(st.integers(0, 10_000), st.integers(0, 4))
def test_what_stands_in_the_padding_changes_nothing(seed, extra):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 3, 4, generator=rng)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    junk = torch.cat([states.masked_fill(mask[..., None] == 0, 1e6), torch.full((2, extra, 4), -1e6)], dim=1)
    longer = torch.nn.functional.pad(mask, (0, extra))
    torch.testing.assert_close(pool_mean(junk, longer), pool_mean(states, mask))
    assert torch.equal(pool_cls(junk), pool_cls(states))


def test_an_unknown_pooling_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="expected pooling to be one of cls, mean, dpr_pooler, got 'max'"):
        check_pooling("max")
