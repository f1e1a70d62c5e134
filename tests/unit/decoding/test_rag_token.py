import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.errors import ConfigError
from rag_lightning.losses.marginal import rag_token_log_likelihood
from tests.unit.decoding.table_generator import EOS, TableGenerator, answer, random_prior


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_returns_the_likeliest_answer_of_all(seed):
    generator = TableGenerator.random(num_contexts=6, vocab_size=5, max_tokens=4, seed=seed)
    prior = random_prior(2, 3, seed)
    options = DecodingOptions(num_beams=40, max_new_tokens=4, length_penalty=0.0)
    decoded = decode_rag_token(generator, generator.contexts, prior, options)
    for question in range(2):
        contexts = range(3 * question, 3 * question + 3)
        best = max(
            generator.outputs(4),
            key=lambda tokens: generator.rag_token_log_prob(contexts, prior[question], tokens),
        )
        assert answer(decoded.sequences_BT[question]) == best
        assert float(decoded.log_likelihood_B[question]) == pytest.approx(
            generator.rag_token_log_prob(contexts, prior[question], best)
        )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), num_beams=st.sampled_from([1, 2, 4]))
def test_the_likelihood_is_the_loss_of_the_answer_as_a_target(seed, num_beams):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=seed)
    prior = random_prior(3, 2, seed)
    decoded = decode_rag_token(
        generator, generator.contexts, prior, DecodingOptions(num_beams=num_beams, max_new_tokens=4)
    )
    scored = generator.score(generator.contexts, decoded.sequences_BT, 2)
    expected = rag_token_log_likelihood(scored.token_log_probs_BKT, prior, scored.target_mask_BT)
    torch.testing.assert_close(decoded.log_likelihood_B, expected)


def test_the_order_of_passages_does_not_matter():
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=4, seed=1)
    prior = random_prior(1, 3, 1)
    order = torch.tensor([2, 0, 1])
    permuted = TableGenerator(generator.table_CNV[order], 4)
    options = DecodingOptions(num_beams=3, max_new_tokens=4)
    one = decode_rag_token(generator, generator.contexts, prior, options)
    other = decode_rag_token(permuted, permuted.contexts, prior[:, order], options)
    assert torch.equal(one.sequences_BT, other.sequences_BT)
    torch.testing.assert_close(one.log_likelihood_B, other.log_likelihood_B)


def test_a_missing_passage_changes_nothing():
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=4, seed=2)
    prior = random_prior(1, 2, 2)
    options = DecodingOptions(num_beams=3, max_new_tokens=4)
    pair = TableGenerator(generator.table_CNV[:2], 4)
    with_missing = torch.cat([prior, torch.full((1, 1), -torch.inf, dtype=torch.float64)], dim=1)
    one = decode_rag_token(pair, pair.contexts, prior, options)
    other = decode_rag_token(generator, generator.contexts, with_missing, options)
    assert torch.equal(one.sequences_BT, other.sequences_BT)
    torch.testing.assert_close(one.log_likelihood_B, other.log_likelihood_B)


def test_a_forced_first_token_is_not_scored_and_a_forced_last_one_is():
    generator = TableGenerator.random(num_contexts=2, vocab_size=6, max_tokens=3, seed=4)
    generator.table_CNV[:, :, EOS] = -9.0
    prior = random_prior(1, 2, 4)
    options = DecodingOptions(num_beams=2, max_new_tokens=3, forced_bos_token_id=5, forced_eos_token_id=EOS)
    decoded = decode_rag_token(generator, generator.contexts, prior, options)
    tokens = answer(decoded.sequences_BT[0])
    assert tokens[0] == 5
    assert tokens[2] == EOS
    whole = generator.rag_token_log_prob(range(2), prior[0], tokens)
    first = generator.rag_token_log_prob(range(2), prior[0], tokens[:1])
    assert float(decoded.log_likelihood_B[0]) == pytest.approx(whole - first)
    assert float(decoded.log_likelihood_B[0]) < -9.0


def test_raw_scores_are_refused():
    generator = TableGenerator.random(num_contexts=2, vocab_size=5, max_tokens=1, seed=0)
    with pytest.raises(ConfigError, match="doc_log_prior"):
        decode_rag_token(generator, generator.contexts, torch.tensor([[75.0, 74.0]]), DecodingOptions())
