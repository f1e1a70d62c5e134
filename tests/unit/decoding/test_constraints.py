import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.constraints import constrain, repeated_ngrams
from rag_lightning.decoding.options import DecodingOptions

VOCAB, EOS = 5, 2


def banned_by_hand(prefix, size):
    """Tokens that would make the last n-gram equal to an earlier one."""
    earlier = {tuple(prefix[i : i + size]) for i in range(len(prefix) - size + 1)}
    return {v for v in range(VOCAB) if tuple([*prefix, v][-size:]) in earlier and len(prefix) + 1 >= size}


@settings(max_examples=60, deadline=None)
@given(
    prefixes=st.integers(1, 8).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length), min_size=1, max_size=3
        )
    ),
    size=st.integers(1, 4),
)
def test_repeated_ngrams_equal_a_set_of_ngrams(prefixes, size):
    banned = repeated_ngrams(torch.tensor(prefixes), size, VOCAB)
    for row, prefix in zip(banned, prefixes, strict=True):
        assert set(row.nonzero().flatten().tolist()) == banned_by_hand(prefix, size)


def test_the_end_token_waits_for_min_new_tokens():
    options = DecodingOptions(min_new_tokens=2, max_new_tokens=4)
    scores = torch.zeros(1, VOCAB)
    for num_tokens, held_back in [(0, True), (1, True), (2, False), (3, False)]:
        allowed = constrain(scores, torch.ones(1, 1 + num_tokens, dtype=torch.long), options, EOS)
        assert bool(allowed[0, EOS] == -torch.inf) is held_back
        assert allowed[0, [0, 1, 3, 4]].tolist() == [0.0] * 4


def test_forced_tokens_come_first_and_last_and_win_over_other_rules():
    options = DecodingOptions(
        forced_bos_token_id=0, forced_eos_token_id=EOS, max_new_tokens=3, min_new_tokens=3, no_repeat_ngram_size=1
    )
    scores = torch.full((2, VOCAB), -1.0)
    first = constrain(scores, torch.zeros(2, 1, dtype=torch.long), options, EOS)
    middle = constrain(scores, torch.zeros(2, 2, dtype=torch.long), options, EOS)
    last = constrain(scores, torch.full((2, 3), EOS), options, EOS)
    inf = torch.inf
    assert first.tolist() == [[0.0, -inf, -inf, -inf, -inf]] * 2
    assert middle.tolist() == [[-inf, -1.0, -inf, -1.0, -1.0]] * 2
    assert last.tolist() == [[-inf, -inf, 0.0, -inf, -inf]] * 2


def test_scores_given_are_not_changed():
    scores = torch.zeros(1, VOCAB)
    constrain(scores, torch.ones(1, 1, dtype=torch.long), DecodingOptions(min_new_tokens=1), EOS)
    assert scores.tolist() == [[0.0] * VOCAB]
