import itertools
import math

import pytest
import torch

from rag_lightning.losses.policy import (
    draw_without_replacement,
    leave_one_out_advantage,
    ordered_log_prob,
    policy_entropy,
    policy_kl,
    policy_loss,
)

C, K = 4, 2
SCORES = torch.tensor([[0.3, -1.0, 1.2, 0.1]], dtype=torch.float64)
DRAWS = list(itertools.permutations(range(C), K))


def reward(draw):
    """Any function of the set drawn, so that nothing about the estimator leans on its shape."""
    return {(0, 1): 0.2, (0, 2): 1.0, (0, 3): 0.0, (1, 2): 0.4, (1, 3): 0.7, (2, 3): 0.1}[tuple(sorted(draw))]


def naive_log_prob(scores, draw):
    left, total = dict(enumerate(scores.tolist())), 0.0
    for column in draw:
        total += left[column] - math.log(sum(math.exp(value) for value in left.values()))
        del left[column]
    return total


def expected_reward_gradient(scores):
    scores = scores.clone().requires_grad_()
    picked = torch.tensor(DRAWS)[None]
    expected = (
        ordered_log_prob(scores, picked)[0].exp() * torch.tensor([reward(d) for d in DRAWS], dtype=torch.float64)
    ).sum()
    return torch.autograd.grad(expected, scores)[0]


def test_probabilities_of_ordered_draws_equal_a_loop_and_sum_to_one():
    found = ordered_log_prob(SCORES, torch.tensor(DRAWS)[None])[0]
    expected = torch.tensor([naive_log_prob(SCORES[0], draw) for draw in DRAWS], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("num_samples", [2, 3])
def test_leave_one_out_is_unbiased_by_enumeration(num_samples):
    """The expectation over all S-tuples of draws, each weighted by its probability, is the gradient of -E[r]."""
    probabilities = {draw: math.exp(naive_log_prob(SCORES[0], draw)) for draw in DRAWS}
    scores = SCORES.clone().requires_grad_()
    total = torch.zeros_like(SCORES)
    for draws in itertools.product(DRAWS, repeat=num_samples):
        weight = math.prod(probabilities[draw] for draw in draws)
        rewards = torch.tensor([[reward(draw) for draw in draws]], dtype=torch.float64)
        loss = policy_loss(ordered_log_prob(scores, torch.tensor(draws)[None]), leave_one_out_advantage(rewards))
        total += weight * torch.autograd.grad(loss.sum(), scores)[0]
    torch.testing.assert_close(total, -expected_reward_gradient(SCORES), atol=1e-10, rtol=0)


def test_self_critical_is_unbiased_by_enumeration():
    baseline = reward((2, 0))  # of the two best, whatever is drawn
    scores = SCORES.clone().requires_grad_()
    total = torch.zeros_like(SCORES)
    for draw in DRAWS:
        advantage = torch.tensor([[reward(draw) - baseline]], dtype=torch.float64)
        loss = policy_loss(ordered_log_prob(scores, torch.tensor([[draw]])), advantage)
        total += math.exp(naive_log_prob(SCORES[0], draw)) * torch.autograd.grad(loss.sum(), scores)[0]
    torch.testing.assert_close(total, -expected_reward_gradient(SCORES), atol=1e-10, rtol=0)


def test_a_baseline_of_all_draws_would_be_biased():
    """The mean that includes the draw itself shrinks the gradient by (S - 1) / S: the check above can fail."""
    scores = SCORES.clone().requires_grad_()
    total = torch.zeros_like(SCORES)
    for draws in itertools.product(DRAWS, repeat=2):
        weight = math.exp(sum(naive_log_prob(SCORES[0], draw) for draw in draws))
        rewards = torch.tensor([[reward(draw) for draw in draws]], dtype=torch.float64)
        advantage = rewards - rewards.mean(dim=1, keepdim=True)
        loss = policy_loss(ordered_log_prob(scores, torch.tensor(draws)[None]), advantage)
        total += weight * torch.autograd.grad(loss.sum(), scores)[0]
    torch.testing.assert_close(total, -expected_reward_gradient(SCORES) / 2, atol=1e-10, rtol=0)


def test_draws_come_as_often_as_their_probability_says():
    num_samples = 20_000
    drawn = draw_without_replacement(SCORES, K, num_samples, torch.Generator().manual_seed(0))[0]
    expected = {draw: num_samples * math.exp(naive_log_prob(SCORES[0], draw)) for draw in DRAWS}
    counts = dict.fromkeys(DRAWS, 0)
    for row in drawn.tolist():
        counts[tuple(row)] += 1
    chi_square = sum((counts[draw] - expected[draw]) ** 2 / expected[draw] for draw in DRAWS)
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_a_missing_passage_is_never_drawn_and_has_no_gradient():
    scores = torch.tensor([[0.5, -torch.inf, 0.2]], requires_grad=True)
    drawn = draw_without_replacement(scores, 2, 50, torch.Generator().manual_seed(0))
    assert not (drawn == 1).any()
    ordered_log_prob(scores, drawn).sum().backward()
    assert scores.grad[0, 1] == 0
    assert scores.grad.isfinite().all()
    with pytest.raises(ValueError, match="expected at least 3 candidates for each question, got 2"):
        draw_without_replacement(scores, 3, 1, torch.Generator())


def test_drawing_all_candidates_is_an_order_alone():
    scores = SCORES.clone().requires_grad_()
    total = ordered_log_prob(scores, torch.tensor(list(itertools.permutations(range(C))))[None]).exp().sum()
    assert float(total.detach()) == pytest.approx(1.0)
    (gradient,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_one_draw_has_no_others():
    with pytest.raises(ValueError, match="at least 2 draws of each question, got 1"):
        leave_one_out_advantage(torch.ones(3, 1))


def test_equal_rewards_teach_nothing():
    assert (leave_one_out_advantage(torch.full((2, 4), 0.7)).abs() < 1e-6).all()


def test_entropy_and_kl_equal_loops_and_their_gradients_differences():
    start = torch.tensor([[0.1, 0.2, -0.3, 0.0]], dtype=torch.float64).log_softmax(1)

    def value(scores):
        log_probs = scores.log_softmax(dim=1)
        return policy_entropy(log_probs) + 2 * policy_kl(log_probs, start)

    p, q = SCORES[0].softmax(0).tolist(), start[0].exp().tolist()
    expected = sum(-a * math.log(a) + 2 * a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(value(SCORES)) == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(value, SCORES.clone().requires_grad_())


def test_entropy_and_kl_leave_out_what_was_not_found():
    log_probs = torch.tensor([[0.25, 0.75, 0.0]]).log().requires_grad_()
    start = torch.tensor([[0.5, 0.5, 0.0]]).log()
    value = policy_entropy(log_probs) + policy_kl(log_probs, start)
    assert float(value.detach()) == pytest.approx(math.log(2), abs=1e-6)
    value.sum().backward()
    assert log_probs.grad.isfinite().all()
