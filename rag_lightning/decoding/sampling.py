"""Answers drawn at random: from the model itself, or from its likeliest tokens only.

Inputs: B·K encoded contexts and the log prior of each question's K passages. Use it to estimate expectations under the
model (policy gradients, risk), for varied answers, and to look at what a model believes.

- *RAG-Token*: each token is drawn from the mixture ``Σ_k p(z_k|x) p(y_t|x,z_k,y_<t)``. Fusion-in-decoder is the same
  with one fused context.
- *RAG-Sequence*: a passage is drawn from the prior, then the whole answer from that passage alone, which is exact
  (ancestral) sampling of ``p(y|x) = Σ_k p(z_k|x) p(y|x,z_k)``. All passages read along, so that the marginal likelihood
  of the answer is known at its end.

At temperature 1, without truncation and rules, answers come as often as the model says, given that it writes no
padding: no target scores that, so no training makes it unlikely, and it is never drawn. Truncation: the k likeliest
tokens (Fan et al. 2018, "Hierarchical neural story generation"), the nucleus (Holtzman et al. 2020, "The curious case
of neural text degeneration", §3.1: the smallest set of tokens whose mass is at least p). Rules come first, then the
temperature, top-k, top-p, as in transformers.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rag_lightning.decoding.beam import mixture
from rag_lightning.decoding.constraints import NO_RULES, OutputRules, constrain, ended
from rag_lightning.decoding.first_step import FirstStep
from rag_lightning.decoding.options import Decoded, DecodingOptions, check_inputs, decoded_of
from rag_lightning.decoding.rag_sequence import best_of_each
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import DecoderState, EncodedContexts, Generator
from rag_lightning.types import TensorRecord

SamplingMode = Literal["rag_token", "rag_sequence", "fid"]


@dataclass(frozen=True)
class Samples(TensorRecord):
    """S answers drawn for each of B questions.

    Attributes:
        sequences_BST: Start token first, then the answer, its end token (unless the length ran out or a stop string
            came) and padding to ``1 + max_new_tokens``: the form of ``labels``.
        log_likelihood_BS: ``log p(y | x)`` under the model as it is, marginalised as the mode defines.
            As in ``labels``, positions that hold the padding id are not scored; neither is a forced first token.
            ``-inf`` where the rules left no token to draw.
        sampled_log_prob_BS: The log-probability of drawing the answer: under temperature, truncation and rules,
            marginalised likewise. Where there are none it is the likelihood, given that no padding is written.
    """

    sequences_BST: Int[Tensor, "B S T1"]
    log_likelihood_BS: Float[Tensor, "B S"]
    sampled_log_prob_BS: Float[Tensor, "B S"]


@torch.no_grad()
def sample(
    generator: Generator,
    encoded: EncodedContexts,
    doc_log_probs_BK: Float[Tensor, "B K"],
    options: DecodingOptions,
    *,
    mode: SamplingMode,
    num_samples: int,
    rng: torch.Generator,
    rules: OutputRules = NO_RULES,
) -> Samples:
    """Draws answers, independently of each other.

    The encoder does not run again. To train on the answers, score ``sequences_BST`` with gradient.

    Args:
        generator: Extends outputs; in evaluation mode.
        encoded: ``B * K`` contexts, passages of one question adjacent; for ``fid`` one fused context for each question.
        doc_log_probs_BK: ``log p(z_k | x)``; ``-inf`` for a missing passage.
        options: Temperature, truncation, lengths; beams, ``num_return`` and ``seed`` are not read.
        mode: ``rag_token``, ``rag_sequence`` or ``fid``.
        num_samples: S.
        rng: Where the random numbers come from; on any device.
        rules: What may be written, and where it stops.

    Raises:
        ConfigError: Contexts, prior, mode and options that do not fit together.
    """
    check_inputs(generator, encoded, doc_log_probs_BK, options)
    _check_request(mode, num_samples, doc_log_probs_BK.shape[1])
    prior_NK = doc_log_probs_BK.repeat_interleave(num_samples, dim=0)
    weights_NG = prior_NK if mode == "rag_sequence" else torch.zeros_like(prior_NK[:, :1])
    drawn_N1 = draw(weights_NG, rng)[:, None]
    log_probs_MV, state = _first_step(generator, encoded, doc_log_probs_BK, num_samples)
    sequences_NT = _bare(generator, prior_NK.shape[0], options.max_new_tokens, prior_NK.device)
    open_N = torch.ones_like(drawn_N1[:, 0], dtype=torch.bool)
    model_NG, drawing_NG = weights_NG, weights_NG
    for length in range(1, options.max_new_tokens + 1):
        sources_NGV = (
            log_probs_MV.view(*prior_NK.shape, -1) if mode == "rag_sequence" else mixture(log_probs_MV, prior_NK)
        )
        limited_NGV = _limited(sources_NGV, sequences_NT[:, :length], options, rules, generator)
        limited_NV = limited_NGV.take_along_dim(drawn_N1[..., None], dim=1)[:, 0]
        dead_N = open_N & limited_NV.isneginf().all(dim=1)
        open_N = open_N & ~dead_N
        tokens_N = draw(limited_NV, rng).masked_fill(~open_N, generator.pad_token_id)
        sequences_NT[:, length] = tokens_N
        counted_N = (tokens_N != generator.pad_token_id) & (length > 1 or options.forced_bos_token_id is None)
        model_NG = _with_token(model_NG, sources_NGV, tokens_N, counted_N, dead_N)
        drawing_NG = _with_token(drawing_NG, limited_NGV, tokens_N, counted_N, dead_N)
        open_N = open_N & ~ended(sequences_NT[:, : length + 1], options, rules, generator.eos_token_id)
        if not bool(open_N.any()):
            break
        log_probs_MV, state = generator.step(tokens_N.repeat_interleave(prior_NK.shape[1]), state)
    return _gathered(sequences_NT, model_NG, drawing_NG, num_samples, generator.pad_token_id)


def truncated(
    log_probs_NV: Float[Tensor, "N V"], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "N V"]:
    """Returns the log-distribution to draw from: sharpened or flattened, its tail cut off, renormalised.

    Args:
        log_probs_NV: Log-probabilities, or scores up to a constant; ``-inf`` where a token is forbidden.
        temperature: Divides them.
        top_k: Keeps the k likeliest, and all that are as likely as the k-th, as transformers does; 0 keeps all.
        top_p: Keeps the smallest set of likeliest tokens whose mass is at least this, one token at least. Taken after
            temperature and ``top_k``, on the renormalised rest. 1 keeps all.

    Returns:
        In float32 at least; a row that allows nothing stays ``-inf`` throughout.

    Raises:
        ConfigError: ``temperature <= 0``, ``top_k < 0``, or ``top_p`` not within (0, 1].

    >>> truncated(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.7).exp()
    tensor([[0.6250, 0.3750, 0.0000]])
    """
    DecodingOptions(sample=True, temperature=temperature, top_k=top_k, top_p=top_p)  # refuses what cannot be
    scores_NV = log_probs_NV if log_probs_NV.dtype == torch.float64 else log_probs_NV.float()
    scores_NV = scores_NV / temperature
    if 0 < top_k < scores_NV.shape[1]:
        least_N1 = scores_NV.topk(top_k, dim=1).values[:, -1:]
        scores_NV = scores_NV.masked_fill(scores_NV < least_N1, -torch.inf)
    if top_p < 1:
        probs_NV, order_NV = scores_NV.softmax(dim=1).sort(dim=1, descending=True, stable=True)
        mass_before_NV = torch.nn.functional.pad(probs_NV.cumsum(dim=1)[:, :-1], (1, 0))
        in_nucleus_NV = torch.zeros_like(probs_NV, dtype=torch.bool).scatter(1, order_NV, mass_before_NV < top_p)
        scores_NV = scores_NV.masked_fill(~in_nucleus_NV, -torch.inf)
    nothing_N1 = scores_NV.isneginf().all(dim=1, keepdim=True)
    return scores_NV.log_softmax(dim=1).masked_fill(nothing_N1, -torch.inf)


def draw(log_probs_NV: Float[Tensor, "N V"], rng: torch.Generator) -> Int[Tensor, "N"]:
    """Returns one index drawn from each row; 0 where a row has no probability at all.

    >>> draw(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]]), torch.Generator().manual_seed(0))
    tensor([0, 1])
    """
    probs_NV = log_probs_NV.exp()
    probs_NV[:, 0] += (probs_NV == 0).all(dim=1)
    return torch.multinomial(probs_NV.to(rng.device), 1, generator=rng)[:, 0].to(log_probs_NV.device)


def decoded_samples(samples: Samples, options: DecodingOptions, pad_token_id: int) -> Decoded:
    """Returns the distinct answers of each question, the likeliest first.

    Args:
        samples: What was drawn.
        options: How many are wanted: ``num_return``, or fewer where some were drawn twice.
        pad_token_id: Padding.
    """
    batch_size, num_samples, _ = samples.sequences_BST.shape
    questions_N1 = torch.arange(batch_size, device=samples.sequences_BST.device).repeat_interleave(num_samples)[:, None]
    keyed_NT = torch.cat([questions_N1, samples.sequences_BST.flatten(0, 1)], dim=1)
    keyed_UT, inverse_N = torch.unique(keyed_NT, dim=0, return_inverse=True)
    log_likelihood_U = samples.log_likelihood_BS.new_empty(keyed_UT.shape[0])
    log_likelihood_U[inverse_N] = samples.log_likelihood_BS.flatten()
    best_BR, there_BR = best_of_each(log_likelihood_U, keyed_UT[:, 0], batch_size, options.num_return)
    sequences_BRT = keyed_UT[:, 1:][best_BR]
    sequences_BRT[..., 1:] = sequences_BRT[..., 1:].masked_fill(~there_BR[..., None], pad_token_id)
    return decoded_of(
        sequences_BRT, log_likelihood_U[best_BR].masked_fill(~there_BR, -torch.inf), options, pad_token_id
    )


def _check_request(mode: str, num_samples: int, num_passages: int) -> None:
    if mode not in ("rag_token", "rag_sequence", "fid"):
        raise ConfigError(f"expected sampling mode rag_token, rag_sequence or fid, got {mode!r}")
    if mode == "fid" and num_passages != 1:
        raise ConfigError(
            f"sampling mode fid: expected one fused context for each question, got {num_passages}: pass "
            "encoded.fused(found) and a prior of one passage (zeros [B, 1])"
        )
    if num_samples < 1:
        raise ConfigError(f"expected num_samples >= 1, got {num_samples}")


def _first_step(
    generator: Generator, encoded: EncodedContexts, doc_log_probs_BK: Float[Tensor, "B K"], num_samples: int
) -> tuple[Float[Tensor, "M V"], DecoderState]:
    """Feeds the start token once for each context, then repeats the rows: question, sample, passage."""
    batch_size, num_passages = doc_log_probs_BK.shape
    contexts_BK = torch.arange(batch_size * num_passages, device=doc_log_probs_BK.device).view(batch_size, num_passages)
    return FirstStep.of(generator, encoded).rows(contexts_BK.repeat_interleave(num_samples, dim=0).flatten())


def _bare(generator: Generator, num_rows: int, max_new_tokens: int, device: torch.device) -> Int[Tensor, "N T1"]:
    sequences_NT = torch.full((num_rows, 1 + max_new_tokens), generator.pad_token_id, device=device)
    sequences_NT[:, 0] = generator.start_token_id
    return sequences_NT


def _limited(
    sources_NGV: Float[Tensor, "N G V"],
    prefixes_NT: Int[Tensor, "N T"],
    options: DecodingOptions,
    rules: OutputRules,
    generator: Generator,
) -> Float[Tensor, "N G V"]:
    """Returns what may be drawn: each source under rules, temperature and truncation, without padding."""
    prefixes_MT = prefixes_NT.repeat_interleave(sources_NGV.shape[1], dim=0)
    allowed_MV = constrain(sources_NGV.flatten(0, 1), prefixes_MT, options, generator.eos_token_id, rules)
    padding = torch.tensor([generator.pad_token_id], device=allowed_MV.device)
    allowed_MV = allowed_MV.index_fill(1, padding, -torch.inf)
    return truncated(allowed_MV, options.temperature, options.top_k, options.top_p).view_as(sources_NGV)


def _with_token(
    sums_NG: Float[Tensor, "N G"],
    log_probs_NGV: Float[Tensor, "N G V"],
    tokens_N: Int[Tensor, "N"],
    counted_N: Bool[Tensor, "N"],
    dead_N: Bool[Tensor, "N"],
) -> Float[Tensor, "N G"]:
    """Returns log-probabilities of the outputs with one token more."""
    token_NG = log_probs_NGV.take_along_dim(tokens_N[:, None, None], dim=2)[..., 0]
    token_NG = token_NG.masked_fill(~counted_N[:, None], 0.0)
    return (sums_NG + token_NG).masked_fill(dead_N[:, None], -torch.inf)


def _gathered(
    sequences_NT: Int[Tensor, "N T1"],
    model_NG: Float[Tensor, "N G"],
    drawing_NG: Float[Tensor, "N G"],
    num_samples: int,
    pad_token_id: int,
) -> Samples:
    """Sums the passages out; an output that could not go on is blanked."""
    dead_N1 = drawing_NG.isneginf().all(dim=1, keepdim=True)
    sequences_NT[:, 1:] = sequences_NT[:, 1:].masked_fill(dead_N1, pad_token_id)
    shape_BS = (-1, num_samples)
    return Samples(
        sequences_NT.view(*shape_BS, sequences_NT.shape[1]),
        model_NG.logsumexp(dim=1).view(shape_BS),
        drawing_NG.logsumexp(dim=1).view(shape_BS),
    )
