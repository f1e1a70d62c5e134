import functools
import inspect
import math

import pytest
import torch

from rag_lightning.losses.marginal import (
    doc_log_prior,
    hf_smoothed_nll,
    passage_log_posterior,
    rag_sequence_log_likelihood,
    rag_token_log_likelihood,
    smoothing_penalty,
    token_posteriors,
)
from tests.unit.losses import naive_marginal

MARGINALS = (rag_sequence_log_likelihood, rag_token_log_likelihood)
OF_SHAPES = (
    *MARGINALS,
    passage_log_posterior,
    functools.partial(inspect.unwrap(token_posteriors), kind="rag_token"),
    functools.partial(inspect.unwrap(token_posteriors), kind="rag_sequence"),
)


def random_case(num_examples=3, num_passages=4, length=5, seed=0, dtype=torch.float64):
    """Token log-probabilities, raw scores, and a ragged mask whose first row is full."""
    rng = torch.Generator().manual_seed(seed)
    token = -3 * torch.rand(num_examples, num_passages, length, generator=rng, dtype=torch.float64)
    scores = 2 * torch.randn(num_examples, num_passages, generator=rng, dtype=torch.float64)
    lengths = torch.randint(1, length + 1, (num_examples, 1), generator=rng)
    lengths[0] = length
    return token.to(dtype), scores.to(dtype), torch.arange(length) < lengths


@pytest.mark.parametrize("seed", range(3))
def test_all_equal_the_naive_double_loops(seed):
    token, scores, mask = random_case(seed=seed)
    mask[0, 1] = False  # a hole: an unscored position inside a target
    log_prior = doc_log_prior(scores)
    sequence = rag_sequence_log_likelihood(token, log_prior, mask)
    by_token = rag_token_log_likelihood(token, log_prior, mask)
    log_posterior = passage_log_posterior(token, log_prior, mask)
    for row in range(len(token)):
        prior = naive_marginal.prior(scores[row].tolist())
        case = (token[row].exp().tolist(), prior, mask[row].tolist())
        assert log_prior[row].exp().tolist() == pytest.approx(prior, abs=1e-12)
        assert sequence[row].item() == pytest.approx(math.log(naive_marginal.rag_sequence(*case)), abs=1e-12)
        assert by_token[row].item() == pytest.approx(math.log(naive_marginal.rag_token(*case)), abs=1e-12)
        assert log_posterior[row].exp().tolist() == pytest.approx(naive_marginal.posterior(*case), abs=1e-12)


def test_the_temperature_divides_the_scores():
    _, scores, _ = random_case()
    assert torch.equal(doc_log_prior(scores, 0.05), (scores / 0.05).log_softmax(dim=1))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        doc_log_prior(torch.zeros(1, 2), temperature)


def test_a_question_without_any_passage_is_refused():
    scores = torch.tensor([[1.0, -torch.inf], [-torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match=r"a question has no retrieved passage \(all scores are -inf\)"):
        doc_log_prior(scores)


@pytest.mark.parametrize("marginal", OF_SHAPES)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 4), (1, 3), (2, 4)), r"of the same B and K, got \(2, 3, 4\) and \(1, 3\)"),
        (((2, 3, 4), (2, 1), (2, 4)), r"got \(2, 3, 4\) and \(2, 1\)"),
        (((2, 1, 4), (2, 3), (2, 4)), r"got \(2, 1, 4\) and \(2, 3\)"),
        (((2, 3, 4), (2, 3), (1, 4)), r"expected target_mask \[B, T\] = \(2, 4\), got \(1, 4\)"),
        (((2, 3, 4), (2, 3), (2, 1)), r"expected target_mask \[B, T\] = \(2, 4\), got \(2, 1\)"),
        (((2, 3, 1), (2, 3), (2, 4)), r"expected target_mask \[B, T\] = \(2, 1\), got \(2, 4\)"),
        (((3, 4), (2, 3), (2, 4)), r"expected token_log_probs \[B, K, T\]"),
    ],
)
def test_shapes_that_would_broadcast_are_refused(marginal, shapes, message):
    token, prior, mask = (torch.zeros(shape) for shape in shapes)
    unhooked = inspect.unwrap(marginal)  # the shape checker of the tests would be quicker; users run without it
    with pytest.raises(ValueError, match=message):
        unhooked(token, prior, mask.bool() | True)


@pytest.mark.parametrize("marginal", OF_SHAPES)
def test_an_empty_target_is_refused(marginal):
    token, scores, mask = random_case()
    mask[1] = False
    with pytest.raises(ValueError, match="a target has no scored token: give every example a non-empty answer"):
        marginal(token, doc_log_prior(scores), mask)


@pytest.mark.parametrize("marginal", OF_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(marginal, dtype):
    token, scores, mask = random_case(dtype=dtype)
    found = marginal(token, doc_log_prior(scores), mask)
    assert found.dtype == torch.float32
    exact = marginal(token.double(), doc_log_prior(scores.double()), mask)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)


def test_scores_near_75_keep_their_order_in_float32_under_autocast():
    scores = torch.tensor([[75.0, 75.1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prior = doc_log_prior(scores)
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior.exp(), torch.tensor([[1 / (1 + math.exp(0.1)), 1 / (1 + math.exp(-0.1))]]))


@pytest.mark.parametrize("hf_compat", [False, True])
@pytest.mark.parametrize("length", [1, 4])
def test_a_missing_passage_has_probability_0_and_a_finite_gradient(length, hf_compat):
    """hf_compat once multiplied its -inf by 0 where a target has one token, which is NaN."""
    token, scores, mask = random_case(length=length)
    scores[:, 2] = -torch.inf
    token.requires_grad_()
    scores.requires_grad_()
    prior = doc_log_prior(scores)
    assert (prior.exp()[:, 2] == 0).all()
    sequence = rag_sequence_log_likelihood(token, prior, mask, hf_compat=hf_compat)
    by_token = rag_token_log_likelihood(token, prior, mask)
    assert torch.isfinite(sequence).all()
    (sequence + by_token).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert torch.isfinite(token.grad).all()
    assert (scores.grad[:, 2] == 0).all()
    assert (passage_log_posterior(token, prior, mask).exp()[:, 2] == 0).all()
    if not hf_compat:
        assert (token.grad[:, 2] == 0).all()


def test_the_gradient_of_rag_sequence_is_the_posterior():
    """∂ log p(y|x) / ∂ log p(y_t|x,z_k,y_<t) = p(z_k|x,y); ∂ / ∂ score_k = p(z_k|x,y) - p(z_k|x)."""
    token, scores, mask = random_case()
    token.requires_grad_()
    scores.requires_grad_()
    prior = doc_log_prior(scores)
    rag_sequence_log_likelihood(token, prior, mask).sum().backward()
    posterior = passage_log_posterior(token, prior, mask).exp().detach()
    torch.testing.assert_close(token.grad, posterior[:, :, None] * mask[:, None])
    torch.testing.assert_close(scores.grad, posterior - prior.exp().detach())


def test_gradients_pass_gradcheck():
    token, scores, mask = random_case(num_examples=2, num_passages=3, length=3)
    for marginal in MARGINALS:
        assert torch.autograd.gradcheck(
            lambda token, scores, marginal=marginal: marginal(token, doc_log_prior(scores), mask),
            (token.requires_grad_(), scores.requires_grad_()),
        )


def test_hf_compat_differs_only_where_one_token_is_scored():
    token, scores, mask = random_case()
    mask[1:] = torch.tensor([[True, False, False, False, False], [True, True, False, False, False]])
    prior = doc_log_prior(scores)
    ours = rag_sequence_log_likelihood(token, prior, mask)
    theirs = rag_sequence_log_likelihood(token, prior, mask, hf_compat=True)
    assert torch.equal(ours[[0, 2]], theirs[[0, 2]])
    torch.testing.assert_close(theirs[1], token[1, :, 0].logsumexp(dim=0))
    torch.testing.assert_close(ours[1], (token[1, :, 0] + prior[1]).logsumexp(dim=0))


# ---------------------------------------------------------------------- label smoothing


def test_smoothing_of_one_passage_is_cross_entropys():
    epsilon = 0.1
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 7, generator=rng, dtype=torch.float64)
    targets = torch.randint(0, 7, (2, 4), generator=rng)
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    log_probs = logits.log_softmax(dim=-1)
    token = log_probs.gather(3, targets[:, None, :, None]).squeeze(3)
    prior = torch.zeros(2, 1, dtype=torch.float64)
    penalty = smoothing_penalty(log_probs.mean(dim=3), passage_log_posterior(token, prior, mask), mask)
    smoothed = -(1 - epsilon) * rag_token_log_likelihood(token, prior, mask) + epsilon * penalty
    expected = torch.nn.functional.cross_entropy(
        logits[:, 0].transpose(1, 2), targets.masked_fill(~mask, -100), label_smoothing=epsilon, reduction="none"
    ).sum(dim=1)
    torch.testing.assert_close(smoothed, expected)
    for sequence in (False, True):
        compat = hf_smoothed_nll(logits, prior, targets, mask, epsilon, sequence)
        torch.testing.assert_close(compat, expected)


def test_the_penalty_is_weighted_by_the_posterior_and_does_not_train_it():
    token, scores, mask = random_case()
    vocab_mean = -5 * torch.rand(token.shape, dtype=torch.float64)
    scores.requires_grad_()
    log_posterior = passage_log_posterior(token, doc_log_prior(scores), mask)
    penalty = smoothing_penalty(vocab_mean, log_posterior, mask)
    assert not penalty.requires_grad
    for row in range(len(token)):
        case = (token[row].exp().tolist(), naive_marginal.prior(scores[row].tolist()), mask[row].tolist())
        expected = 0.0
        for passage, weight in enumerate(naive_marginal.posterior(*case)):
            for place in range(token.shape[2]):
                if mask[row, place]:
                    expected -= weight * vocab_mean[row, passage, place].item()
        assert penalty[row].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("sequence", [False, True])
def test_hf_smoothing_survives_a_missing_passage(sequence):
    logits = torch.randn(2, 3, 4, 7, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.randint(0, 7, (2, 4)), torch.ones(2, 4, dtype=torch.bool)
    scores = torch.tensor([[0.0, 1.0, -torch.inf]] * 2, dtype=torch.float64, requires_grad=True)
    found = hf_smoothed_nll(logits, doc_log_prior(scores), targets, mask, 0.1, sequence)
    expected = hf_smoothed_nll(logits[:, :2], doc_log_prior(scores[:, :2]), targets, mask, 0.1, sequence)
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(scores.grad).all()


# ---------------------------------------------------------------------- token-wise posteriors


@pytest.mark.parametrize("seed", range(3))
def test_token_posteriors_equal_loops_over_tokens(seed):
    token, scores, mask = random_case(seed=seed)
    mask[0, 1] = False
    scores[1, 2] = -torch.inf  # a missing passage
    prior = doc_log_prior(scores)
    by_token = token_posteriors(token, prior, mask, "rag_token")
    running = token_posteriors(token, prior, mask, "rag_sequence")
    for row in range(len(token)):
        prior_K, probs_KT = prior[row].exp().tolist(), token[row].exp().tolist()
        for t in range(token.shape[2]):
            only_this = [bool(mask[row, t]) and s == t for s in range(token.shape[2])]
            until_this = [bool(mask[row, s]) and s <= t for s in range(token.shape[2])]
            for found, scored in [(by_token, only_this), (running, until_this)]:
                expected = naive_marginal.posterior(probs_KT, prior_K, scored)
                assert found[row, :, t].tolist() == pytest.approx(expected, abs=1e-12)
    assert (by_token[1, 2] == 0).all()
    assert (running[1, 2] == 0).all()
    torch.testing.assert_close(running[..., -1].log(), passage_log_posterior(token, prior, mask))


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])
def test_one_passage_writes_every_token(kind):
    token, _, mask = random_case(num_passages=1)
    assert torch.equal(token_posteriors(token, torch.zeros(3, 1), mask, kind), torch.ones_like(token))


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])
def test_a_token_that_no_passage_could_write_leaves_the_prior(kind):
    token, scores, mask = random_case()
    token[0, :, 1] = -torch.inf
    token[1, 0, 0] = -torch.inf
    prior = doc_log_prior(scores)
    found = token_posteriors(token, prior, mask, kind)
    torch.testing.assert_close(found[0, :, 1], prior[0].exp())
    assert float(found[1, 0, 0]) == 0.0
    torch.testing.assert_close(found.sum(dim=1), torch.ones_like(found[:, 0]))


def test_an_unknown_kind_of_posterior_is_refused():
    token, scores, mask = random_case()
    with pytest.raises(ValueError, match="expected kind rag_token or rag_sequence, got 'fid'"):
        inspect.unwrap(token_posteriors)(token, doc_log_prior(scores), mask, "fid")
