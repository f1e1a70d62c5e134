"""Answering a batch: ours and transformers' generate, the same beams, the same number of tokens, the answers compared.

Ours encodes the questions, searches, joins contexts, reads and decodes. transformers' side encodes the questions and
generates from contexts made ready beforehand, padded to ``max_combined_length``. No answer may end early, so both write
``max_new_tokens`` tokens. transformers' thorough search is given the contexts' mask, without which it attends to
padding.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.benchmark.sides import Kind, Run, WrongPathError
from rag_lightning.benchmark.world import World
from rag_lightning.decoding.options import DecodingMode, DecodingOptions
from rag_lightning.types import RagBatch

_WORSE = {"float32": 1e-3, "bfloat16": 5e-2}
"""How much less likely than theirs our answer may be, as a share of its log-likelihood: ties fall either way."""


def ours_answers(world: World, mode: DecodingMode) -> Run:
    """Returns what answers a batch our way: ``[B, T]`` tokens, start token first."""
    length = world.shape.max_new_tokens
    options = DecodingOptions(num_beams=world.shape.num_beams, max_new_tokens=length, min_new_tokens=length)

    @torch.no_grad()
    def run(number: int) -> Tensor:
        batch = world.batches[number % len(world.batches)]
        with world.autocast():
            texts = [question.question for question in batch.questions]
            hits, scores_BK = world.model.retrieve(batch.query, texts, world.retriever)
            contexts = world.assembler.contexts(hits.ids_BK, batch.prompt)
            encoded = world.model.generator.encode(contexts)
            return world.model.decode(encoded, scores_BK, decoding=mode, options=options).sequences_BT

    return run


def hf_answers(world: World, kind: Kind) -> Run:
    """Returns what answers a batch with transformers' RAG."""
    model = world.rag_token if kind == "rag_token" else world.rag_sequence
    shape = world.shape

    @torch.no_grad()
    def run(number: int) -> Tensor:
        batch = world.padded[number % len(world.padded)]
        with world.autocast(), _masked(world.rag_sequence.generator):
            queries_BD = model.question_encoder(batch.query.input_ids, attention_mask=batch.query.attention_mask)[0]
            scores_BK = torch.bmm(queries_BD.unsqueeze(1), batch.passages_BKD.transpose(1, 2)).squeeze(1)
            sequences: Tensor = model.generate(
                context_input_ids=batch.padded.input_ids,
                context_attention_mask=batch.padded.attention_mask,
                doc_scores=scores_BK,
                n_docs=shape.num_passages,
                num_beams=shape.num_beams,
                max_length=1 + shape.max_new_tokens,
                min_new_tokens=shape.max_new_tokens,
            )
        return sequences

    return run


def check_answers(world: World, kind: Kind, mode: DecodingMode) -> Callable[[], Mapping[str, Any]]:
    """Returns what compares both sides' answers to one batch, by their tokens and by their likelihoods.

    Raises (when called):
        WrongPathError: Answers of another length, or ours are less likely than theirs.
    """

    def check() -> Mapping[str, Any]:
        ours_BT, theirs_BT = ours_answers(world, mode)(0), hf_answers(world, kind)(0)
        lengths = {ours_BT.shape[1] - 1, theirs_BT.shape[1] - 1}
        if lengths != {world.shape.max_new_tokens}:
            raise WrongPathError(
                f"benchmark: expected {world.shape.max_new_tokens} new tokens of both sides in {mode}, came "
                f"{ours_BT.shape[1] - 1} of ours and {theirs_BT.shape[1] - 1} of transformers'. Nothing is timed."
            )
        mine_B, their_B = _likelihoods(world, kind, ours_BT), _likelihoods(world, kind, theirs_BT)
        shortfall = float(((their_B - mine_B) / their_B.abs()).max())
        if not shortfall <= _WORSE[world.shape.dtype]:
            raise WrongPathError(
                f"benchmark: expected our answers in {mode} to be as likely as transformers', came one whose "
                f"log-likelihood is lower by {shortfall:.3g} of it. Nothing is timed. Run the parity tests."
            )
        same = float((ours_BT == theirs_BT).all(dim=1).float().mean())
        return {"share of equal answers": same, "new tokens": world.shape.max_new_tokens}

    return check


@torch.no_grad()
def _likelihoods(world: World, kind: Kind, answers_BT: Int[Tensor, "B T1"]) -> Float[Tensor, "B"]:
    """Returns ``log p(y|x)`` of answers to the first batch."""
    batch = world.padded[0]
    queries_BD = world.rag_token.question_encoder(batch.query.input_ids, attention_mask=batch.query.attention_mask)[0]
    scores_BK = torch.einsum("bd,bkd->bk", queries_BD.float(), batch.passages_BKD)
    found = world.model.marginal(RagBatch(batch.contexts, scores_BK, answers_BT), objective=kind)
    return found.log_likelihood_B


@contextmanager
def _masked(generator: Any) -> Iterator[None]:
    """Gives transformers' search inside RAG-Sequence's generate the contexts' mask."""
    search, pad_id = generator.generate, generator.config.pad_token_id

    def generate(context_ids: Tensor, **options: Any) -> Any:
        return search(context_ids, **{**options, "attention_mask": context_ids.ne(pad_id).long()})

    generator.generate = generate
    try:
        yield
    finally:
        del generator.generate
