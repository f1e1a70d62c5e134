import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.first_step import FirstStep
from rag_lightning.decoding.prefixes import score_pairs
from tests.unit.decoding.table_generator import PAD, START, TableGenerator


def random_pairs(num_pairs, num_contexts, seed, max_tokens=4, vocab_size=6):
    """Outputs of several lengths, many of them alike at the beginning, and their contexts."""
    rng = torch.Generator().manual_seed(seed)
    sequences = torch.full((num_pairs, 1 + max_tokens), PAD)
    sequences[:, 0] = START
    words = torch.randint(2, vocab_size - 2, (num_pairs, max_tokens), generator=rng)
    written = torch.arange(max_tokens) < torch.randint(0, max_tokens + 1, (num_pairs, 1), generator=rng)
    sequences[:, 1:] = words.masked_fill(~written, PAD)
    return sequences, torch.randint(num_contexts, (num_pairs,), generator=rng)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_pairs=st.integers(1, 40), max_elements=st.sampled_from([1, 60, 2**28]))
def test_pairs_are_scored_as_a_loop_over_them_would(seed, num_pairs, max_elements):
    generator = TableGenerator.random(num_contexts=5, vocab_size=6, max_tokens=4, seed=seed)
    sequences, contexts = random_pairs(num_pairs, 5, seed)
    first = FirstStep.of(generator, generator.contexts)
    for num_unscored in (0, 1):
        found = score_pairs(first, sequences, contexts, num_unscored=num_unscored, max_elements=max_elements)
        for pair in range(num_pairs):
            tokens = tuple(token for token in sequences[pair, 1:].tolist() if token != PAD)
            expected = sum(generator.token_log_probs(int(contexts[pair]), tokens)[num_unscored:])
            assert float(found[pair]) == pytest.approx(expected)


def test_each_prefix_is_read_once_under_each_context():
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=3, seed=0)
    sequences = torch.tensor([[1, 3, 4, 2], [1, 3, 5, 2], [1, 3, 2, 0], [1, 3, 4, 2]])
    score_pairs(FirstStep.of(generator, generator.contexts), sequences, torch.tensor([2, 2, 2, 0]))
    # the start under all contexts, [3] under the two that are asked for, then [3 4], [3 5] and [3 4]
    assert generator.num_rows == [3, 2, 3]


def test_no_pairs_need_no_step():
    generator = TableGenerator.random(num_contexts=1, vocab_size=6, max_tokens=3, seed=0)
    first = FirstStep.of(generator, generator.contexts)
    assert score_pairs(first, torch.zeros(0, 3).long(), torch.zeros(0).long()).shape == (0,)
    assert generator.num_steps == 1, "that of the contexts"


def test_padding_within_an_output_is_read_and_not_scored():
    generator = TableGenerator.random(num_contexts=1, vocab_size=6, max_tokens=3, seed=0)
    found = score_pairs(FirstStep.of(generator, generator.contexts), torch.tensor([[1, 3, PAD, 4]]), torch.tensor([0]))
    first, after_pad = generator.table_CNV[0, 0, 3], generator.table_CNV[0, (3 + 1) * 6 + PAD + 1, 4]
    torch.testing.assert_close(found[0], first + after_pad)
