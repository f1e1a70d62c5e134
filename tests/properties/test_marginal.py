"""What must hold of the marginals for every input (style.md, rule 22)."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.losses.marginal import (
    doc_log_prior,
    passage_log_posterior,
    rag_sequence_log_likelihood,
    rag_token_log_likelihood,
)
from tests.unit.losses import naive_marginal

MARGINALS = (rag_sequence_log_likelihood, rag_token_log_likelihood)
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


@st.composite
def cases(draw, max_length=4, max_passages=5):
    """Token log-probabilities [B, K, T], raw scores [B, K], a mask with at least one scored position in each row."""
    num_examples = draw(st.integers(1, 3))
    num_passages = draw(st.integers(1, max_passages))
    length = draw(st.integers(1, max_length))
    log_prob = st.floats(-40.0, 0.0, width=32)
    score = st.floats(-90.0, 90.0, width=32)

    def tensor(element, *shape):
        size = math.prod(shape)
        values = draw(st.lists(element, min_size=size, max_size=size))
        return torch.tensor(values, dtype=torch.float64).view(shape)

    token = tensor(log_prob, num_examples, num_passages, length)
    scores = tensor(score, num_examples, num_passages)
    rows = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    mask = torch.tensor(draw(st.lists(rows, min_size=num_examples, max_size=num_examples)))
    return token, scores, mask


@given(cases())
def test_the_naive_double_loop_agrees(case):
    token, scores, mask = case
    prior = doc_log_prior(scores)
    found = [marginal(token, prior, mask) for marginal in MARGINALS]
    for row in range(len(token)):
        plain = (token[row].exp().tolist(), naive_marginal.prior(scores[row].tolist()), mask[row].tolist())
        for oracle, ours in zip((naive_marginal.rag_sequence, naive_marginal.rag_token), found, strict=True):
            expected = oracle(*plain)
            if expected > 1e-290:  # beyond, products of plain probabilities underflow; that is why ours are logs
                assert math.isclose(ours[row].item(), math.log(expected), rel_tol=1e-9, abs_tol=1e-9)


@given(cases(), st.randoms(use_true_random=False))
def test_permuting_the_passages_changes_nothing(case, random):
    token, scores, mask = case
    order = list(range(token.shape[1]))
    random.shuffle(order)
    for marginal in MARGINALS:
        expected = marginal(token, doc_log_prior(scores), mask)
        found = marginal(token[:, order], doc_log_prior(scores[:, order]), mask)
        torch.testing.assert_close(found, expected, **CLOSE)
    expected = passage_log_posterior(token, doc_log_prior(scores), mask)[:, order]
    found = passage_log_posterior(token[:, order], doc_log_prior(scores[:, order]), mask)
    torch.testing.assert_close(found, expected, **CLOSE)


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 4), st.integers(2, 6))
def test_one_passage_gives_the_plain_negative_log_likelihood(seed, num_examples, length, vocab_size):
    rng = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(num_examples, length, vocab_size, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, vocab_size, (num_examples, length), generator=rng)
    lengths = torch.randint(1, length + 1, (num_examples, 1), generator=rng)
    mask = torch.arange(length) < lengths
    token = logits.log_softmax(dim=-1).gather(2, targets[..., None]).squeeze(2)[:, None]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets.masked_fill(~mask, -100), reduction="none"
    ).sum(dim=1)
    score = 80 * torch.randn(num_examples, 1, generator=rng, dtype=torch.float64)
    for marginal in MARGINALS:
        torch.testing.assert_close(-marginal(token, doc_log_prior(score), mask), expected, **CLOSE)


@given(cases(), st.floats(-1000.0, 1000.0, width=32))
def test_adding_a_constant_to_the_scores_changes_nothing(case, constant):
    token, scores, mask = case
    for marginal in MARGINALS:
        expected = marginal(token, doc_log_prior(scores), mask)
        torch.testing.assert_close(marginal(token, doc_log_prior(scores + constant), mask), expected, **CLOSE)


@given(cases(max_length=1))
def test_the_two_marginals_agree_on_answers_of_one_token(case):
    token, scores, mask = case
    prior = doc_log_prior(scores)
    sequence, by_token = (marginal(token, prior, mask) for marginal in MARGINALS)
    torch.testing.assert_close(sequence, by_token, **CLOSE)


@given(cases(), st.data())
def test_a_duplicated_passage_is_one_with_the_summed_prior(case, data):
    token, scores, mask = case
    place = data.draw(st.integers(0, token.shape[1] - 1))
    twice = [*range(token.shape[1]), place]
    doubled = scores.clone()
    doubled[:, place] += math.log(2)
    for marginal in MARGINALS:
        expected = marginal(token, doc_log_prior(doubled), mask)
        torch.testing.assert_close(marginal(token[:, twice], doc_log_prior(scores[:, twice]), mask), expected, **CLOSE)


@given(cases(), st.data())
def test_a_missing_passage_is_as_if_it_were_not_there(case, data):
    token, scores, mask = case
    place = data.draw(st.integers(0, token.shape[1]))
    junk = torch.full_like(token[:, :1], data.draw(st.floats(-50.0, 0.0)))
    with_junk = torch.cat([token[:, :place], junk, token[:, place:]], dim=1).requires_grad_()
    missing = torch.full_like(scores[:, :1], -torch.inf)
    with_missing = torch.cat([scores[:, :place], missing, scores[:, place:]], dim=1).requires_grad_()
    for marginal in MARGINALS:
        found = marginal(with_junk, doc_log_prior(with_missing), mask)
        torch.testing.assert_close(found.detach(), marginal(token, doc_log_prior(scores), mask), **CLOSE)
        gradients = torch.autograd.grad(found.sum(), (with_junk, with_missing))
        for gradient in gradients:
            assert torch.isfinite(gradient).all()
            assert (gradient[:, place] == 0).all()


@given(cases())
def test_unscored_positions_do_not_matter(case):
    token, scores, mask = case
    changed = token.masked_fill(~mask[:, None], -7.0)
    for marginal in MARGINALS:
        assert torch.equal(marginal(changed, doc_log_prior(scores), mask), marginal(token, doc_log_prior(scores), mask))


@given(cases())
def test_the_posterior_is_a_distribution(case):
    token, scores, mask = case
    posterior = passage_log_posterior(token, doc_log_prior(scores), mask).exp()
    torch.testing.assert_close(posterior.sum(dim=1), torch.ones(len(token), dtype=torch.float64), **CLOSE)


@given(cases())
def test_half_precision_inputs_are_summed_in_float32(case):
    token, scores, mask = (value.bfloat16() if value.is_floating_point() else value for value in case)
    for marginal in MARGINALS:
        found = marginal(token, doc_log_prior(scores), mask)
        assert found.dtype == torch.float32
        expected = marginal(token.double(), doc_log_prior(scores.double()), mask)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)
