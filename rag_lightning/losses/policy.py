"""Policy gradients: learning from a reward that has no derivative (exact match, F1, a cited gold passage).

Inputs: the retriever's scores of C candidate passages, what was drawn from them, and the rewards of the draws. The
retriever is a policy that draws K passages without replacement, one after another from the softmax of what is left
(Plackett and Luce); the generator is a policy that draws an answer. ``E[r]`` has the gradient ``E[r ∇ log π]``
(Williams 1992, "REINFORCE"), and any baseline that does not depend on the draw itself leaves it so:

- *leave-one-out*: the mean reward of the question's other draws (Kool et al. 2019, "Buy 4 REINFORCE samples, get a
  baseline for free!");
- *self-critical*: the reward of what the model would do without drawing (Rennie et al. 2017, "Self-critical sequence
  training for image captioning").

Use them after supervised training: where no draw earns anything, nothing is learned.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.losses.marginal import at_least_float32


def draw_without_replacement(
    scores_BC: Float[Tensor, "B C"], num_passages: int, num_samples: int, rng: torch.Generator
) -> Int[Tensor, "B S K"]:
    """Draws K of C candidates in order, S times over, by Gumbel noise (Kool et al. 2019, "Stochastic beams", §2.3).

    Args:
        scores_BC: Unnormalised log-probabilities; ``-inf`` is never drawn.
        num_passages: K.
        num_samples: S.
        rng: Where the random numbers come from; on any device.

    Raises:
        ValueError: A question has fewer than K candidates.

    >>> drawn = draw_without_replacement(torch.tensor([[0.0, -torch.inf, 0.0]]), 2, 1, torch.Generator().manual_seed(0))
    >>> drawn.sort().values
    tensor([[[0, 2]]])
    """
    num_found = int((scores_BC > -torch.inf).sum(dim=1).min()) if scores_BC.numel() > 0 else 0
    if num_passages > num_found:
        raise ValueError(f"expected at least {num_passages} candidates for each question, got {num_found}")
    shape_BSC = (scores_BC.shape[0], num_samples, scores_BC.shape[1])
    uniform_BSC = torch.rand(shape_BSC, generator=rng, device=rng.device, dtype=torch.float64).clamp(min=1e-300)
    gumbel_BSC = -(-uniform_BSC.log()).log()
    noisy_BSC = scores_BC.detach().double()[:, None] + gumbel_BSC.to(scores_BC.device)
    return noisy_BSC.topk(num_passages, dim=2).indices


def ordered_log_prob(scores_BC: Float[Tensor, "B C"], picked_BSK: Int[Tensor, "B S K"]) -> Float[Tensor, "B S"]:
    """Returns the log-probability of drawing just these candidates in just this order, in float32 at least.

    ``Σ_i log [exp s_i / (Σ_c exp s_c - Σ_{j<i} exp s_j)]`` (Plackett-Luce).

    Args:
        scores_BC: Unnormalised log-probabilities, with gradient to the retriever.
        picked_BSK: Distinct columns.

    >>> ordered_log_prob(torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[[1, 0]]])).exp()  # 0.3 x 0.5 / 0.7
    tensor([[0.2143]])
    """
    scores_BC = at_least_float32(scores_BC)
    left_BSC = scores_BC[:, None].expand(-1, picked_BSK.shape[1], -1)
    total_BS = torch.zeros_like(left_BSC[:, :, 0])
    for place in range(picked_BSK.shape[2]):
        column_BS1 = picked_BSK[:, :, place : place + 1]
        total_BS = total_BS + left_BSC.log_softmax(dim=2).gather(2, column_BS1)[:, :, 0]
        left_BSC = left_BSC.scatter(2, column_BS1, -torch.inf)
        left_BSC = torch.where(left_BSC.isneginf().all(dim=2, keepdim=True), 0.0, left_BSC)  # all are drawn
    return total_BS


def leave_one_out_advantage(rewards_BS: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
    """Returns each draw's reward less the mean of the question's other draws.

    Raises:
        ValueError: Fewer than two draws.

    >>> leave_one_out_advantage(torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([[ 1.0000, -0.5000, -0.5000]])
    """
    num_samples = rewards_BS.shape[1]
    if num_samples < 2:
        raise ValueError(f"expected at least 2 draws of each question, got {num_samples}: one has no others")
    others_BS = (rewards_BS.sum(dim=1, keepdim=True) - rewards_BS) / (num_samples - 1)
    return rewards_BS - others_BS


def policy_loss(log_prob_BS: Float[Tensor, "B S"], advantage_BS: Float[Tensor, "B S"]) -> Float[Tensor, "B"]:
    """Returns ``-mean_s A_s log π(a_s)``, whose gradient is an unbiased estimate of that of ``-E[r]``.

    Args:
        log_prob_BS: With gradient to the policy.
        advantage_BS: Rewards less a baseline; constants.

    >>> policy_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[0.5, -0.5]]))
    tensor([-0.2500])
    """
    return -(advantage_BS.detach() * log_prob_BS).mean(dim=1)


def policy_entropy(log_probs_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Returns ``-Σ_c π_c log π_c`` in nats; a candidate of probability 0 adds nothing.

    >>> policy_entropy(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    finite_BC = log_probs_BC.masked_fill(log_probs_BC == -torch.inf, 0.0)
    return -(log_probs_BC.exp() * finite_BC).sum(dim=1)


def policy_kl(log_probs_BC: Float[Tensor, "B C"], start_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Returns ``KL(π ‖ π₀)`` in nats, over the candidates that both know.

    Args:
        log_probs_BC: Of the policy, with gradient.
        start_BC: Of the policy as it started; a constant.

    >>> policy_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.5, 0.5]]).log())
    tensor([0.])
    """
    known_BC = (log_probs_BC > -torch.inf) & (start_BC > -torch.inf)
    gap_BC = log_probs_BC.masked_fill(~known_BC, 0.0) - start_BC.detach().masked_fill(~known_BC, 0.0)
    return (log_probs_BC.exp() * gap_BC).sum(dim=1)
