"""Against loops over passages in plain Python, values and gradients, float64."""

import inspect
import math

import pytest
import torch

from rag_lightning.losses.distillation import emdr2, leave_one_out, passage_kl, usefulness_log_target
from rag_lightning.losses.marginal import doc_log_prior, rag_sequence_log_likelihood


def problem(seed, num_passages=4, missing=True):
    """Log-likelihoods and scores of three questions; the second found one passage less."""
    rng = torch.Generator().manual_seed(seed)
    likelihoods = -5 * torch.rand(3, num_passages, generator=rng, dtype=torch.float64)
    scores = torch.randn(3, num_passages, generator=rng, dtype=torch.float64)
    if missing and num_passages > 1:
        scores[1, -1] = -torch.inf
    return likelihoods, scores


def softmax(values, temperature=1.0):
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def gradient_by_differences(function, scores, step=1e-6):
    gradient = torch.zeros_like(scores)
    for place in torch.isfinite(scores).nonzero().tolist():
        moved = [scores.clone(), scores.clone()]
        moved[0][tuple(place)] += step
        moved[1][tuple(place)] -= step
        gradient[tuple(place)] = (function(moved[0]).sum() - function(moved[1]).sum()) / (2 * step)
    return gradient


def checked(function, scores, expected_B):
    """Compares values with a list and the gradient with differences of the function's own values."""
    scores = scores.clone().requires_grad_(True)
    found_B = function(scores)
    assert found_B.dtype == torch.float64
    assert found_B.tolist() == pytest.approx(expected_B, abs=1e-12)
    found_B.sum().backward()
    assert torch.isfinite(scores.grad).all()
    numeric = gradient_by_differences(function, scores.detach())
    torch.testing.assert_close(scores.grad, numeric, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 3.0])
@pytest.mark.parametrize("num_passages", [1, 2, 5])
@pytest.mark.parametrize("seed", range(2))
def test_perplexity_distillation_is_the_divergence_of_the_definition(seed, num_passages, temperature, direction):
    likelihoods, scores = problem(seed, num_passages)
    expected = []
    for log_likelihoods, row in zip(likelihoods.tolist(), scores.tolist(), strict=True):
        there = [k for k in range(num_passages) if math.isfinite(row[k])]
        target = softmax([log_likelihoods[k] for k in there], temperature)
        prior = softmax([row[k] for k in there])
        p, q = (target, prior) if direction == "forward" else (prior, target)
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))

    def loss(scores_BK):
        log_prior = doc_log_prior(scores_BK)
        return passage_kl(usefulness_log_target(likelihoods, log_prior, temperature), log_prior, direction)

    checked(loss, scores, expected)


@pytest.mark.parametrize("seed", range(3))
def test_leaving_one_out_is_the_marginal_without_it(seed):
    likelihoods, scores = problem(seed)
    found = leave_one_out(likelihoods, doc_log_prior(scores))
    for question, (log_likelihoods, row) in enumerate(zip(likelihoods.tolist(), scores.tolist(), strict=True)):
        for k in range(4):
            others = [j for j in range(4) if j != k and math.isfinite(row[j])]
            prior = softmax([row[j] for j in others])
            marginal = sum(p * math.exp(log_likelihoods[j]) for p, j in zip(prior, others, strict=True))
            expected = -math.log(marginal) if math.isfinite(row[k]) else -math.inf
            assert found[question, k].item() == pytest.approx(expected, abs=1e-12)


def test_a_single_passage_can_only_be_kept():
    likelihoods = torch.tensor([[-2.0], [-3.0]])
    assert leave_one_out(likelihoods, torch.zeros(2, 1)).tolist() == [[0.0], [0.0]]
    scores = torch.tensor([[1.0, -torch.inf]], requires_grad=True)
    log_prior = doc_log_prior(scores)
    usefulness = leave_one_out(torch.tensor([[-2.0, -1.0]]), log_prior)
    assert usefulness.tolist() == [[0.0, -math.inf]]
    loss = passage_kl(usefulness_log_target(usefulness, log_prior), log_prior)
    loss.sum().backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
def test_emdr2_is_the_likelihood_of_rag_sequence_with_a_constant_reader(seed):
    likelihoods, scores = problem(seed)
    expected = []
    for log_likelihoods, row in zip(likelihoods.tolist(), scores.tolist(), strict=True):
        prior = softmax(row)
        expected.append(-math.log(sum(p * math.exp(ll) for p, ll in zip(prior, log_likelihoods, strict=True))))
    checked(lambda scores_BK: emdr2(likelihoods, doc_log_prior(scores_BK)), scores, expected)
    rag = scores.clone().requires_grad_(True)
    mask = torch.ones(3, 1, dtype=torch.bool)
    (-rag_sequence_log_likelihood(likelihoods[..., None], doc_log_prior(rag), mask)).sum().backward()
    ours = scores.clone().requires_grad_(True)
    emdr2(likelihoods, doc_log_prior(ours)).sum().backward()
    torch.testing.assert_close(ours.grad, rag.grad)


def test_the_reader_is_a_constant_teacher():
    likelihoods, scores = problem(0)
    likelihoods.requires_grad_(True)
    log_prior = doc_log_prior(scores.requires_grad_(True))
    for usefulness in (likelihoods, leave_one_out(likelihoods, log_prior)):
        target = usefulness_log_target(usefulness, log_prior)
        assert not target.requires_grad
        passage_kl(target, log_prior).sum().backward(retain_graph=True)
    emdr2(likelihoods, log_prior).sum().backward()
    assert likelihoods.grad is None


def test_equal_passages_and_equal_sides_leave_nothing_to_learn():
    scores = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    log_prior = doc_log_prior(scores)
    for direction in ("forward", "reverse"):
        loss = passage_kl(usefulness_log_target(torch.full_like(scores, -3.0), log_prior), log_prior, direction)
        assert loss.item() == pytest.approx(0, abs=1e-15)
        (gradient,) = torch.autograd.grad(loss.sum(), scores, retain_graph=True)
        assert gradient.abs().max() < 1e-15


def test_the_useful_passage_rises():
    for direction in ("forward", "reverse"):
        scores = torch.zeros(1, 3, requires_grad=True)
        log_prior = doc_log_prior(scores)
        passage_kl(
            usefulness_log_target(torch.tensor([[-9.0, -1.0, -9.0]]), log_prior), log_prior, direction
        ).backward()
        assert scores.grad[0, 1] < 0 < scores.grad[0, 0]


def test_the_element_mean_divides_by_the_passages_too():
    log_target, log_prior = torch.log(torch.tensor([[0.7, 0.2, 0.1]])), torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    by_torch = torch.nn.functional.kl_div(log_prior, log_target.exp(), reduction="none").mean()
    assert passage_kl(log_target, log_prior, atlas_compat=True).mean().item() == pytest.approx(by_torch.item())
    by_torch = torch.nn.functional.kl_div(log_prior, log_target.exp(), reduction="batchmean")
    assert passage_kl(log_target, log_prior).mean().item() == pytest.approx(by_torch.item())


def test_half_precision_is_compared_in_float32():
    scores = torch.tensor([[75.0, 75.5]], dtype=torch.bfloat16)
    log_prior = doc_log_prior(scores)
    assert passage_kl(usefulness_log_target(scores, log_prior), log_prior).dtype == torch.float32
    assert emdr2(scores, log_prior.bfloat16()).dtype == torch.float32


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        usefulness_log_target(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match="a question has no retrieved passage"):
        usefulness_log_target(torch.zeros(1, 2), torch.full((1, 2), -torch.inf))
    for function in (usefulness_log_target, passage_kl, leave_one_out, emdr2):
        with pytest.raises(ValueError, match=r"of the same B and K, got \(1, 2\) and \(1, 3\)"):
            inspect.unwrap(function)(torch.zeros(1, 2), torch.zeros(1, 3))
