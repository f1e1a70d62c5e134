"""Pooling by attention with a learned query: over the tokens of a text, or over those of all its passages at once.

Inputs: token states, of one text or of K readings of it. The weights say which tokens a decision was made of, so they
are returned. Relation to its siblings: ``cls`` and ``mean`` (:mod:`rag_lightning.encoders.pooling`) look at one reading
and have no weights to learn. Yang et al. 2016 ("Hierarchical attention networks", §2.2) pool words so.

Over passages, the log prior ``log p(z | x)`` is added to the scores of passage z's tokens. A passage that retrieval
holds unlikely then counts little, and the query encoder learns through the weights: attention is the alternative to the
marginal ``Σ_z p(z|x) p(y|x,z)``, mixing what was read before it is judged, where the marginal mixes judgements.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class AttentionPooling(nn.Module):
    """One learned query attends to token states.

    Args:
        width: D, the width of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width))  # every token counts the same at first

    def forward(
        self,
        states_NLD: Float[Tensor, "N L D"],
        mask_NL: Int[Tensor, "N L"],
        log_prior_NL: Float[Tensor, "N L"] | None = None,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N L"]]:
        """Returns one vector for each row, and the weights, which sum to 1 over its real tokens.

        Args:
            states_NLD: Token states.
            mask_NL: 1 on real tokens; at least one in each row.
            log_prior_NL: Added to the scores; ``-inf`` leaves a token out.
        """
        scores_NL = (states_NLD @ self.query).float() / math.sqrt(states_NLD.shape[-1])
        if log_prior_NL is not None:
            scores_NL = scores_NL + log_prior_NL
        weights_NL = scores_NL.masked_fill(mask_NL == 0, -torch.inf).softmax(dim=1)
        return (weights_NL.to(states_NLD.dtype)[:, None] @ states_NLD)[:, 0], weights_NL


def pool_passages(
    pooling: AttentionPooling,
    states_NLD: Float[Tensor, "N L D"],
    mask_NL: Int[Tensor, "N L"],
    log_prior_BK: Float[Tensor, "B K"],
) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B K L"]]:
    """Returns one vector for each question from all tokens of its K readings, and the weights.

    Args:
        pooling: The learned query.
        states_NLD: ``N = B * K`` readings, those of one question adjacent.
        mask_NL: 1 on real tokens.
        log_prior_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage.

    >>> states, mask, prior = torch.tensor([[[1.0]], [[5.0]]]), torch.ones(2, 1).long(), torch.tensor([[0.75, 0.25]])
    >>> pool_passages(AttentionPooling(1), states, mask, prior.log())[0].detach()
    tensor([[2.]])
    """
    batch_size, num_passages = log_prior_BK.shape
    num_tokens = states_NLD.shape[1]
    # a passage's probability is divided among its tokens, so that a long one does not count more
    share_BK1 = log_prior_BK[..., None] - mask_NL.view(batch_size, num_passages, -1).sum(dim=2, keepdim=True).log()
    prior_BX = share_BK1.expand(-1, -1, num_tokens).reshape(batch_size, -1)
    pooled_BD, weights_BX = pooling(
        states_NLD.reshape(batch_size, num_passages * num_tokens, -1), mask_NL.reshape(batch_size, -1), prior_BX
    )
    return pooled_BD, weights_BX.view(batch_size, num_passages, num_tokens)
