import pytest
import torch

from rag_lightning.decoding.beam import beam_search, mixture
from rag_lightning.decoding.options import DecodingOptions
from tests.unit.decoding.table_generator import EOS, TableGenerator, answer, random_prior

MAX_TOKENS = 4


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_wide_enough_finds_the_best_of_all_outputs_in_order(seed, length_penalty):
    generator = TableGenerator.random(num_contexts=4, vocab_size=5, max_tokens=MAX_TOKENS, seed=seed)
    weights = random_prior(2, 2, seed)
    options = DecodingOptions(num_beams=64, max_new_tokens=MAX_TOKENS, length_penalty=length_penalty)
    found = beam_search(generator, generator.contexts, weights, options)
    for search in range(2):
        contexts = range(2 * search, 2 * search + 2)
        every = {
            tokens: generator.rag_token_log_prob(contexts, weights[search], tokens)
            for tokens in generator.outputs(MAX_TOKENS)
        }
        ranked = sorted(every, key=lambda tokens: -every[tokens] / len(tokens) ** length_penalty)
        filled = int((found.scores_SR[search] > -torch.inf).sum())
        assert filled == len(every) == 31
        assert [answer(row) for row in found.sequences_SRT[search, :filled]] == ranked
        expected = torch.tensor([every[tokens] for tokens in ranked], dtype=torch.float64)
        torch.testing.assert_close(found.log_probs_SR[search, :filled], expected)
        lengths = torch.tensor([float(len(tokens)) for tokens in ranked], dtype=torch.float64)
        torch.testing.assert_close(found.scores_SR[search, :filled], expected / lengths**length_penalty)


def test_slots_that_nothing_fills_are_empty_not_repeated():
    generator = TableGenerator.random(num_contexts=1, vocab_size=4, max_tokens=2, seed=0)
    found = beam_search(
        generator, generator.contexts, torch.zeros(1, 1), DecodingOptions(num_beams=9, max_new_tokens=2)
    )
    assert [answer(row) for row in found.sequences_SRT[0]].count(()) == 6  # (3, 3), (3, 2), (2,) are all there is
    assert {answer(row) for row in found.sequences_SRT[0]} == {(), (3, 3), (3, EOS), (EOS,)}
    assert found.log_probs_SR[0, 3:].isneginf().all()
    torch.testing.assert_close(found.log_probs_SR[0, :3].exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_greedy_takes_the_likeliest_token_until_the_end():
    generator = TableGenerator.random(num_contexts=8, vocab_size=6, max_tokens=6, seed=3)
    options = DecodingOptions(max_new_tokens=6, length_penalty=3.0)  # a penalty must not prolong greedy search
    found = beam_search(generator, generator.contexts, torch.zeros(8, 1), options)
    lengths = set()
    for context in range(8):
        tokens: tuple[int, ...] = ()
        number = 0
        while len(tokens) < 6 and EOS not in tokens:
            tokens = (*tokens, int(generator.table_CNV[context, number].argmax()))
            number = number * 6 + tokens[-1] + 1
        assert answer(found.sequences_SRT[context, 0]) == tokens
        assert float(found.log_probs_SR[context, 0]) == pytest.approx(sum(generator.token_log_probs(context, tokens)))
        lengths.add(len(tokens))
    assert len(lengths) > 2, "the case must have outputs of several lengths"


def test_the_search_stops_when_every_search_is_finished():
    generator = TableGenerator.random(num_contexts=3, vocab_size=4, max_tokens=5, seed=0)
    generator.table_CNV[:, :, EOS] = -0.01
    beam_search(generator, generator.contexts, torch.zeros(3, 1), DecodingOptions(max_new_tokens=5))
    assert generator.num_steps == 1
    generator.table_CNV[2, 0, EOS] = -20.0
    beam_search(generator, generator.contexts, torch.zeros(3, 1), DecodingOptions(max_new_tokens=5))
    assert generator.num_steps == 1 + 2


def test_early_stopping_keeps_the_first_to_finish():
    generator = TableGenerator.random(num_contexts=1, vocab_size=4, max_tokens=3, seed=0)
    rows = torch.full((generator.table_CNV.shape[1], 4), -torch.inf, dtype=torch.float64)
    rows[:, [EOS, 3]] = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    generator.table_CNV[0] = rows
    options = {"num_beams": 2, "max_new_tokens": 3, "length_penalty": 2.0}
    early = beam_search(
        generator, generator.contexts, torch.zeros(1, 1), DecodingOptions(early_stopping=True, **options)
    )
    late = beam_search(generator, generator.contexts, torch.zeros(1, 1), DecodingOptions(**options))
    assert [answer(row) for row in early.sequences_SRT[0]] == [(3, EOS), (EOS,)]
    assert [answer(row) for row in late.sequences_SRT[0]] == [(3, 3, 3), (3, 3, EOS)]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_searches_do_not_see_each_other(num_beams):
    generator = TableGenerator.random(num_contexts=6, vocab_size=6, max_tokens=5, seed=5)
    weights = random_prior(3, 2, 0)
    options = DecodingOptions(num_beams=num_beams, max_new_tokens=5)
    together = beam_search(generator, generator.contexts, weights, options)
    for search in range(3):
        alone = TableGenerator(generator.table_CNV[2 * search : 2 * search + 2], 5)
        found = beam_search(alone, alone.contexts, weights[search : search + 1], options)
        assert torch.equal(found.sequences_SRT[0], together.sequences_SRT[search])
        torch.testing.assert_close(found.log_probs_SR[0], together.log_probs_SR[search])


def test_nothing_allowed_gives_a_bare_start_token_and_no_likelihood():
    generator = TableGenerator.random(num_contexts=1, vocab_size=4, max_tokens=2, seed=0)
    generator.table_CNV[:] = -torch.inf
    found = beam_search(generator, generator.contexts, torch.zeros(1, 1), DecodingOptions(max_new_tokens=2))
    assert answer(found.sequences_SRT[0, 0]) == ()
    assert found.log_probs_SR.tolist() == [[-torch.inf]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_of_the_least_likely_tokens_is_that_in_log_space(dtype):
    rng = torch.Generator().manual_seed(0)
    logits = 60 * torch.randn(2 * 3 * 4, 50, generator=rng, dtype=dtype)
    logits[:, 7] = -torch.inf
    log_probs = logits.log_softmax(dim=1)
    assert (log_probs[:, :7] < -120).any(), "the case must have tokens that float32 cannot hold as probabilities"
    weights = random_prior(2, 4, 0).to(dtype)
    expected = (log_probs.view(2, 3, 4, 50) + weights[:, None, :, None]).logsumexp(dim=2)
    torch.testing.assert_close(mixture(log_probs, weights), expected)


def test_a_mixture_under_autocast_is_summed_in_float32():
    rng = torch.Generator().manual_seed(0)
    log_probs, weights = torch.randn(2 * 3 * 4, 50, generator=rng).log_softmax(dim=1), random_prior(2, 4, 0).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixture(log_probs, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mixture(log_probs, weights), atol=0.0, rtol=0.0)
