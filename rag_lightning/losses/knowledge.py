"""Knowledge distillation of a generator: the student follows the teacher's whole distribution, not its best token.

Inputs: what teacher and student say of the next target token, each over the same vocabulary. Assumption: the teacher is
a constant; only the student's side has gradient.

- :func:`predictive_log_probs`: ``log p(v | x, y_<t)`` of a reader of K passages, so that models that read different
  passages, or none, can be compared at all.
- :func:`soft_target_kl`: ``T² KL`` between both at temperature T (Hinton et al. 2015, "Distilling the knowledge in a
  neural network", §2); per position, word-level distillation in the words of Kim and Rush 2016, §3.1.
- :func:`coarsen`: the teacher's n likeliest tokens and one event for all the others, for targets that are kept on disk.

Sequence-level distillation (Kim and Rush 2016, §3.2) needs no loss of its own: the teacher's answers are the targets of
the usual one (``data.answers_from``). What teaches the retriever is in :mod:`rag_lightning.losses.distillation`.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.losses.distillation import KlDirection
from rag_lightning.losses.marginal import at_least_float32


def predictive_log_probs(
    logits_BRTV: Float[Tensor, "B R T V"],
    doc_log_probs_BR: Float[Tensor, "B R"],
    targets_BT: Int[Tensor, "B T"],
    target_mask_BT: Bool[Tensor, "B T"],
    sequence: bool,
) -> Float[Tensor, "S V"]:
    """Returns ``log p(v | x, y_<t)`` at each scored position, in float32 at least: the passages summed out.

    RAG-Token mixes the readings by the prior, ``Σ_k p(z_k|x) p(v|x,z_k,y_<t)``. RAG-Sequence has one passage for the
    whole answer, so what was already said tells which: it mixes by the running posterior ``p(z_k|x,y_<t)``. Both are
    exact: the product over t at the targets is the likelihood of :mod:`rag_lightning.losses.marginal`. A reader of all
    passages at once, or of none, has one reading (R = 1), and the prior is ``log 1``.

    Args:
        logits_BRTV: The decoder's, under each reading.
        doc_log_probs_BR: ``log p(z_k|x)``; ``-inf`` for a missing passage.
        targets_BT: Target tokens, any id where unscored.
        target_mask_BT: True on scored positions.
        sequence: RAG-Sequence's mixture, not RAG-Token's.

    Raises:
        ValueError: Shapes that would broadcast.

    >>> logits = torch.log(torch.tensor([[[[0.9, 0.1]] * 2, [[0.1, 0.9]] * 2]]))
    >>> prior, targets, mask = torch.log(torch.tensor([[0.5, 0.5]])), torch.tensor([[0, 0]]), torch.tensor([[True] * 2])
    >>> predictive_log_probs(logits, prior, targets, mask, sequence=True).exp()  # the first token spoke for passage 1
    tensor([[0.5000, 0.5000],
            [0.8200, 0.1800]])
    """
    num_questions, num_readings, num_tokens, vocab_size = logits_BRTV.shape
    expected = ((num_questions, num_readings), (num_questions, num_tokens), (num_questions, num_tokens))
    came = tuple(tuple(tensor.shape) for tensor in (doc_log_probs_BR, targets_BT, target_mask_BT))
    if came != expected:
        raise ValueError(f"expected prior [B, R], targets [B, T] and mask [B, T] = {expected}, got {came}")
    with torch.autocast(logits_BRTV.device.type, enabled=False):
        weights_BRT = at_least_float32(doc_log_probs_BR)[:, :, None].expand(-1, -1, num_tokens)
        places = target_mask_BT.nonzero(as_tuple=True)
        # by row numbers: the gradient of plain indexing is summed up element by element, at twice the time
        first_S1 = (places[0] * num_readings * num_tokens + places[1])[:, None]
        rows_SR = first_S1 + num_tokens * torch.arange(num_readings, device=logits_BRTV.device)
        chosen_NV = logits_BRTV.reshape(-1, vocab_size).index_select(0, rows_SR.flatten())
        log_probs_SRV = at_least_float32(chosen_NV).view(*rows_SR.shape, vocab_size).log_softmax(dim=-1)
        if num_readings == 1:
            return log_probs_SRV[:, 0]
        if sequence:
            index_SR1 = targets_BT[places][:, None, None].expand(-1, num_readings, 1)
            said_BTR = log_probs_SRV.new_zeros(num_questions, num_tokens, num_readings)
            said_BTR = said_BTR.index_put(places, log_probs_SRV.gather(2, index_SR1).squeeze(2))
            before_BTR = torch.nn.functional.pad(said_BTR, (0, 0, 1, 0))[:, :-1].cumsum(dim=1)
            weights_BRT = (weights_BRT + before_BTR.transpose(1, 2)).log_softmax(dim=1)
        weights_SR = weights_BRT.transpose(1, 2)[places]
        return torch.logsumexp(log_probs_SRV + weights_SR[..., None], dim=1)


def tempered(log_probs: Float[Tensor, "... V"], temperature: float) -> Float[Tensor, "... V"]:
    """Returns ``log softmax(log p / T)``, in float32 at least: a flatter distribution for T above 1.

    For the softmax of one decoder this is Hinton's ``softmax(logits / T)``; a mixture has no logits, and its log
    probabilities stand for them.

    Raises:
        ValueError: ``temperature`` is not positive.

    >>> tempered(torch.log(torch.tensor([0.8, 0.2])), 2.0).exp()
    tensor([0.6667, 0.3333])
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    with torch.autocast(log_probs.device.type, enabled=False):
        return (at_least_float32(log_probs) / temperature).log_softmax(dim=-1)


def coarsen(log_probs_SV: Float[Tensor, "S V"], ids_SN: Int[Tensor, "S n"]) -> Float[Tensor, "S E"]:
    """Returns the log probabilities of n tokens, and behind them that of all the others together, ``E = n + 1``.

    Merging events can only lower a divergence, and lowers it little where the tokens left out are unlikely; so a
    divergence over these E is defined, and a lower bound of the whole one.

    Args:
        log_probs_SV: Distributions over the vocabulary.
        ids_SN: Distinct tokens of each position, fewer than the vocabulary has.

    >>> coarsen(torch.log(torch.tensor([[0.5, 0.2, 0.3]])), torch.tensor([[0]])).exp()
    tensor([[0.5000, 0.5000]])
    """
    rest_S1 = log_probs_SV.scatter(1, ids_SN, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.cat([log_probs_SV.gather(1, ids_SN), rest_S1], dim=1)


def divergence(
    log_target_SE: Float[Tensor, "S E"], log_probs_SE: Float[Tensor, "S E"], direction: KlDirection
) -> Float[Tensor, "S"]:
    """Returns ``KL(target ‖ student)`` (forward) or ``KL(student ‖ target)`` (reverse) at each position.

    ``0 log 0`` is 0; what one side excludes and the other says costs infinity, as it must.

    Raises:
        ValueError: Shapes that would broadcast.

    >>> target = torch.log(torch.tensor([[0.75, 0.25]]))
    >>> divergence(target, torch.log(torch.tensor([[0.5, 0.5]])), "forward")
    tensor([0.1308])
    """
    if log_target_SE.shape != log_probs_SE.shape:
        raise ValueError(
            f"expected targets and log probabilities of one shape [S, E], got {tuple(log_target_SE.shape)} and "
            f"{tuple(log_probs_SE.shape)}"
        )
    log_target_SE, log_probs_SE = at_least_float32(log_target_SE.detach()), at_least_float32(log_probs_SE)
    log_p, log_q = (log_target_SE, log_probs_SE) if direction == "forward" else (log_probs_SE, log_target_SE)
    never = log_p == -torch.inf
    log_p, log_q = log_p.masked_fill(never, 0.0), log_q.masked_fill(never, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(never, 0.0).sum(dim=1)


def soft_target_kl(
    log_target_SE: Float[Tensor, "S E"],
    log_probs_SV: Float[Tensor, "S V"],
    target_mask_BT: Bool[Tensor, "B T"],
    temperature: float = 1.0,
    direction: KlDirection = "forward",
    ids_SN: Int[Tensor, "S n"] | None = None,
) -> Float[Tensor, "B"]:
    """Returns ``T² Σ_t KL`` of both distributions at temperature T, one sum for each answer (Hinton et al. 2015, §2).

    The gradient of the divergence falls with T²; times T² its weight against the hard targets stays as it was.

    Args:
        log_target_SE: The teacher's :func:`predictive_log_probs`, :func:`tempered` with the same T and then, where
            ``ids_SN`` is given, :func:`coarsen`-ed; a constant.
        log_probs_SV: The student's :func:`predictive_log_probs` as they are.
        target_mask_BT: Which positions are scored.
        temperature: Above 1 shows more of what the teacher holds unlikely.
        direction: ``forward`` is ``KL(teacher ‖ student)``, which wants everything that the teacher may say likely;
            ``reverse`` wants nothing likely that the teacher would not say.
        ids_SN: The tokens that the teacher's events are; None for the whole vocabulary.

    Raises:
        ValueError: ``temperature`` is not positive, or shapes that would broadcast.

    >>> teacher, student = (torch.log(torch.tensor([[p, 1 - p]])) for p in (0.75, 0.5))
    >>> soft_target_kl(teacher, student, torch.tensor([[True]]))
    tensor([0.1308])
    """
    log_probs_SE = tempered(log_probs_SV, temperature)
    if ids_SN is not None:
        log_probs_SE = coarsen(log_probs_SE, ids_SN)
    each_S = divergence(log_target_SE, log_probs_SE, direction)
    rows_S = target_mask_BT.nonzero()[:, 0]
    if rows_S.shape != each_S.shape:
        raise ValueError(f"expected {rows_S.shape[0]} scored positions, as the mask has, got {each_S.shape[0]}")
    return temperature**2 * each_S.new_zeros(target_mask_BT.shape[0]).index_add(0, rows_S, each_S)
