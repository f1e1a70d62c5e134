"""Sampling against exhaustive enumeration, and truncation against transformers' warpers."""

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rag_lightning.decoding.constraints import OutputRules
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.decoding.sampling import decoded_samples, draw, sample, truncated
from rag_lightning.errors import ConfigError
from rag_lightning.losses.marginal import rag_sequence_log_likelihood, rag_token_log_likelihood
from tests.unit.decoding.table_generator import EOS, PAD, START, TableGenerator, answer, random_prior

MAX_TOKENS = 3
NUM_SAMPLES = 6000
MODES = ["rag_token", "rag_sequence"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cut_by_hand(probs, temperature, top_k, top_p):
    """Temperature, top-k and nucleus of one distribution (a dictionary) by plain numbers."""
    powers = {token: p ** (1 / temperature) for token, p in probs.items() if p > 0}
    kept = {token: p / sum(powers.values()) for token, p in powers.items()}
    if top_k > 0:
        least = sorted(kept.values(), reverse=True)[:top_k][-1]
        kept = {token: p for token, p in kept.items() if p >= least}
        kept = {token: p / sum(kept.values()) for token, p in kept.items()}
    nucleus = {}
    for token in sorted(kept, key=kept.get, reverse=True):
        if sum(nucleus.values()) >= top_p:
            break
        nucleus[token] = kept[token]
    return {token: p / sum(nucleus.values()) for token, p in nucleus.items()}


def enumerated(generator, contexts, prior, mode, temperature=1.0, top_k=0, top_p=1.0, max_tokens=MAX_TOKENS):
    """The probability of drawing each output, by loops over the tree of outputs."""

    def walk(of_prefix, prefix=(), probability=1.0):
        if len(prefix) == max_tokens or EOS in prefix:
            yield prefix, probability
            return
        for token, p in cut_by_hand(of_prefix(prefix), temperature, top_k, top_p).items():
            yield from walk(of_prefix, (*prefix, token), probability * p)

    def of_passage(context, prefix):
        number = 0
        for token in prefix:
            number = number * generator.vocab_size + token + 1
        return {token: math.exp(p) for token, p in enumerate(generator.table_CNV[context, number].tolist())}

    weights = [math.exp(float(p)) for p in prior]
    if mode == "rag_token":

        def mixed(prefix):
            rows = [of_passage(context, prefix) for context in contexts]
            return {
                token: sum(w * row[token] for w, row in zip(weights, rows, strict=True))
                for token in range(generator.vocab_size)
            }

        return dict(walk(mixed))
    total = {}
    for weight, context in zip(weights, contexts, strict=True):
        for tokens, probability in walk(lambda prefix, context=context: of_passage(context, prefix)):
            total[tokens] = total.get(tokens, 0.0) + weight * probability
    return total


def chi_square_p_value(counts, probabilities):
    """Pearson's test, cells expected to hold fewer than 5 joined; the tail by Wilson and Hilferty's approximation."""
    total = sum(counts.values())
    assert set(counts) <= {tokens for tokens, p in probabilities.items() if p > 0}, "an impossible output was drawn"
    cells, rest = [], [0.0, 0.0]
    for tokens, probability in probabilities.items():
        expected, seen = total * probability, counts.get(tokens, 0)
        if expected < 5:
            rest = [rest[0] + expected, rest[1] + seen]
        else:
            cells.append((expected, seen))
    if rest[0] >= 5:
        cells.append(tuple(rest))
    degrees = len(cells) - 1
    assert degrees >= 2
    statistic = sum((seen - expected) ** 2 / expected for expected, seen in cells)
    normal = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(normal / math.sqrt(2))


def counted(sequences_ST):
    counts = {}
    for row in sequences_ST:
        counts[answer(row)] = counts.get(answer(row), 0) + 1
    return counts


TRUNCATIONS = [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 2}, {"top_p": 0.7}, {"top_k": 2, "top_p": 0.6}]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_answers_come_as_often_as_enumeration_says(mode, truncation):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=MAX_TOKENS, seed=1, sharpness=1.0)
    prior = random_prior(2, 3, 1)
    options = DecodingOptions(sample=True, max_new_tokens=MAX_TOKENS, **truncation)
    drawn = sample(generator, generator.contexts, prior, options, mode=mode, num_samples=NUM_SAMPLES, rng=rng())
    for question in range(2):
        contexts = range(3 * question, 3 * question + 3)
        expected = enumerated(generator, contexts, prior[question], mode, **truncation)
        assert sum(expected.values()) == pytest.approx(1.0)
        counts = counted(drawn.sequences_BST[question])
        assert chi_square_p_value(counts, expected) > 1e-3
        for row in range(50):
            tokens = answer(drawn.sequences_BST[question, row])
            true = getattr(generator, f"{mode}_log_prob")(contexts, prior[question], tokens)
            assert float(drawn.log_likelihood_BS[question, row]) == pytest.approx(true)
            assert float(drawn.sampled_log_prob_BS[question, row]) == pytest.approx(math.log(expected[tokens]))


def test_the_chi_square_test_can_fail():
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=MAX_TOKENS, seed=1, sharpness=1.0)
    prior = random_prior(1, 3, 1)
    options = DecodingOptions(sample=True, max_new_tokens=MAX_TOKENS)
    drawn = sample(
        generator, generator.contexts, prior, options, mode="rag_sequence", num_samples=NUM_SAMPLES, rng=rng()
    )
    wrong = enumerated(generator, range(3), prior[0], "rag_token")
    assert chi_square_p_value(counted(drawn.sequences_BST[0]), wrong) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_likelihoods_are_the_losses_of_the_answers_as_targets(mode):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=4, seed=3)
    prior = random_prior(2, 3, 3)
    drawn = sample(
        generator,
        generator.contexts,
        prior,
        DecodingOptions(sample=True, max_new_tokens=4, top_k=2),
        mode=mode,
        num_samples=5,
        rng=rng(),
    )
    loss = rag_token_log_likelihood if mode == "rag_token" else rag_sequence_log_likelihood
    for number in range(5):
        scored = generator.score(generator.contexts, drawn.sequences_BST[:, number], 3)
        expected_B = loss(scored.token_log_probs_BKT, prior, scored.target_mask_BT)
        torch.testing.assert_close(drawn.log_likelihood_BS[:, number], expected_B)


@pytest.mark.parametrize("mode", [*MODES, "fid"])
def test_one_passage_is_the_same_in_every_mode(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=6, max_tokens=4, seed=3)
    arguments = (generator, generator.contexts, torch.zeros(2, 1), DecodingOptions(sample=True, max_new_tokens=4))
    first, second = (sample(*arguments, mode=m, num_samples=20, rng=rng(7)) for m in (mode, "rag_token"))
    assert torch.equal(first.sequences_BST, second.sequences_BST)
    torch.testing.assert_close(first.log_likelihood_BS, second.log_likelihood_BS)
    torch.testing.assert_close(first.sampled_log_prob_BS, first.log_likelihood_BS)


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_passage_is_never_drawn(mode):
    generator = TableGenerator.random(num_contexts=3, vocab_size=6, max_tokens=3, seed=0)
    generator.table_CNV[2, :, :] = -torch.inf
    generator.table_CNV[2, :, 5] = 0.0  # it would write 5 5 5
    generator.table_CNV[:2, :, 5] = -torch.inf
    prior = torch.cat([random_prior(1, 2, 0), torch.full((1, 1), -torch.inf, dtype=torch.float64)], dim=1)
    options = DecodingOptions(sample=True, max_new_tokens=3)
    drawn = sample(generator, generator.contexts, prior, options, mode=mode, num_samples=200, rng=rng())
    assert 5 not in drawn.sequences_BST
    assert drawn.log_likelihood_BS.isfinite().all()


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}], ids=str)
def test_where_only_the_likeliest_token_is_left_sampling_is_greedy_search(cut):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=5, seed=9)
    prior = random_prior(2, 3, 9)
    greedy = decode_rag_token(generator, generator.contexts, prior, DecodingOptions(max_new_tokens=5))
    options = DecodingOptions(sample=True, max_new_tokens=5, **cut)
    drawn = sample(generator, generator.contexts, prior, options, mode="rag_token", num_samples=2, rng=rng())
    for number in range(2):
        assert [answer(row) for row in drawn.sequences_BST[:, number]] == [answer(row) for row in greedy.sequences_BT]
        torch.testing.assert_close(drawn.log_likelihood_BS[:, number], greedy.log_likelihood_B)
    torch.testing.assert_close(drawn.sampled_log_prob_BS, torch.zeros_like(drawn.sampled_log_prob_BS))


def test_the_seed_decides_and_questions_and_samples_differ():
    generator = TableGenerator.random(num_contexts=4, vocab_size=9, max_tokens=4, seed=3, sharpness=0.3)
    prior = random_prior(2, 2, 0)
    options = DecodingOptions(sample=True, max_new_tokens=4)
    draws = [
        sample(generator, generator.contexts, prior, options, mode="rag_token", num_samples=8, rng=rng(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].sequences_BST, draws[1].sequences_BST)
    assert not torch.equal(draws[0].sequences_BST, draws[2].sequences_BST)
    assert len(counted(draws[0].sequences_BST.flatten(0, 1))) > 8


@pytest.mark.parametrize("mode", MODES)
def test_the_rules_of_the_search_hold_for_samples(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=7, max_tokens=5, seed=5, sharpness=0.5)
    options = DecodingOptions(
        sample=True, max_new_tokens=5, min_new_tokens=3, no_repeat_ngram_size=1, forced_bos_token_id=6
    )
    drawn = sample(generator, generator.contexts, random_prior(1, 2, 5), options, mode=mode, num_samples=64, rng=rng())
    for row, likelihood, log_prob in zip(
        drawn.sequences_BST[0], drawn.log_likelihood_BS[0], drawn.sampled_log_prob_BS[0], strict=True
    ):
        tokens = answer(row)
        assert tokens[0] == 6
        assert EOS not in tokens[:3]
        assert len(set(tokens)) == len(tokens)
        assert float(likelihood) < float(log_prob) < 0, "what is forbidden leaves more for the rest"
        free = TableGenerator(generator.table_CNV, 5)
        per_passage = torch.tensor([free.token_log_probs(k, tokens)[1:] for k in range(2)], dtype=torch.float64)
        prior = random_prior(1, 2, 5)[0]
        expected = (
            torch.logsumexp(per_passage + prior[:, None], 0).sum()
            if mode == "rag_token"
            else torch.logsumexp(per_passage.sum(1) + prior, 0)
        )
        assert float(likelihood) == pytest.approx(float(expected))


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_string_ends_an_answer(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=6, max_tokens=4, seed=5, sharpness=0.5)
    options = DecodingOptions(sample=True, max_new_tokens=4)
    rules = OutputRules(stops=lambda written_NT: (written_NT == 4).any(dim=1))
    drawn = sample(
        generator,
        generator.contexts,
        random_prior(1, 2, 5),
        options,
        mode=mode,
        num_samples=64,
        rng=rng(),
        rules=rules,
    )
    stopped = [answer(row) for row in drawn.sequences_BST[0] if 4 in row]
    assert stopped
    assert all(tokens.index(4) == len(tokens) - 1 for tokens in stopped)


@pytest.mark.parametrize("mode", MODES)
def test_where_no_token_is_left_the_answer_is_bare_and_impossible(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=5, max_tokens=4, seed=0)
    options = DecodingOptions(sample=True, max_new_tokens=4, min_new_tokens=4, no_repeat_ngram_size=1)  # two words only
    drawn = sample(generator, generator.contexts, torch.zeros(2, 1), options, mode=mode, num_samples=3, rng=rng())
    assert {answer(row) for row in drawn.sequences_BST.flatten(0, 1)} == {()}
    assert drawn.log_likelihood_BS.isneginf().all()
    assert drawn.sampled_log_prob_BS.isneginf().all()


def test_drawn_answers_become_a_list_without_repeats_the_likeliest_first():
    generator = TableGenerator.random(num_contexts=4, vocab_size=5, max_tokens=3, seed=2)
    prior = random_prior(2, 2, 2)
    options = DecodingOptions(sample=True, max_new_tokens=3, num_return=12)
    drawn = sample(generator, generator.contexts, prior, options, mode="rag_token", num_samples=12, rng=rng())
    decoded = decoded_samples(drawn, options, PAD)
    for question in range(2):
        distinct = {answer(row) for row in drawn.sequences_BST[question]}
        assert 1 < len(distinct) < 12
        contexts = range(2 * question, 2 * question + 2)
        likelihood = {y: generator.rag_token_log_prob(contexts, prior[question], y) for y in distinct}
        ranked = sorted(distinct, key=likelihood.get, reverse=True)
        given_back = [answer(row) for row in decoded.nbest_BRT[question]]
        assert given_back == [*ranked, *[()] * (12 - len(ranked))]
        assert answer(decoded.sequences_BT[question]) == ranked[0]
        expected = [likelihood[y] for y in ranked] + [-math.inf] * (12 - len(ranked))
        assert decoded.nbest_log_likelihood_BR[question].tolist() == pytest.approx(expected)


# ---------------------------------------------------------------------- truncation


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 7, 50]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_truncation_equals_transformers_warpers(seed, temperature, top_k, top_p):
    log_probs = torch.randn(4, 9, generator=rng(seed), dtype=torch.float64).log_softmax(dim=1)
    log_probs[:, 2] = -torch.inf
    expected = log_probs / temperature
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(truncated(log_probs, temperature, top_k, top_p).exp(), expected.softmax(dim=1))


def test_all_that_tie_with_the_kth_stay():
    probs = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]])
    expected = TopKLogitsWarper(2)(None, probs.log()).softmax(dim=1)
    torch.testing.assert_close(truncated(probs.log(), top_k=2).exp(), expected)
    assert (expected > 0).sum() == 4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), top_p=st.floats(0.01, 0.99))
def test_the_nucleus_is_the_smallest_set_of_that_mass(seed, top_p):
    probs = torch.rand(6, generator=rng(seed), dtype=torch.float64)
    probs = probs / probs.sum()
    kept = truncated(probs.log()[None], top_p=top_p)[0] > -torch.inf
    enough = [
        subset
        for size in range(1, 7)
        for subset in itertools.combinations(range(6), size)
        if float(probs[list(subset)].sum()) >= top_p
    ]
    smallest = min(len(subset) for subset in enough)
    heaviest = max((s for s in enough if len(s) == smallest), key=lambda s: float(probs[list(s)].sum()))
    assert set(kept.nonzero().flatten().tolist()) == set(heaviest)


def test_half_precision_is_truncated_in_float32_and_an_empty_row_stays_empty():
    rows = torch.tensor([[0.5, 0.5], [0.0, 0.0]]).log().to(torch.bfloat16)
    cut = truncated(rows, temperature=0.5, top_k=1, top_p=0.9)
    assert cut.dtype == torch.float32
    assert cut[1].tolist() == [-math.inf, -math.inf]
    assert draw(cut, rng())[1] == 0


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"temperature": -1.0}, r"temperature: expected a number > 0 .*, got -1\.0"),
        ({"temperature": math.nan}, "temperature: expected a number > 0"),
        ({"top_k": -1}, "top_k: expected 0"),
        ({"top_p": 0.0}, "top_p: expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p: expected more than 0 and at most 1"),
    ],
)
def test_impossible_truncations_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        truncated(torch.zeros(1, 2), **setting)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"mode": "beam", "num_samples": 1}, "expected sampling mode rag_token, rag_sequence or fid, got 'beam'"),
        ({"mode": "fid", "num_samples": 1}, "expected one fused context for each question, got 2"),
        ({"mode": "rag_token", "num_samples": 0}, "expected num_samples >= 1, got 0"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    generator = TableGenerator.random(num_contexts=2, vocab_size=5, max_tokens=2, seed=0)
    with pytest.raises(ConfigError, match=message):
        inspect.unwrap(sample)(
            generator, generator.contexts, random_prior(1, 2, 0), DecodingOptions(), rng=rng(), **request_
        )


def test_rows_start_with_the_start_token():
    generator = TableGenerator.random(num_contexts=1, vocab_size=5, max_tokens=2, seed=0)
    options = DecodingOptions(max_new_tokens=2)
    drawn = sample(generator, generator.contexts, torch.zeros(1, 1), options, mode="fid", num_samples=4, rng=rng())
    assert drawn.sequences_BST.shape == (1, 4, 3)
    assert set(drawn.sequences_BST[..., 0].flatten().tolist()) == {START}
