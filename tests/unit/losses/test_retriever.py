import math

import pytest
import torch

from rag_lightning.losses.retriever import false_negatives, in_batch_contrastive


def naive(scores, positive, ignored):
    weights = [math.exp(score) for column, score in enumerate(scores) if column == positive or not ignored[column]]
    return -math.log(math.exp(scores[positive]) / sum(weights))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_naive_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    positives = torch.randint(0, 6, (4,), generator=rng)
    ignored = torch.rand(4, 6, generator=rng) < 0.3
    ignored[0, positives[0]] = True  # marked as ignored, but the gold passage always counts
    for mask in (None, ignored):
        found = in_batch_contrastive(scores, positives, mask)
        rows = ignored.tolist() if mask is not None else [[False] * 6] * 4
        expected = [naive(*case) for case in zip(scores.tolist(), positives.tolist(), rows, strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_an_ignored_passage_gets_no_gradient():
    scores = torch.randn(2, 3, requires_grad=True)
    ignored = torch.tensor([[False, True, False], [False, False, False]])
    in_batch_contrastive(scores, torch.tensor([0, 1]), ignored).sum().backward()
    assert scores.grad[0, 1] == 0
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[1] != 0).all()


def test_half_precision_scores_are_compared_in_float32():
    loss = in_batch_contrastive(torch.tensor([[75.0, 75.5]], dtype=torch.bfloat16), torch.tensor([1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))


def test_a_single_passage_is_refused():
    with pytest.raises(ValueError, match="expected at least two passages to contrast, got 1: raise the batch size"):
        in_batch_contrastive(torch.zeros(1, 1), torch.tensor([0]))


@pytest.mark.parametrize("column", [-1, 3])
def test_a_gold_column_out_of_range_is_refused(column):
    with pytest.raises(ValueError, match=rf"expected gold columns within 0..2, got \[0, {column}\]"):
        in_batch_contrastive(torch.zeros(2, 3), torch.tensor([0, column]))


@pytest.mark.parametrize("seed", range(4))
def test_false_negatives_are_those_of_a_double_loop(seed):
    rng = torch.Generator().manual_seed(seed)
    gold = torch.randint(-1, 5, (3, 2), generator=rng)
    ids = torch.randint(-1, 5, (9,), generator=rng)
    counted = torch.rand(9, generator=rng) < 0.7
    for mask in (None, counted):
        expected = [
            [
                (number != -1 and number in row) or (mask is not None and not mask[place])
                for place, number in enumerate(ids.tolist())
            ]
            for row in gold.tolist()
        ]
        assert [[bool(one) for one in row] for row in expected] == false_negatives(gold, ids, mask).tolist()


def test_an_unknown_passage_is_a_negative_of_all():
    """-1 stands for an unknown gold passage and for an unknown passage; they are not the same one."""
    assert false_negatives(torch.tensor([[-1], [3]]), torch.tensor([-1, 3])).tolist() == [[False, False], [False, True]]
