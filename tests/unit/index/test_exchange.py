"""Messages are put together and taken apart in one process; what travels is the matter of the ddp tier."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import MISSING_ID, best_first
from rag_lightning.index.exact import ExactIndex
from rag_lightning.index.exchange import pack_replies, raise_together, unpack_replies
from rag_lightning.utils.distributed import shard


def delivered(outgoing, counts, widths, to):
    """What process ``to`` receives, found by walking the messages: 1 + 2 x questions x candidates numbers each."""
    parts = []
    for message, width in zip(outgoing, widths, strict=True):
        start = sum(1 + 2 * count * width for count in counts[:to])
        parts.append(message[start : start + 1 + 2 * counts[to] * width])
    return torch.cat(parts)


@given(data=st.data(), counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), num_vectors=st.integers(1, 20))
def test_what_each_process_unpacks_and_merges_is_one_index(data, counts, num_vectors):
    num_passages = data.draw(st.integers(1, num_vectors))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    # small integers: exact in float32, and full of ties
    vectors_ND = torch.randint(-2, 3, (num_vectors, 3), generator=draw).float()
    questions_QD = torch.randint(-2, 3, (sum(counts), 3), generator=draw).float()
    parts = [shard(num_vectors, rank, len(counts)) for rank in range(len(counts))]
    widths = [min(num_passages, len(rows)) for rows in parts]
    outgoing = []
    for rows, width in zip(parts, widths, strict=True):
        found = (torch.empty(len(questions_QD), 0), torch.empty(len(questions_QD), 0, dtype=torch.int64))
        if width > 0:
            found = ExactIndex(vectors_ND[rows.start : rows.stop]).search(questions_QD, width)
        outgoing.append(pack_replies(*found, counts))
    for rank, own_BD in enumerate(questions_QD.split(counts)):
        incoming = delivered(outgoing, counts, widths, rank)
        # a score and a row of 4 bytes each for a candidate, and 4 bytes for each shard
        assert incoming.nbytes == 8 * counts[rank] * sum(widths) + 4 * len(counts)
        scores_BM, ids_BM, failed = unpack_replies(incoming, counts[rank], widths, [rows.start for rows in parts])
        assert not failed
        for query, scores, ids in zip(
            own_BD.tolist(), *(t.tolist() for t in best_first(scores_BM, ids_BM, num_passages)), strict=True
        ):
            products = [sum(a * b for a, b in zip(query, row, strict=True)) for row in vectors_ND.tolist()]
            expected = sorted(range(num_vectors), key=lambda row, products=products: (-products[row], row))
            assert ids == expected[:num_passages]
            assert scores == [products[row] for row in ids]


def test_scores_keep_every_bit_and_missing_rows_stay_missing():
    scores_QK = torch.tensor([[1e-42, -0.0, -torch.inf], [3.0, 2.0, 1.0]])  # a subnormal, a negative zero
    rows_QK = torch.tensor([[2**31 - 1, 0, MISSING_ID], [5, 4, MISSING_ID]])
    message = pack_replies(scores_QK, rows_QK, [1, 1])
    assert message.dtype == torch.int32
    scores_BM, ids_BM, _ = unpack_replies(message[:7], 1, [3], [2**40])
    assert torch.equal(scores_BM.view(torch.int32), scores_QK[:1].view(torch.int32))
    assert ids_BM.tolist() == [[2**40 + 2**31 - 1, 2**40, -1]]
    assert unpack_replies(message[7:], 1, [3], [10])[1].tolist() == [[15, 14, -1]]


def test_a_failure_reaches_every_process_even_one_that_asks_nothing():
    counts, widths = [0, 2], [1, 1]
    good = pack_replies(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), counts)
    bad = pack_replies(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64), counts, failed=True)
    for rank, count in enumerate(counts):
        for outgoing, expected in (([good, bad], True), ([bad, good], True), ([good, good], False)):
            incoming = delivered(outgoing, counts, widths, rank)
            scores_BM, ids_BM, failed = unpack_replies(incoming, count, widths, [0, 1])
            assert failed is expected
            assert scores_BM.shape == ids_BM.shape == (count, 2)


def test_raising_together_is_silent_without_an_error_and_tells_the_kind_of_another_s(monkeypatch):
    raise_together(None)
    own = DataError("own words")
    with pytest.raises(DataError) as caught:
        raise_together(own)
    assert caught.value is own
    others = [None, None, "ConfigError: theirs: as they are", "DataError: later"]
    monkeypatch.setattr("rag_lightning.utils.distributed.gather_objects", lambda value: others)
    with pytest.raises(ConfigError, match="process 2 failed, and with it all others: ConfigError: theirs: as they are"):
        raise_together(None)
