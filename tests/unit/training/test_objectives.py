"""Objectives: what a batch is worth, against what the same numbers give when they are put together by hand."""

import math

import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.retrieval.encode import encode_passages
from rag_lightning.training.examples import Collator, InverseClozeExamples, QuestionExamples
from rag_lightning.training.objectives import ClosedBook, Contrastive, Denoising, MarginalObjective, Sources
from rag_lightning.types import Question
from rag_lightning.utils.seeding import rng_at


@pytest.fixture
def ready(tiny_run, tiny_model):
    """A run that is set up: its index is live, nothing has been trained."""

    def build(objective, **settings):
        run = tiny_run(model=tiny_model(num_passages=0 if isinstance(objective, ClosedBook) else 3),
                       objective=objective, **settings)  # fmt: skip
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.module.eval()
        return run

    return build


def first_batch(run):
    run.data.trainer = None
    loader = run.data.train_dataloader()
    return next(iter(loader))


def sources(run, *, reencode=False):
    return Sources(run.data.assembler, run.data.retriever, run.data.encoder_tokens if reencode else None)


def alone(model, context, labels_1T):
    """log p of each target token under one context."""
    output = model.generator.score(model.generator.encode(context), labels_1T, 1)
    return output.token_log_probs_BKT[0, 0][output.target_mask_BT[0]]


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence"])
@pytest.mark.parametrize("reencode", [False, True])
def test_marginal_objective_against_a_double_loop(kind, reencode, ready):
    run = ready(MarginalObjective(kind=kind), optim={"train_passage_encoder": True})
    model, batch = run.module.model, first_batch(run)
    with torch.no_grad():
        outcome = run.module.objective(model, batch, sources(run, reencode=reencode))
        tokens = run.data.encoder_tokens(torch.arange(24)[None])
        vectors_ND = model.encoder.passage_tower()(tokens)
        assert outcome.hits.ids_BK.shape == (4, 3)
        for row, question in enumerate(batch.questions):
            query_D = model.encoder.query(model.query_tokens([question.question]))[0]
            scores_N = vectors_ND @ query_D
            best = torch.topk(scores_N, 3)
            assert outcome.hits.ids_BK[row].tolist() == best.indices.tolist()
            prior_K = (best.values / 0.1).softmax(dim=0)
            per_passage = []
            for number in best.indices.tolist():
                passage = run.data.corpus[number]
                context = run.data.assembler.contexts_of([passage], model.prompt_tokens([question.question]))
                per_passage.append(alone(model, context, model.target_tokens([question.answers[0]])).exp())
            if kind == "rag_token":
                likelihood = math.prod(
                    sum(float(p * probs[t]) for p, probs in zip(prior_K, per_passage, strict=True))
                    for t in range(len(per_passage[0]))
                )
            else:
                likelihood = sum(float(p * probs.prod()) for p, probs in zip(prior_K, per_passage, strict=True))
            assert float(outcome.loss_B[row]) == pytest.approx(-math.log(likelihood), rel=1e-4)
            assert int(outcome.num_units_B[row]) == len(per_passage[0])


@pytest.mark.parametrize("reencode", [False, True])
def test_gradient_reaches_the_passage_tower_only_when_passages_are_encoded_again(reencode, ready):
    run = ready(MarginalObjective(kind="rag_token"), optim={"train_passage_encoder": True})
    outcome = run.module.objective(run.module.model, first_batch(run), sources(run, reencode=reencode))
    outcome.loss_B.sum().backward()
    encoder = run.module.model.encoder
    assert any(float(p.grad.abs().sum()) > 0 for p in encoder.query.parameters() if p.grad is not None)
    reached = any(float(p.grad.abs().sum()) > 0 for p in encoder.passage.parameters() if p.grad is not None)
    assert reached is reencode


def test_closed_book_reads_the_question_alone(ready):
    run = ready(ClosedBook())
    model, batch = run.module.model, first_batch(run)
    with torch.no_grad():
        outcome = run.module.objective(model, batch, sources(run))
        for row, question in enumerate(batch.questions):
            ids = model.generator.tokenizer(" // " + question.question, return_tensors="pt")
            context = type(batch.prompt)(ids["input_ids"], ids["attention_mask"])
            log_probs_T = alone(model, context, model.target_tokens([question.answers[0]]))
            assert float(outcome.loss_B[row]) == pytest.approx(-float(log_probs_T.sum()), rel=1e-5)
    assert outcome.hits is None
    assert batch.query is None


def test_denoising_reads_each_examples_own_passage(ready):
    run = ready(Denoising())
    model, batch = run.module.model, first_batch(run)
    with torch.no_grad():
        outcome = run.module.objective(model, batch, sources(run))
        for row in range(4):
            context = type(batch.contexts)(
                batch.contexts.input_ids[row : row + 1], batch.contexts.attention_mask[row : row + 1]
            )
            log_probs_T = alone(model, context, batch.labels[row : row + 1])
            assert float(outcome.loss_B[row]) == pytest.approx(-float(log_probs_T.sum()), rel=1e-5)
    retrieved = ready(MarginalObjective(kind="rag_token"))
    with pytest.raises(DataError, match="denoising: expected examples with their own passages"):
        run.module.objective(model, first_batch(retrieved), sources(run))


def test_label_smoothing_is_for_training_only(ready):
    run = ready(Denoising(label_smoothing=0.2))
    batch = first_batch(run)
    with torch.no_grad():
        evaluated = run.module.objective(run.module.model, batch, sources(run)).loss_B
        plain = Denoising()(run.module.model, batch, sources(run)).loss_B
        run.module.model.train()
        trained = run.module.objective(run.module.model, batch, sources(run)).loss_B
    torch.testing.assert_close(evaluated, plain)
    assert not torch.allclose(trained, plain)


@pytest.mark.parametrize("make", [MarginalObjective, ClosedBook, Denoising])
def test_label_smoothing_is_a_share(make):
    kind = {"kind": "rag_token"} if make is MarginalObjective else {}
    with pytest.raises(ConfigError, match="objective.label_smoothing: expected 0 <= ε < 1, got 1.0"):
        make(label_smoothing=1.0, **kind)


def contrastive_batch(run, examples):
    collate = Collator(run.module.model, assembler=run.data.assembler, passage_tokens=run.data._passage_tokens)
    return collate(examples, [1.0] * len(examples))


def test_contrastive_ignores_a_passage_that_is_gold_for_both(ready):
    """Two questions of a batch with one gold passage: neither is a negative of the other."""
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    model, corpus = run.module.model, run.data.corpus
    questions = [
        Question("a", "who made Amber", ("x",), ("film-0",)),
        Question("b", "when did Amber come out", ("x",), ("film-0",)),
        Question("c", "who made Bridge", ("x",), ("film-1",)),
    ]
    examples = QuestionExamples(questions, corpus, with_passage=True)
    batch = contrastive_batch(run, [examples.draw(place, rng_at(0)) for place in range(3)])
    with torch.no_grad():
        loss_B = run.module.objective(model, batch, sources(run)).loss_B
        queries = [model.encoder.query(model.query_tokens([q.question]))[0] for q in questions]
        blocks = encode_passages(model.encoder, run.data._passage_tokens, range(2), progress=False)
        amber, bridge = torch.cat(list(blocks))
    for row, (query, gold, negative) in enumerate(
        [(queries[0], amber, bridge), (queries[1], amber, bridge)]
    ):  # one negative each: not the other's copy of Amber
        margin = float((query @ gold - query @ negative) / 0.1)
        assert float(loss_B[row]) == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-4)
    good, bad = float(queries[2] @ bridge / 0.1), float(queries[2] @ amber / 0.1)
    assert float(loss_B[2]) == pytest.approx(-math.log(math.exp(good) / (math.exp(good) + 2 * math.exp(bad))), rel=1e-4)


def test_an_odd_last_example_teaches_nothing_and_stops_nothing(ready):
    """33 examples in batches of 32 once ended the first epoch with an error."""
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    examples = InverseClozeExamples(run.data.corpus)
    outcome = run.module.objective(
        run.module.model, contrastive_batch(run, [examples.draw(0, rng_at(0))]), sources(run)
    )
    outcome.loss_B.sum().backward()
    assert outcome.loss_B.tolist() == [0.0]
    gradients = [p.grad for p in run.module.model.encoder.parameters() if p.grad is not None]
    assert gradients  # every process has some, so that none waits
    assert all(float(gradient.abs().max()) == 0.0 for gradient in gradients)


def test_contrastive_only_retrieves_in_evaluation(ready):
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    batch = first_batch(ready(MarginalObjective(kind="rag_token")))
    outcome = run.module.objective(run.module.model, batch, sources(run))
    assert outcome.hits.ids_BK.shape == (4, 3)
    assert outcome.marginal is None
    with pytest.raises(DataError, match="contrastive: expected examples with their own passages"):
        run.module.objective(run.module.model, batch, Sources(run.data.assembler))


def test_objectives_ask_for_what_they_miss(ready, tiny_model):
    run = ready(ClosedBook())
    batch = first_batch(run)
    with pytest.raises(ConfigError, match="objective rag_token: expected a retriever, came none"):
        MarginalObjective(kind="rag_token")(tiny_model(), batch, sources(run))
    with pytest.raises(ConfigError, match="contrastive: expected a model with an encoder"):
        Contrastive()(run.module.model, batch, sources(run))
