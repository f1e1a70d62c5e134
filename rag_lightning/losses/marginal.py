"""The two marginal likelihoods of retrieval-augmented generation (Lewis et al. 2020, §2.1).

Inputs: the log-probability of each target token under each passage, and the log prior of each passage.
Assumption: the K passages stand for the whole corpus (the paper's top-K approximation).

- RAG-Sequence: one passage explains the whole answer, ``p(y|x) = Σ_z p(z|x) Π_t p(y_t|x,z,y_<t)``.
  Use it for short factual answers; its likelihood rises with every passage added at test time.
- RAG-Token: each token may come from another passage, ``p(y|x) = Π_t Σ_z p(z|x) p(y_t|x,z,y_<t)``.
  Use it where an answer draws on several passages; it decodes in one beam search.

The two are equal for K = 1 and for answers of one token. Only the target token's log-probability is needed, so
nothing here has a vocabulary axis, save the label smoothing that reproduces transformers' (``hf_compat``).
All sums run in float32 at least: DPR scores near 75 have a spacing of 0.5 in bfloat16.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TokenPosteriorKind = Literal["rag_token", "rag_sequence"]


def doc_log_prior(doc_scores_BK: Float[Tensor, "B K"], temperature: float = 1.0) -> Float[Tensor, "B K"]:
    """Returns ``log p(z_k | x)``, the log-softmax of the scores, in float32 at least (eq. for ``p_η``, §2.2).

    Args:
        doc_scores_BK: Similarities; ``-inf`` marks a missing passage, whose probability is 0.
        temperature: Divides the scores; 1 is the paper's.

    Raises:
        ValueError: ``temperature`` is not positive, or a question has no passage at all.

    >>> doc_log_prior(torch.tensor([[75.0, 75.0]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if bool((doc_scores_BK == -torch.inf).all(dim=1).any()):
        raise ValueError("a question has no retrieved passage (all scores are -inf): the marginal is undefined")
    with torch.autocast(doc_scores_BK.device.type, enabled=False):
        return (at_least_float32(doc_scores_BK) / temperature).log_softmax(dim=1)


def passage_log_likelihood(
    token_log_probs: Float[Tensor, "B K T"], target_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B K"]:
    """Returns ``log p(y | x, z_k) = Σ_t log p(y_t | x, z_k, y_<t)``, in float32 at least: the answer from one passage.

    >>> passage_log_likelihood(torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.1]]])), torch.tensor([[True, False]])).exp()
    tensor([[0.5000, 0.1000]])
    """
    return at_least_float32(token_log_probs).masked_fill(~target_mask[:, None], 0.0).sum(dim=2)


def rag_sequence_log_likelihood(
    token_log_probs: Float[Tensor, "B K T"],
    doc_log_probs: Float[Tensor, "B K"],
    target_mask: Bool[Tensor, "B T"],
    hf_compat: bool = False,
) -> Float[Tensor, "B"]:
    """Returns ``log Σ_k p(z_k|x) Π_t p(y_t|x,z_k,y_<t)``, in float32 at least.

    Args:
        token_log_probs: ``log p(y_t | x, z_k, y_<t)`` of the target tokens.
        doc_log_probs: ``log p(z_k | x)``.
        target_mask: True on scored positions.
        hf_compat: Adds the prior at the second token as transformers does, so that an answer with one scored
            token loses it (and with it the retriever's gradient). The default adds it to the sum, as in the paper.

    Raises:
        ValueError: Shapes that would broadcast, or a row without a scored token.

    >>> token = torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.1]]]))
    >>> prior = torch.log(torch.tensor([[0.8, 0.2]]))
    >>> rag_sequence_log_likelihood(token, prior, torch.ones(1, 2, dtype=torch.bool)).exp()
    tensor([0.2020])
    """
    token_log_probs, doc_log_probs = _checked(token_log_probs, doc_log_probs, target_mask)
    sequence_BK = passage_log_likelihood(token_log_probs, target_mask)
    if hf_compat:
        doc_log_probs = doc_log_probs.masked_fill(~_has_second_token(target_mask)[:, None], 0.0)
    return torch.logsumexp(sequence_BK + doc_log_probs, dim=1)


def rag_token_log_likelihood(
    token_log_probs: Float[Tensor, "B K T"],
    doc_log_probs: Float[Tensor, "B K"],
    target_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B"]:
    """Returns ``Σ_t log Σ_k p(z_k|x) p(y_t|x,z_k,y_<t)``, in float32 at least; equals transformers' RAG-Token.

    Args and Raises: as :func:`rag_sequence_log_likelihood`.

    >>> token = torch.log(torch.tensor([[[0.5, 0.5], [0.1, 0.1]]]))
    >>> prior = torch.log(torch.tensor([[0.8, 0.2]]))
    >>> rag_token_log_likelihood(token, prior, torch.ones(1, 2, dtype=torch.bool)).exp()
    tensor([0.1764])
    """
    token_log_probs, doc_log_probs = _checked(token_log_probs, doc_log_probs, target_mask)
    mixture_BT = torch.logsumexp(token_log_probs + doc_log_probs[:, :, None], dim=1)
    return mixture_BT.masked_fill(~target_mask, 0.0).sum(dim=1)


def passage_log_posterior(
    token_log_probs: Float[Tensor, "B K T"],
    doc_log_probs: Float[Tensor, "B K"],
    target_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B K"]:
    """Returns ``log p(z_k | x, y) ∝ p(z_k|x) Π_t p(y_t|x,z_k,y_<t)``: which passage explains the whole answer."""
    token_log_probs, doc_log_probs = _checked(token_log_probs, doc_log_probs, target_mask)
    sequence_BK = passage_log_likelihood(token_log_probs, target_mask)
    return (sequence_BK + doc_log_probs).log_softmax(dim=1)


def token_posteriors(
    token_log_probs: Float[Tensor, "B K T"],
    doc_log_probs: Float[Tensor, "B K"],
    target_mask: Bool[Tensor, "B T"],
    kind: TokenPosteriorKind,
) -> Float[Tensor, "B K T"]:
    """Returns ``p(z_k | x, y_<=t)``: at each token, which passage it comes from (Lewis et al. 2020, figure 2).

    The two models ask different questions of the past:

    - ``rag_token``: every token draws a passage of its own, so the passage of token t depends on that token alone (the
      ones before it are only its condition): ``p(z|x) p(y_t|x,z,y_<t) / Σ_z …``. This is the paper's figure; a passage
      may win a token and lose the next.
    - ``rag_sequence``: one passage writes the whole answer, and each token is one more piece of evidence for it:
      ``p(z|x) Π_{s<=t} p(y_s|x,z,y_<s) / Σ_z …``. The last column is :func:`passage_log_posterior`.

    Args:
        token_log_probs: ``log p(y_t | x, z_k, y_<t)`` of the target tokens.
        doc_log_probs: ``log p(z_k | x)``; ``-inf`` for a missing passage, whose posterior is 0.
        target_mask: True on scored positions. An unscored one is no evidence.
        kind: ``rag_token`` or ``rag_sequence``.

    Returns:
        Probabilities, in float32 at least, that sum to 1 over the passages. Where no passage could have written the
        token, the prior.

    Raises:
        ValueError: Another kind, shapes that would broadcast, or a row without a scored token.

    >>> token = torch.log(torch.tensor([[[0.5, 0.1], [0.5, 0.9]]]))
    >>> prior, mask = torch.log(torch.tensor([[0.8, 0.2]])), torch.ones(1, 2, dtype=torch.bool)
    >>> token_posteriors(token, prior, mask, "rag_token")
    tensor([[[0.8000, 0.3077],
             [0.2000, 0.6923]]])
    """
    if kind not in ("rag_token", "rag_sequence"):
        raise ValueError(f"expected kind rag_token or rag_sequence, got {kind!r}")
    token_log_probs, doc_log_probs = _checked(token_log_probs, doc_log_probs, target_mask)
    evidence_BKT = token_log_probs.masked_fill(~target_mask[:, None], 0.0)
    if kind == "rag_sequence":
        evidence_BKT = evidence_BKT.cumsum(dim=2)
    joint_BKT = evidence_BKT + doc_log_probs[..., None]
    impossible_B1T = joint_BKT.isneginf().all(dim=1, keepdim=True)
    return torch.where(impossible_B1T, doc_log_probs[..., None], joint_BKT).softmax(dim=1)


def smoothing_penalty(
    vocab_mean_BKT: Float[Tensor, "B K T"],
    log_posterior_BK: Float[Tensor, "B K"],
    target_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B"]:
    """Returns ``Σ_k p(z_k|x,y) Σ_t -mean_v log p(v|x,z_k,y_<t)``, the uniform cross-entropy of label smoothing.

    Smoothing regularises the generator, so the posterior is a constant weight here: passages are not ranked by how
    flat they make the vocabulary. For K = 1 this is standard label smoothing (Szegedy et al. 2016):
    ``loss = (1 - ε) nll + ε penalty``.
    """
    penalty_BK = -vocab_mean_BKT.masked_fill(~target_mask[:, None], 0.0).sum(dim=2)
    return (log_posterior_BK.detach().exp() * penalty_BK).sum(dim=1)


def hf_smoothed_nll(
    logits_BKTV: Float[Tensor, "B K T V"],
    doc_log_probs_BK: Float[Tensor, "B K"],
    targets_BT: Int[Tensor, "B T"],
    target_mask_BT: Bool[Tensor, "B T"],
    epsilon: float,
    sequence: bool,
) -> Float[Tensor, "B"]:
    """Returns transformers' label-smoothed loss, for parity only: it needs the whole vocabulary axis.

    There, RAG-Sequence combines the smoothing sums of the passages by logsumexp as if they were likelihoods and
    counts the prior V times; RAG-Token smooths the mixture. The default smoothing is :func:`smoothing_penalty`.
    """
    log_probs_BKTV = at_least_float32(logits_BKTV).log_softmax(dim=-1)
    prior_BK11 = doc_log_probs_BK[:, :, None, None]
    if not sequence:
        mixture_BTV = torch.logsumexp(log_probs_BKTV + prior_BK11, dim=1)
        ll_BT = mixture_BTV.gather(2, targets_BT[..., None]).squeeze(2).masked_fill(~target_mask_BT, 0.0)
        smooth_BT = mixture_BTV.sum(dim=2).masked_fill(~target_mask_BT, 0.0)
        return -(1 - epsilon) * ll_BT.sum(1) - epsilon / logits_BKTV.shape[-1] * smooth_BT.sum(1)
    second = torch.arange(log_probs_BKTV.shape[2], device=logits_BKTV.device) == 1
    with_prior_BKTV = torch.where(second[:, None], log_probs_BKTV + prior_BK11, log_probs_BKTV)
    index_BKT1 = targets_BT[:, None, :, None].expand(-1, log_probs_BKTV.shape[1], -1, 1)
    mask_B1T = target_mask_BT[:, None]
    ll_BK = with_prior_BKTV.gather(3, index_BKT1).squeeze(3).masked_fill(~mask_B1T, 0.0).sum(2)
    smooth_BK = with_prior_BKTV.sum(dim=3).masked_fill(~mask_B1T, 0.0).sum(2)
    smooth_B = torch.logsumexp(smooth_BK, dim=1)
    return -(1 - epsilon) * torch.logsumexp(ll_BK, dim=1) - epsilon / logits_BKTV.shape[-1] * smooth_B


def _has_second_token(target_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B"]:
    if target_mask.shape[1] < 2:
        return torch.zeros_like(target_mask[:, 0])
    return target_mask[:, 1]


def at_least_float32(values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Returns the values in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def _checked(
    token_log_probs: Tensor, doc_log_probs: Tensor, target_mask: Tensor
) -> tuple[Float[Tensor, "B K T"], Float[Tensor, "B K"]]:
    if token_log_probs.ndim != 3 or doc_log_probs.shape != token_log_probs.shape[:2]:
        raise ValueError(
            "expected token_log_probs [B, K, T] and doc_log_probs [B, K] of the same B and K, "
            f"got {tuple(token_log_probs.shape)} and {tuple(doc_log_probs.shape)}"
        )
    if target_mask.shape != (token_log_probs.shape[0], token_log_probs.shape[2]):
        raise ValueError(
            f"expected target_mask [B, T] = {(token_log_probs.shape[0], token_log_probs.shape[2])}, "
            f"got {tuple(target_mask.shape)}"
        )
    if not bool(target_mask.any(dim=1).all()):
        raise ValueError("a target has no scored token: give every example a non-empty answer")
    return at_least_float32(token_log_probs), at_least_float32(doc_log_probs)


def class_log_probs(
    class_log_probs_BKC: Float[Tensor, "B K *places C"], doc_log_probs_BK: Float[Tensor, "B K"]
) -> Float[Tensor, "B *places C"]:
    """Returns ``log Σ_k p(z_k|x) p(y|x,z_k)`` for each class, or for each class at each place, in float32 at least.

    A class is an answer of one token, for which RAG-Sequence and RAG-Token are the same (Lewis et al. 2020, §3.4).

    Args:
        class_log_probs_BKC: ``log p(y | x, z_k)``.
        doc_log_probs_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage.

    Raises:
        ValueError: Batch or passages differ.

    >>> class_log_probs(torch.tensor([[[0.5, 0.5], [0.1, 0.9]]]).log(), torch.tensor([[0.5, 0.5]]).log()).exp()
    tensor([[0.3000, 0.7000]])
    """
    if class_log_probs_BKC.shape[:2] != doc_log_probs_BK.shape:
        raise ValueError(
            f"expected class log-probabilities [B, K, …, C] for a prior of shape {tuple(doc_log_probs_BK.shape)}, came "
            f"{tuple(class_log_probs_BKC.shape)}"
        )
    with torch.autocast(doc_log_probs_BK.device.type, enabled=False):
        prior = at_least_float32(doc_log_probs_BK)
        prior = prior.view(*prior.shape, *(1 for _ in class_log_probs_BKC.shape[2:]))
        return (at_least_float32(class_log_probs_BKC) + prior).logsumexp(dim=1)
