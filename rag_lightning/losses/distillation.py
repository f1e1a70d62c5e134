"""Losses that teach the retriever which passages served the reader (Izacard et al. 2022, "Atlas", §2.2).

Inputs: what the reader says of each of the K retrieved passages, and the retriever's ``log p(z|x)`` over the same K.
Assumption: the reader is the teacher, so what it says is a constant here; only the retriever's side has gradient.

How useful was passage k (``usefulness_BK``, larger is better; ``-inf`` where there is none)?

- PDist, perplexity distillation: ``log p(y|x,z_k)``, how well the reader predicts the answer from it alone.
- LOOP, leave-one-out perplexity: ``-log p(y|x, D without z_k)``, what is lost without it (:func:`leave_one_out`).
- ADist, attention distillation: how much the reader attends to it (Izacard and Grave 2021).
- a cross-encoder's logit.

:func:`usefulness_log_target` makes a distribution of it and :func:`passage_kl` draws the retriever there. REPLUG's LSR
(Shi et al. 2024) is PDist with the divergence the other way round. EMDR² (Sachan et al. 2021) needs no target:
:func:`emdr2` is the RAG-Sequence likelihood with a constant reader.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.losses.marginal import at_least_float32, doc_log_prior

KlDirection = Literal["forward", "reverse"]


def usefulness_log_target(
    usefulness_BK: Float[Tensor, "B K"], log_prior_BK: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, "B K"]:
    """Returns the reader's distribution over the passages, ``log softmax(usefulness / temperature)``, a constant.

    Args:
        usefulness_BK: Larger is better.
        log_prior_BK: The retriever's ``log p(z|x)``; where it is ``-inf`` nothing was found, and the target is 0 too.
        temperature: Smaller values single out the best passage (Atlas: 0.01 on likelihoods averaged over tokens).

    Raises:
        ValueError: ``temperature`` is not positive, shapes that would broadcast, or a question without a passage.

    >>> usefulness_log_target(torch.log(torch.tensor([[0.6, 0.2]])), torch.zeros(1, 2)).exp()
    tensor([[0.7500, 0.2500]])
    """
    _check_same(usefulness_BK, log_prior_BK)
    missing_BK = log_prior_BK == -torch.inf
    return doc_log_prior(usefulness_BK.detach().masked_fill(missing_BK, -torch.inf), temperature)


def passage_kl(
    log_target_BK: Float[Tensor, "B K"],
    log_prior_BK: Float[Tensor, "B K"],
    direction: KlDirection = "forward",
    atlas_compat: bool = False,
) -> Float[Tensor, "B"]:
    """Returns the divergence of the retriever's distribution from the reader's, in float32 at least.

    Args:
        log_target_BK: The reader's; no gradient reaches it.
        log_prior_BK: The retriever's ``log p(z|x)``.
        direction: ``forward`` is ``KL(target ‖ prior)`` (Atlas), which wants every useful passage likely; ``reverse``
            is ``KL(prior ‖ target)`` (REPLUG), which wants no useless passage likely.
        atlas_compat: Divides by K, as the element mean of Atlas's published code does. The mean over questions, which
            the caller takes, is otherwise the ``batchmean`` of the definition.

    Raises:
        ValueError: Shapes that would broadcast.

    >>> log_target = torch.log(torch.tensor([[0.75, 0.25]]))
    >>> passage_kl(log_target, log_target), passage_kl(log_target, torch.log(torch.tensor([[0.5, 0.5]])))
    (tensor([0.]), tensor([0.1308]))
    """
    _check_same(log_target_BK, log_prior_BK)
    log_target_BK, log_prior_BK = at_least_float32(log_target_BK.detach()), at_least_float32(log_prior_BK)
    # 0 log 0 is 0: a passage that one side excludes counts on neither
    counted_BK = (log_target_BK > -torch.inf) & (log_prior_BK > -torch.inf)
    log_target_BK = log_target_BK.masked_fill(~counted_BK, 0.0)
    log_prior_BK = log_prior_BK.masked_fill(~counted_BK, 0.0)
    if direction == "forward":
        terms_BK = log_target_BK.exp() * (log_target_BK - log_prior_BK)
    else:
        terms_BK = log_prior_BK.exp() * (log_prior_BK - log_target_BK)
    divergence_B = terms_BK.masked_fill(~counted_BK, 0.0).sum(dim=1)
    return divergence_B / log_target_BK.shape[1] if atlas_compat else divergence_B


def leave_one_out(log_likelihood_BK: Float[Tensor, "B K"], log_prior_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B K"]:
    """Returns ``-log p(y | x, D without z_k)``: LOOP's usefulness for readers that read each passage alone.

    Without passage k the others share the prior anew: ``Σ_j≠k p(z_j|x) p(y|x,z_j) / Σ_j≠k p(z_j|x)``. With a single
    passage nothing is left to compare with, and its usefulness is 0. (Fusion-in-decoder reads all passages at once:
    there the likelihood is scored anew without each.)

    Args:
        log_likelihood_BK: ``log p(y|x,z_k)``, of the whole answer.
        log_prior_BK: ``log p(z_k|x)``.

    >>> leave_one_out(torch.log(torch.tensor([[0.5, 0.1]])), torch.log(torch.tensor([[0.3, 0.7]]))).neg().exp()
    tensor([[0.1000, 0.5000]])
    """
    _check_same(log_likelihood_BK, log_prior_BK)
    log_likelihood_BK, log_prior_BK = at_least_float32(log_likelihood_BK), at_least_float32(log_prior_BK)
    num_passages = log_prior_BK.shape[1]
    itself_KK = torch.eye(num_passages, dtype=torch.bool, device=log_prior_BK.device)
    prior_BKK = log_prior_BK[:, None].masked_fill(itself_KK, -torch.inf)
    joint_BKK = (log_prior_BK + log_likelihood_BK)[:, None].masked_fill(itself_KK, -torch.inf)
    alone_BK = (prior_BKK == -torch.inf).all(dim=2)
    lost_BK = prior_BKK.masked_fill(alone_BK[..., None], 0.0).logsumexp(dim=2) - joint_BKK.masked_fill(
        alone_BK[..., None], 0.0
    ).logsumexp(dim=2)
    usefulness_BK = lost_BK.masked_fill(alone_BK, 0.0)
    return usefulness_BK.masked_fill(log_prior_BK == -torch.inf, -torch.inf)


def emdr2(log_likelihood_BK: Float[Tensor, "B K"], log_prior_BK: Float[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Returns ``-log Σ_k p(z_k|x) p(y|x,z_k)`` with a constant reader (Sachan et al. 2021, eq. 4; Atlas §2.2).

    Its gradient to the prior is that of the RAG-Sequence likelihood; the reader learns from its own loss instead.

    >>> emdr2(torch.log(torch.tensor([[0.5, 0.1]])), torch.log(torch.tensor([[0.5, 0.5]]))).neg().exp()
    tensor([0.3000])
    """
    _check_same(log_likelihood_BK, log_prior_BK)
    return -torch.logsumexp(at_least_float32(log_likelihood_BK.detach()) + at_least_float32(log_prior_BK), dim=1)


def _check_same(one_BK: Tensor, other_BK: Tensor) -> None:
    if one_BK.ndim != 2 or one_BK.shape != other_BK.shape:
        raise ValueError(
            f"expected two tensors [B, K] of the same B and K, got {tuple(one_BK.shape)} and {tuple(other_BK.shape)}"
        )
