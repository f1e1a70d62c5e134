import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.retrieval.contexts import pad_sequences
from rag_lightning.types import TokenBatch
from rag_lightning.utils.lengths import (
    LengthGroup,
    length_groups,
    lengths_of,
    ordered_rows,
    real_lengths,
    restored,
    widened,
)


def cost(lengths, parts, overhead):
    return sum(len(part) * max(lengths[row] for row in part) + overhead for part in parts)


def cheapest(lengths, overhead, max_groups):
    """Every partition of the sorted rows into runs: the oracle."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    found = []
    for num_cuts in range(min(max_groups, len(order))):
        for cuts in itertools.combinations(range(1, len(order)), num_cuts):
            ends = [0, *cuts, len(order)]
            found.append(cost(lengths, [order[a:b] for a, b in itertools.pairwise(ends)], overhead))
    return min(found)


@pytest.mark.parametrize("overhead", [0, 3, 20])
@pytest.mark.parametrize("max_groups", [1, 2, 8])
def test_groups_cost_no_more_than_any_other_partition(overhead, max_groups):
    for seed in range(20):
        lengths = [random.Random(seed * 99 + place).randrange(1, 12) for place in range(7)]
        groups = length_groups(lengths, overhead_tokens=overhead, max_groups=max_groups)
        parts = [list(range(7)) if group.rows_M is None else group.rows_M.tolist() for group in groups]
        assert sorted(itertools.chain(*parts)) == list(range(7))
        assert [group.length for group in groups] == [max(lengths[row] for row in part) for part in parts]
        assert cost(lengths, parts, overhead) == cheapest(lengths, overhead, max_groups)


def test_equal_lengths_stay_together():
    assert length_groups([5, 5, 5], overhead_tokens=0) == [LengthGroup(None, 5)]


def test_many_rows_are_cut_at_a_few_places():
    lengths = [row % 100 + 1 for row in range(5000)]
    groups = length_groups(lengths, overhead_tokens=0)
    assert len(groups) == 8
    spent = sum(len(group.rows_M) * group.length for group in groups)
    assert spent < 1.15 * sum(lengths)


def test_results_come_back_in_the_order_of_the_batch():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    groups = length_groups(lengths, overhead_tokens=0)
    assert len(groups) > 2
    parts = [torch.tensor([lengths[row] for row in group.rows_M]) for group in groups]
    assert restored(parts, groups).tolist() == lengths
    assert sorted(ordered_rows(groups, 8, torch.device("cpu")).tolist()) == list(range(8))


def test_padding_before_a_row_counts_as_part_of_it():
    assert real_lengths(torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]])) == (2, 1, 1)


def test_lengths_are_taken_from_who_knows_them():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert lengths_of(TokenBatch(mask, mask)) == (2, 1)
    assert lengths_of(TokenBatch(mask, mask, lengths=(3, 3))) == (3, 3)
    assert lengths_of(TokenBatch(mask, mask, lengths=(3, 3)).to("cpu")) == (3, 3)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4))
def test_padded_texts_know_their_lengths(texts):
    tokens = pad_sequences(texts, pad_id=0)
    assert tokens.lengths == real_lengths(tokens.attention_mask)


def test_widening_adds_zeros():
    assert widened(torch.ones(1, 2, 1), 3)[0, :, 0].tolist() == [1.0, 1.0, 0.0]
