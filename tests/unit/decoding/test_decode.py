"""The n best answers, stop rules and modes, against enumeration."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.constraints import OutputRules
from rag_lightning.decoding.decode import decode
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts
from tests.unit.decoding.table_generator import EOS, TableGenerator, answer, random_prior

MODES = ["rag_token", "rag_sequence_fast", "rag_sequence_thorough"]
MAX_TOKENS = 4


def true_log_prob(generator, mode, contexts, prior, tokens):
    name = "rag_token_log_prob" if mode == "rag_token" else "rag_sequence_log_prob"
    return getattr(generator, name)(contexts, prior, tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_the_n_best_of_a_beam_that_covers_all_are_the_n_best_of_all(mode, seed):
    generator = TableGenerator.random(num_contexts=6, vocab_size=5, max_tokens=MAX_TOKENS, seed=seed)
    prior = random_prior(2, 3, seed)
    options = DecodingOptions(num_beams=40, num_return=7, max_new_tokens=MAX_TOKENS, length_penalty=0.0)
    decoded = decode(generator, generator.contexts, prior, options, mode=mode)
    for question in range(2):
        contexts = range(3 * question, 3 * question + 3)
        true = {y: true_log_prob(generator, mode, contexts, prior[question], y) for y in generator.outputs(MAX_TOKENS)}
        ranked = sorted(true, key=true.get, reverse=True)[:7]
        assert [answer(row) for row in decoded.nbest_BRT[question]] == ranked
        assert answer(decoded.sequences_BT[question]) == ranked[0]
        expected = [true[y] for y in ranked]
        assert decoded.nbest_log_likelihood_BR[question].tolist() == pytest.approx(expected)
        assert float(decoded.log_likelihood_B[question]) == pytest.approx(expected[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), num_beams=st.integers(1, 4))
def test_thorough_is_at_least_as_probable_as_fast_and_neither_beats_the_best_of_all(seed, num_beams):
    generator = TableGenerator.random(num_contexts=3, vocab_size=5, max_tokens=3, seed=seed, sharpness=1.0)
    prior = random_prior(1, 3, seed)
    options = DecodingOptions(num_beams=num_beams, num_return=num_beams, max_new_tokens=3)
    true = {}
    for mode in MODES[1:]:
        decoded = decode(generator, generator.contexts, prior, options, mode=mode)
        true[mode] = generator.rag_sequence_log_prob(range(3), prior[0], answer(decoded.sequences_BT[0]))
        likelihoods = decoded.log_likelihood_B if num_beams == 1 else decoded.nbest_log_likelihood_BR[0]
        assert likelihoods.tolist() == sorted(likelihoods.tolist(), reverse=True)
    best = max(generator.rag_sequence_log_prob(range(3), prior[0], y) for y in generator.outputs(3))
    assert true["rag_sequence_fast"] <= true["rag_sequence_thorough"] + 1e-9 <= best + 2e-9


@pytest.mark.parametrize("mode", MODES)
def test_fewer_answers_than_asked_for_leave_empty_places(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=4, max_tokens=2, seed=0)  # three outputs in all
    options = DecodingOptions(num_beams=5, num_return=5, max_new_tokens=2)
    decoded = decode(generator, generator.contexts, random_prior(1, 2, 0), options, mode=mode)
    assert decoded.nbest_BRT.shape == (1, 5, 3)
    assert [answer(row) for row in decoded.nbest_BRT[0, 3:]] == [(), ()]
    assert decoded.nbest_log_likelihood_BR[0].isneginf().tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("mode", MODES)
def test_only_the_best_comes_where_no_more_is_asked(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=5, max_tokens=2, seed=0)
    options = DecodingOptions(num_beams=3, max_new_tokens=2, stop=("x",))
    decoded = decode(generator, generator.contexts, random_prior(1, 2, 0), options, mode=mode)
    assert decoded.nbest_BRT is None
    assert decoded.nbest_log_likelihood_BR is None
    assert decoded.stop == ("x",)


def holds_four(written_NT):
    return (written_NT == 4).any(dim=1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_with_a_stop_rule_the_beam_is_exhaustive_over_the_shorter_outputs(mode, seed):
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=3, seed=seed)
    prior = random_prior(1, 3, seed)
    options = DecodingOptions(num_beams=60, num_return=10, max_new_tokens=3, length_penalty=0.0)
    rules = OutputRules(stops=holds_four)
    decoded = decode(generator, generator.contexts, prior, options, mode=mode, rules=rules)
    outputs = {y[: y.index(4) + 1] if 4 in y else y for y in generator.outputs(3)}
    true = {y: true_log_prob(generator, mode, range(3), prior[0], y) for y in outputs}
    ranked = sorted(true, key=true.get, reverse=True)[:10]
    assert any(y[-1] == 4 for y in ranked)
    assert any(y[-1] == EOS for y in ranked)
    assert [answer(row) for row in decoded.nbest_BRT[0]] == ranked
    assert decoded.nbest_log_likelihood_BR[0].tolist() == pytest.approx([true[y] for y in ranked])


def test_sampling_through_the_door_is_seeded_by_the_options():
    generator = TableGenerator.random(num_contexts=4, vocab_size=9, max_tokens=4, seed=3, sharpness=0.3)
    prior = random_prior(2, 2, 0)

    def drawn(mode, seed, rng=None):
        options = DecodingOptions(sample=True, seed=seed, num_return=4, max_new_tokens=4)
        return decode(generator, generator.contexts, prior, options, mode=mode, rng=rng).nbest_BRT.tolist()

    for mode in MODES:
        assert drawn(mode, 0) == drawn(mode, 0) == drawn(mode, 1, torch.Generator().manual_seed(0))
        assert drawn(mode, 0) != drawn(mode, 1)
    assert drawn("rag_sequence_fast", 0) == drawn("rag_sequence_thorough", 0) != drawn("rag_token", 0)


class OneContext(TableGenerator):
    """Reads the first of its fused contexts' numbers, so that the passages that reach it can be seen."""

    def start(self, encoded):
        assert encoded.hidden_NLH.shape[1] == 2
        first = (encoded.attention_mask_NL == 1).long().argmax(dim=1)
        hidden = encoded.hidden_NLH[torch.arange(len(first)), first][:, None]
        return super().start(EncodedContexts(hidden, encoded.attention_mask_NL[:, :1]))


@pytest.mark.parametrize("sampled", [False, True])
def test_fid_decodes_from_one_fused_context(sampled):
    generator = OneContext.random(num_contexts=4, vocab_size=6, max_tokens=3, seed=0)
    prior = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64).log()  # the second question's first is missing
    options = DecodingOptions(
        max_new_tokens=3, num_return=30, sample=sampled, num_beams=1 if sampled else 40, length_penalty=0.0
    )
    decoded = decode(generator, generator.contexts, prior, options, mode="fid")
    for question, context in [(0, 0), (1, 3)]:
        true = {y: sum(generator.token_log_probs(context, y)) for y in generator.outputs(3)}
        found = [answer(row) for row in decoded.nbest_BRT[question] if answer(row)]
        assert len(found) > 3
        assert decoded.nbest_log_likelihood_BR[question, : len(found)].tolist() == pytest.approx(
            [true[y] for y in found]
        )
        assert found == sorted(found, key=true.get, reverse=True)
        assert sampled or found[0] == max(true, key=true.get)


def test_an_unknown_mode_is_refused():
    generator = TableGenerator.random(num_contexts=1, vocab_size=5, max_tokens=2, seed=0)
    with pytest.raises(ConfigError, match="expected decoding rag_token, .*, fid, stuffed, got 'greedy'"):
        inspect.unwrap(decode)(generator, generator.contexts, torch.zeros(1, 1), DecodingOptions(), mode="greedy")
