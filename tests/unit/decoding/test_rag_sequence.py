import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.beam import beam_search
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.prefixes import score_pairs
from rag_lightning.decoding.rag_sequence import candidate_table, decode_rag_sequence
from rag_lightning.losses.marginal import rag_sequence_log_likelihood
from tests.unit.decoding.table_generator import EOS, TableGenerator, answer, random_prior


@pytest.fixture
def scored_pairs(monkeypatch):
    """The (context, tokens) pairs that thorough decoding scores beyond those of the beams."""
    pairs = []

    def spy(first, sequences_PT, contexts_P, **settings):
        for sequence, context in zip(sequences_PT, contexts_P.tolist(), strict=True):
            pairs.append((context, answer(sequence)))
        return score_pairs(first, sequences_PT, contexts_P, **settings)

    monkeypatch.setattr("rag_lightning.decoding.rag_sequence.score_pairs", spy)
    return pairs


def both(generator, prior, options, **settings):
    return [
        decode_rag_sequence(generator, generator.contexts, prior, options, thorough=thorough, **settings)
        for thorough in (True, False)
    ]


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_returns_the_likeliest_answer_of_all(seed, thorough, scored_pairs):
    # every passage proposes every output, so that fast decoding has no holes either
    generator = TableGenerator.random(num_contexts=6, vocab_size=5, max_tokens=4, seed=seed)
    prior = random_prior(2, 3, seed)
    options = DecodingOptions(num_beams=40, max_new_tokens=4)
    decoded = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=thorough)
    for question in range(2):
        contexts = range(3 * question, 3 * question + 3)
        best = max(
            generator.outputs(4),
            key=lambda tokens: generator.rag_sequence_log_prob(contexts, prior[question], tokens),
        )
        assert answer(decoded.sequences_BT[question]) == best
        assert float(decoded.log_likelihood_B[question]) == pytest.approx(
            generator.rag_sequence_log_prob(contexts, prior[question], best)
        )
    assert scored_pairs == [], "nothing is left to score"


def expected_answers(generator, prior, options, question, num_passages):
    """Thorough and fast decoding of one question by dictionaries and plain numbers."""
    proposals = {}
    contexts = range(question * num_passages, (question + 1) * num_passages)
    for k, context in enumerate(contexts):
        one = TableGenerator(generator.table_CNV[context : context + 1], generator.max_tokens)
        found = beam_search(one, one.contexts, torch.zeros(1, 1), options)
        for row in found.sequences_SRT[0]:
            proposals.setdefault(answer(row), set()).add(k)
    thorough = {y: generator.rag_sequence_log_prob(contexts, prior[question], y) for y in proposals}
    fast = {
        y: torch.logsumexp(
            torch.stack([prior[question, k] + sum(generator.token_log_probs(contexts[k], y)) for k in sorted(ks)]), 0
        ).item()
        for y, ks in proposals.items()
    }
    return thorough, fast


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), num_beams=st.sampled_from([1, 2, 3]))
def test_both_ways_equal_a_loop_over_questions(seed, num_beams):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=seed, sharpness=1.0)
    prior = random_prior(2, 3, seed)
    options = DecodingOptions(num_beams=num_beams, max_new_tokens=4)
    thorough, fast = both(generator, prior, options)
    for question in range(2):
        true, approximate = expected_answers(generator, prior, options, question, 3)
        best_thorough, best_fast = max(true, key=true.get), max(approximate, key=approximate.get)
        assert answer(thorough.sequences_BT[question]) == best_thorough
        assert answer(fast.sequences_BT[question]) == best_fast
        assert float(thorough.log_likelihood_B[question]) == pytest.approx(true[best_thorough])
        assert float(fast.log_likelihood_B[question]) == pytest.approx(approximate[best_fast])
        assert true[best_thorough] >= true[best_fast] >= approximate[best_fast] - 1e-9


def test_thorough_and_fast_can_disagree():
    disagreements = 0
    for seed in range(30):
        generator = TableGenerator.random(num_contexts=4, vocab_size=6, max_tokens=3, seed=seed, sharpness=0.7)
        thorough, fast = both(generator, random_prior(1, 4, seed), DecodingOptions(max_new_tokens=3))
        disagreements += answer(thorough.sequences_BT[0]) != answer(fast.sequences_BT[0])
    assert disagreements > 0


def test_thorough_scores_only_what_no_beam_has_scored(scored_pairs):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=7)
    prior = random_prior(2, 3, 7)
    options = DecodingOptions(num_beams=2, max_new_tokens=4)
    found = beam_search(generator, generator.contexts, torch.zeros(6, 1), options)
    known = {(search, answer(row)) for search in range(6) for row in found.sequences_SRT[search]}
    fast = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=False)
    assert scored_pairs == []
    decode_rag_sequence(generator, generator.contexts, prior, options, thorough=True)
    pairs = set(scored_pairs)
    assert len(scored_pairs) == len(pairs) > 0
    assert pairs.isdisjoint(known)
    proposed = {(search // 3, y) for search, y in known}
    assert pairs | known == {(3 * question + k, y) for question, y in proposed for k in range(3)}
    assert bool((fast.log_likelihood_B < 0).all())


def test_scoring_in_small_chunks_changes_nothing():
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=7)
    prior = random_prior(2, 3, 7)
    options = DecodingOptions(num_beams=2, max_new_tokens=4)
    decode_rag_sequence(generator, generator.contexts, prior, options, thorough=False)
    num_search_steps = generator.num_steps
    whole = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=True)
    assert max(generator.num_rows[2 * num_search_steps :]) > 2
    generator.num_rows.clear()
    chunked = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=True, max_scored_elements=12)
    assert max(generator.num_rows[num_search_steps:]) == 2
    assert torch.equal(whole.sequences_BT, chunked.sequences_BT)
    torch.testing.assert_close(whole.log_likelihood_B, chunked.log_likelihood_B)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_likelihood_is_the_loss_of_the_answer_as_a_target(seed):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=seed)
    prior = random_prior(3, 2, seed)
    options = DecodingOptions(num_beams=2, max_new_tokens=4)
    decoded = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=True)
    scored = generator.score(generator.contexts, decoded.sequences_BT, 2)
    expected = rag_sequence_log_likelihood(scored.token_log_probs_BKT, prior, scored.target_mask_BT)
    torch.testing.assert_close(decoded.log_likelihood_B, expected)


@pytest.mark.parametrize("thorough", [True, False])
def test_one_passage_is_plain_beam_search_without_its_length_penalty(thorough):
    generator = TableGenerator.random(num_contexts=2, vocab_size=6, max_tokens=4, seed=3)
    options = DecodingOptions(num_beams=3, max_new_tokens=4)
    found = beam_search(generator, generator.contexts, torch.zeros(2, 1), options)
    decoded = decode_rag_sequence(generator, generator.contexts, torch.zeros(2, 1), options, thorough=thorough)
    for question in range(2):
        best = int(found.log_probs_SR[question].argmax())
        assert answer(decoded.sequences_BT[question]) == answer(found.sequences_SRT[question, best])


@pytest.mark.parametrize("thorough", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_a_missing_passage_proposes_nothing_and_counts_nothing(seed, thorough, scored_pairs):
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=4, seed=seed, sharpness=0.7)
    prior = random_prior(1, 2, seed)
    pair = TableGenerator(generator.table_CNV[:2], 4)
    with_missing = torch.cat([prior, torch.full((1, 1), -torch.inf, dtype=torch.float64)], dim=1)
    options = DecodingOptions(num_beams=1, max_new_tokens=4)
    one = decode_rag_sequence(pair, pair.contexts, prior, options, thorough=thorough)
    pairs_of_two = set(scored_pairs)
    scored_pairs.clear()
    other = decode_rag_sequence(generator, generator.contexts, with_missing, options, thorough=thorough)
    assert torch.equal(one.sequences_BT, other.sequences_BT)
    torch.testing.assert_close(one.log_likelihood_B, other.log_likelihood_B)
    assert set(scored_pairs) == pairs_of_two


@pytest.mark.parametrize("thorough", [True, False])
def test_a_forced_first_token_is_not_scored(thorough):
    generator = TableGenerator.random(num_contexts=2, vocab_size=6, max_tokens=3, seed=4)
    prior = random_prior(1, 2, 4)
    options = DecodingOptions(num_beams=30, max_new_tokens=3, forced_bos_token_id=5)
    decoded = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=thorough)
    tokens = answer(decoded.sequences_BT[0])
    assert tokens[0] == 5
    parts = torch.tensor([sum(generator.token_log_probs(k, tokens)[1:]) for k in range(2)], dtype=torch.float64)
    torch.testing.assert_close(decoded.log_likelihood_B, torch.logsumexp(prior[0] + parts, 0)[None])


def test_thorough_leaves_the_forced_first_token_out_of_the_pairs_it_scores(scored_pairs):
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=3, seed=0)
    prior = random_prior(1, 3, 0)
    options = DecodingOptions(max_new_tokens=3, forced_bos_token_id=5)
    decoded = decode_rag_sequence(generator, generator.contexts, prior, options, thorough=True)
    tokens = answer(decoded.sequences_BT[0])
    assert tokens in [scored for _, scored in scored_pairs]
    parts = torch.tensor([sum(generator.token_log_probs(k, tokens)[1:]) for k in range(3)], dtype=torch.float64)
    torch.testing.assert_close(decoded.log_likelihood_B, torch.logsumexp(prior[0] + parts, 0)[None])


@pytest.mark.parametrize("thorough", [True, False])
def test_a_question_for_which_nothing_is_allowed_does_not_disturb_the_others(thorough):
    generator = TableGenerator.random(num_contexts=4, vocab_size=5, max_tokens=3, seed=0)
    generator.table_CNV[2:] = -torch.inf
    prior = random_prior(2, 2, 0)
    decoded = decode_rag_sequence(
        generator, generator.contexts, prior, DecodingOptions(max_new_tokens=3), thorough=thorough
    )
    assert answer(decoded.sequences_BT[0]) != ()
    assert answer(decoded.sequences_BT[1]) == ()
    assert decoded.log_likelihood_B.isneginf().tolist() == [False, True]


def test_candidates_are_distinct_and_of_their_own_question():
    generator = TableGenerator.random(num_contexts=4, vocab_size=4, max_tokens=2, seed=0)
    prior = random_prior(2, 2, 0)
    found = beam_search(
        generator, generator.contexts, torch.zeros(4, 1), DecodingOptions(num_beams=3, max_new_tokens=2)
    )
    sequences, questions, table = candidate_table(found, prior)
    keys = [(int(q), answer(row)) for q, row in zip(questions, sequences, strict=True)]
    assert sorted(keys) == sorted((q, y) for q in range(2) for y in [(EOS,), (3, EOS), (3, 3)])
    for (question, tokens), row in zip(keys, table, strict=True):
        for passage in range(2):
            assert float(row[passage]) == pytest.approx(sum(generator.token_log_probs(2 * question + passage, tokens)))
