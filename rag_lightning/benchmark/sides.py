"""A training step of each side: forward, backward, gradients dropped; no optimiser, which is the same for all.

=================  ====================================================================================================
``ours``           what ``RagLightningModule.training_step`` runs: encode the questions, search, join ids from the
                   memory-mapped store, read, marginal, backward
``hf_rag``         transformers' RAG forward on contexts made ready beforehand and padded to ``max_combined_length``, as
                   its retriever pads them; its retrieval and its work on texts are left out, in its favour
``hf_rag_longest`` the same padded to the batch's longest, for information
``floor``          the bare question encoder, and the bare BART on contexts made ready beforehand and padded to the
                   longest: cross-entropy over every target position; no retrieval, no marginal
=================  ====================================================================================================
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rag_lightning.benchmark.world import World
from rag_lightning.errors import RagError
from rag_lightning.training.objectives import MarginalObjective, Sources

Kind = Literal["rag_token", "rag_sequence"]
Run = Callable[[int], Any]
Figures = dict[str, float]
_ENCODER_GRADIENT = "query encoder's gradient"

_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative, of losses and of the generator's gradients."""
_ENCODER_TOLERANCE = 0.2
"""Of the query encoder's: a random generator hardly minds which passage it reads, so its gradient is a small difference
of large numbers. The parity tests compare it exactly; a gradient that is missing or doubled is seen here."""


class WrongPathError(RagError, AssertionError):
    """Two sides that are to do the same work do not: nothing is timed."""


def ours_pass(world: World, kind: Kind) -> Run:
    """Returns forward and backward through the path that training takes."""
    objective = MarginalObjective(kind=kind)
    sources = Sources(world.assembler, world.retriever)

    def run(number: int) -> Tensor:
        with world.autocast():
            outcome = objective(world.model, world.batches[number % len(world.batches)], sources)
        loss = outcome.loss_B.sum()
        torch.autograd.backward(loss)
        return loss.detach()

    return run


def hf_pass(world: World, kind: Kind, *, to_longest: bool = False) -> Run:
    """Returns forward and backward through transformers' RAG model."""
    model = world.rag_token if kind == "rag_token" else world.rag_sequence

    def run(number: int) -> Tensor:
        batch = world.padded[number % len(world.padded)]
        contexts = batch.contexts if to_longest else batch.padded
        with world.autocast():
            queries_BD = model.question_encoder(batch.query.input_ids, attention_mask=batch.query.attention_mask)[0]
            scores_BK = torch.bmm(queries_BD.unsqueeze(1), batch.passages_BKD.transpose(1, 2)).squeeze(1)
            loss: Tensor = model(
                context_input_ids=contexts.input_ids,
                context_attention_mask=contexts.attention_mask,
                doc_scores=scores_BK,
                labels=batch.labels,
                reduce_loss=True,
            ).loss
        torch.autograd.backward(loss)
        return loss.detach()

    return run


def floor_pass(world: World) -> Run:
    """Returns forward and backward through the bare models."""
    encoder, generator = world.rag_token.question_encoder, world.rag_token.generator
    num_passages = world.shape.num_passages

    def run(number: int) -> Tensor:
        batch = world.padded[number % len(world.padded)]
        labels_NT1 = batch.labels.repeat_interleave(num_passages, dim=0)
        with world.autocast():
            queries_BD = encoder(batch.query.input_ids, attention_mask=batch.query.attention_mask)[0]
            logits_NTV = generator(
                input_ids=batch.contexts.input_ids,
                attention_mask=batch.contexts.attention_mask,
                decoder_input_ids=labels_NT1[:, :-1],
                use_cache=False,
            ).logits
            loss: Tensor = F.cross_entropy(logits_NTV.flatten(0, 1), labels_NT1[:, 1:].flatten())
        loss = loss + 1e-3 * queries_BD.float().square().mean()  # so that the encoder has a backward pass too
        torch.autograd.backward(loss)
        return loss.detach()

    return run


def training_step(world: World, run: Run) -> Run:
    """Returns a pass that drops its gradients, as a step does after the optimiser."""

    def step(number: int) -> Tensor:
        loss: Tensor = run(number)
        world.zero_gradients()
        return loss

    return step


def figures_of_pass(world: World, run: Run, number: int = 0) -> Figures:
    """Returns the loss of one pass and the norms of its gradients; leaves no gradient behind."""
    world.zero_gradients()
    loss = float(run(number))
    assert world.model.encoder is not None
    towers = {_ENCODER_GRADIENT: world.model.encoder.query, "generator's gradient": world.model.generator}
    norms = {
        name: sum(float(p.grad.float().square().sum()) for p in tower.parameters() if p.grad is not None) ** 0.5
        for name, tower in towers.items()
    }
    world.zero_gradients()
    return {"loss": loss, **norms}


def check_same(world: World, kind: Kind) -> Figures:
    """Compares loss and gradient norms of ours and of transformers' on one batch; returns ours.

    Raises:
        WrongPathError: They differ by more than rounding.
    """
    ours, theirs = figures_of_pass(world, ours_pass(world, kind)), figures_of_pass(world, hf_pass(world, kind))
    for name, value in ours.items():
        tolerance = _ENCODER_TOLERANCE if name == _ENCODER_GRADIENT else _TOLERANCE[world.shape.dtype]
        if not abs(value - theirs[name]) <= tolerance * abs(theirs[name]):
            raise WrongPathError(
                f"benchmark: expected the {name} of both sides to agree within {tolerance:g} of it in {kind}, came "
                f"{value:.6g} of ours and {theirs[name]:.6g} of transformers'. Nothing is timed: one of the paths is "
                "wrong. Run the parity tests."
            )
    return ours
