"""Against loops in plain Python and against the marginals; values and gradients in float64."""

import inspect
import math

import pytest
import torch

from rag_lightning.losses.knowledge import coarsen, divergence, predictive_log_probs, soft_target_kl, tempered
from rag_lightning.losses.marginal import rag_sequence_log_likelihood, rag_token_log_likelihood
from tests.unit.losses.test_distillation import softmax

MASK = torch.tensor([[True, True, True], [True, False, False]])


def problem(seed, num_readings, *, missing=True, num_tokens=5):
    """Logits of two questions with three and one scored tokens, targets, and a prior; the second misses a passage."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, num_readings, 3, num_tokens, generator=rng, dtype=torch.float64)
    scores = torch.randn(2, num_readings, generator=rng, dtype=torch.float64)
    if missing and num_readings > 1:
        scores[1, 0] = -torch.inf
    targets = torch.randint(num_tokens, (2, 3), generator=rng)
    return logits, scores.log_softmax(dim=1), targets


def naive_predictive(logits, prior, targets, sequence):
    """The definition, one position and one token at a time."""
    rows = []
    for question, length in enumerate((3, 1)):
        weights = [math.exp(value) for value in prior[question].tolist()]
        for position in range(length):
            each = [softmax(row) for row in logits[question, :, position].tolist()]
            total = sum(weights)
            rows.append(
                [sum(w * p[v] for w, p in zip(weights, each, strict=True)) / total for v in range(len(each[0]))]
            )
            if sequence:
                said = int(targets[question, position])
                weights = [w * p[said] for w, p in zip(weights, each, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def naive_kl(p, q, temperature):
    p, q = (softmax([math.log(value) for value in row], temperature) for row in (p, q))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("num_readings", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_next_token_is_the_mixture_of_the_definition(seed, num_readings, sequence):
    logits, prior, targets = problem(seed, num_readings)
    found_SV = predictive_log_probs(logits, prior, targets, MASK, sequence)
    assert found_SV.dtype == torch.float64
    torch.testing.assert_close(found_SV.exp(), naive_predictive(logits, prior, targets, sequence))
    torch.testing.assert_close(found_SV.exp().sum(dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("sequence", "likelihood"), [(False, rag_token_log_likelihood), (True, rag_sequence_log_likelihood)]
)
def test_at_the_targets_it_is_the_marginal_likelihood(sequence, likelihood):
    """The chain rule: what was said decides which passage speaks on, and the product is the whole answer's."""
    logits, prior, targets = problem(7, 4)
    found_SV = predictive_log_probs(logits, prior, targets, MASK, sequence)
    said_S = found_SV.gather(1, targets[MASK][:, None]).squeeze(1)
    token_log_probs = logits.log_softmax(dim=-1).gather(3, targets[:, None, :, None].expand(-1, 4, -1, 1)).squeeze(3)
    expected = likelihood(token_log_probs, prior, MASK)
    torch.testing.assert_close(torch.stack([said_S[:3].sum(), said_S[3]]), expected)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("sequence", [False, True])
def test_the_loss_is_the_divergence_of_the_definition(sequence, temperature, direction):
    logits, prior, targets = problem(1, 3)
    teacher = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).log_softmax(dim=1)

    def loss(logits):
        student = predictive_log_probs(logits, prior, targets, MASK, sequence)
        return soft_target_kl(tempered(teacher, temperature), student, MASK, temperature, direction)

    student = naive_predictive(logits, prior, targets, sequence).tolist()
    pairs = zip(teacher.exp().tolist(), student, strict=True)
    each = [naive_kl(*((p, q) if direction == "forward" else (q, p)), temperature) for p, q in pairs]
    assert loss(logits).tolist() == pytest.approx([sum(each[:3]), each[3]], abs=1e-12)

    moving = logits.clone().requires_grad_(True)
    loss(moving).sum().backward()
    numeric, step = torch.zeros_like(logits), 1e-6
    for place in torch.ones_like(logits).nonzero().tolist():
        moved = [logits.clone(), logits.clone()]
        moved[0][tuple(place)] += step
        moved[1][tuple(place)] -= step
        numeric[tuple(place)] = (loss(moved[0]).sum() - loss(moved[1]).sum()) / (2 * step)
    torch.testing.assert_close(moving.grad, numeric, atol=1e-8, rtol=1e-6)
    assert float(moving.grad[1, :, 1:].abs().max()) == 0.0, "padding has no gradient"
    assert float(moving.grad[1, 0].abs().max()) == 0.0, "nor has a passage that was not found"


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(direction):
    logits, prior, targets = problem(2, 3)
    teacher = tempered(predictive_log_probs(logits, prior, targets, MASK, True), 2.0)
    moving = logits.clone().requires_grad_(True)
    student = predictive_log_probs(moving, prior, targets, MASK, True)
    loss = soft_target_kl(teacher, student, MASK, 2.0, direction)
    loss.sum().backward()
    assert loss.abs().max() < 1e-12
    assert moving.grad.abs().max() < 1e-12


def test_the_temperature_leaves_the_size_of_the_gradient_as_it_is():
    """Hinton et al. 2015, §2: for small logits the gradient falls with T², which T² undoes."""
    rng = torch.Generator().manual_seed(0)
    teacher, student = (0.01 * torch.randn(4, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    sizes = []
    for temperature in (1.0, 3.0, 10.0):
        moving = student.clone().requires_grad_(True)
        soft_target_kl(tempered(teacher, temperature), moving, MASK, temperature).sum().backward()
        sizes.append(float(moving.grad.norm()))
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.02)


def test_directions_differ_as_they_should():
    """Forward punishes what the student leaves out, reverse what it adds."""
    both = torch.log(torch.tensor([[0.499, 0.499, 0.002]]))
    one = torch.log(torch.tensor([[0.997, 0.001, 0.002]]))
    mask = torch.tensor([[True]])
    leaves_out = [float(soft_target_kl(both, one, mask, 1.0, way)) for way in ("forward", "reverse")]
    adds = [float(soft_target_kl(one, both, mask, 1.0, way)) for way in ("forward", "reverse")]
    assert leaves_out[0] > 2 * leaves_out[1]
    assert leaves_out == pytest.approx(adds[::-1])


def test_impossible_tokens_count_for_nothing_and_give_no_nan():
    target = torch.log(torch.tensor([[0.5, 0.5, 0.0]]))
    moving = torch.randn(1, 3, requires_grad=True)
    loss = divergence(target, moving.log_softmax(dim=1), "forward")
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(moving.grad).all()
    assert divergence(target, torch.log(torch.tensor([[1.0, 0.0, 0.0]])), "forward").isinf().all()
    assert float(divergence(target, target, "reverse")) == 0.0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_merging_unlikely_tokens_lowers_the_divergence_a_little(direction):
    rng = torch.Generator().manual_seed(3)
    teacher = (3 * torch.randn(4, 40, generator=rng, dtype=torch.float64)).log_softmax(dim=1)
    student = (3 * torch.randn(4, 40, generator=rng, dtype=torch.float64)).requires_grad_(True)
    whole, before = soft_target_kl(teacher, student, MASK, 1.0, direction), None
    for kept in (2, 10, 39):
        ids_SN = teacher.topk(kept, dim=1).indices
        coarse = coarsen(teacher, ids_SN)
        torch.testing.assert_close(coarse.exp().sum(dim=1), torch.ones(4, dtype=torch.float64))
        merged = soft_target_kl(coarse, student, MASK, 1.0, direction, ids_SN)
        assert (merged <= whole + 1e-12).all()
        assert before is None or (merged >= before - 1e-12).all(), "more events tell more"
        before = merged
    torch.testing.assert_close(before, whole)  # 39 tokens and one more are all 40


def test_float16_is_summed_in_float32():
    logits, prior, targets = problem(4, 3, missing=False)
    found = predictive_log_probs(logits.half(), prior.half(), targets, MASK, True)
    assert found.dtype == torch.float32
    assert tempered(found.half(), 2.0).dtype == torch.float32


def test_bad_input_is_refused():
    logits, prior, targets = problem(0, 3)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        tempered(logits[0, 0], 0.0)
    with pytest.raises(ValueError, match=r"expected prior \[B, R\], targets \[B, T\] and mask \[B, T\]"):
        inspect.unwrap(predictive_log_probs)(logits, prior[:, :1], targets, MASK, False)
    with pytest.raises(ValueError, match="expected targets and log probabilities of one shape"):
        inspect.unwrap(divergence)(logits[0, 0], logits[0, 0, :1], "forward")
    with pytest.raises(ValueError, match="expected 4 scored positions, as the mask has, got 3"):
        inspect.unwrap(soft_target_kl)(logits[0, 0], logits[0, 0], MASK)
