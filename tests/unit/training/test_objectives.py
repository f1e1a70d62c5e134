"""Objectives: what a batch is worth, against what the same numbers give when they are put together by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import similarity
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


QUESTIONS = [
    Question("a", "who made Amber", ("x",), ("film-0", "film-9"), None, ("film-5", "film-6")),
    Question("b", "who made Bridge", ("x",), ("film-1",), None, ("film-0", "film-7")),  # one is gold for the first
    Question("c", "who made Copper", ("x",), ("film-2",), None, ("film-6", "film-9")),  # so is one here
]


def negatives_batch(run, *, num_negatives=2, weights=(1.0, 1.0, 1.0)):
    examples = QuestionExamples(QUESTIONS, run.data.corpus, with_passage=True, num_negatives=num_negatives)
    drawn = [examples.draw(place, rng_at(1, place)) for place in range(3)]
    collate = Collator(run.module.model, assembler=run.data.assembler, passage_tokens=run.data._passage_tokens)
    return collate(drawn, list(weights)), drawn


def naive_contrastive(model, run, batch, drawn, temperature=0.1):
    """-log of the gold passage's share, question by question and passage by passage."""
    with torch.no_grad():
        vectors_ND = torch.cat(
            list(encode_passages(model.encoder, run.data._passage_tokens, range(24), progress=False))
        )
        queries_BD = [model.encoder.query(model.query_tokens([question.question]))[0] for question in QUESTIONS]
    real = [place for place, weight in enumerate(batch.weights_B.tolist()) if weight > 0]
    columns = [drawn[place].positive_row for place in real]
    columns += [row for place in real for row in drawn[place].negative_rows]
    losses = []
    for place, question in enumerate(QUESTIONS):
        gold = drawn[place].positive_row
        all_gold = {int(one.removeprefix("film-")) for one in question.positive_passage_ids}
        terms = [float(queries_BD[place] @ vectors_ND[gold])]
        terms += [float(queries_BD[place] @ vectors_ND[row]) for row in columns if row not in all_gold]
        losses.append(math.log(sum(math.exp((term - terms[0]) / temperature) for term in terms)))
    return [losses[place] for place in real]


def test_hard_negatives_of_all_are_contrasted_with_each_unless_they_are_gold_for_it(ready):
    run = ready(Contrastive(hard_negatives=2), optim={"train_passage_encoder": True})
    batch, drawn = negatives_batch(run)
    assert batch.negatives.input_ids.shape[0] == 6
    outcome = run.module.objective(run.module.model, batch, sources(run))
    assert outcome.loss_B.tolist() == pytest.approx(naive_contrastive(run.module.model, run, batch, drawn), rel=1e-4)
    harder = naive_contrastive(run.module.model, run, *negatives_batch(run))
    easier_batch, easier_drawn = negatives_batch(run, num_negatives=0)
    easier = naive_contrastive(run.module.model, run, easier_batch, easier_drawn)
    assert all(hard > easy for hard, easy in zip(harder, easier, strict=True))


def test_passages_of_a_filler_are_no_negatives(ready):
    run = ready(Contrastive(hard_negatives=2), optim={"train_passage_encoder": True})
    batch, drawn = negatives_batch(run, weights=(1.0, 0.0, 1.0))
    loss_B = run.module.objective(run.module.model, batch, sources(run)).loss_B
    expected = naive_contrastive(run.module.model, run, batch, drawn)
    assert loss_B[[0, 2]].tolist() == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(float(loss_B[1].detach()))  # 0 times it is 0


def test_another_gold_passage_of_a_question_is_no_negative_for_it(ready):
    """Only the gold passage drawn was once spared: another one of the same question was pushed away."""
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    both = [Question("a", "who made Amber", ("x",), ("film-0", "film-1")), QUESTIONS[1]]
    examples = QuestionExamples(both, run.data.corpus, with_passage=True)
    drawn = next(
        pair
        for pair in ([examples.draw(place, rng_at(seed)) for place in range(2)] for seed in range(20))
        if [example.positive_row for example in pair] == [0, 1]
    )
    with torch.no_grad():
        loss_B = run.module.objective(run.module.model, contrastive_batch(run, drawn), sources(run)).loss_B
    assert float(loss_B[0]) == 0.0  # nothing is left to contrast with
    assert float(loss_B[1]) > 0.0


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_the_similarity_that_is_trained_is_the_one_that_is_searched_by(metric, ready):
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    model = run.module.model
    batch = first_batch(run)
    model.settings = replace(model.settings, metric=metric)
    with torch.no_grad():
        loss_B = run.module.objective(model, batch, sources(run)).loss_B
        queries_BD, passages_ND = model.encoder.query(batch.query), model.encoder.passage(batch.passages)
        scores_BN = similarity(queries_BD, passages_ND.expand(4, -1, -1), metric) / 0.1
    torch.testing.assert_close(loss_B, -scores_BN.log_softmax(dim=1).diagonal(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_caching_changes_nothing(shared, ready, tiny_model):
    run = ready(Contrastive(hard_negatives=2), optim={"train_passage_encoder": True})
    model = tiny_model(shared=shared).double()  # so that only a wrong gradient differs
    batch, _ = negatives_batch(run)
    found = []
    for chunk in (None, 1, 2):
        model.zero_grad()
        outcome = Contrastive(hard_negatives=2, cache_chunk=chunk)(model, batch, sources(run))
        outcome.loss_B.sum().backward()
        gradients = [p.grad.clone() for p in model.encoder.parameters() if p.grad is not None]
        assert len(gradients) > (10 if shared else 20)
        found.append((outcome.loss_B.detach(), gradients))
    assert max(float(gradient.abs().max()) for gradient in found[0][1]) > 1e-3
    for loss_B, gradients in found[1:]:
        torch.testing.assert_close(loss_B, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])


def test_gradient_caching_encodes_a_chunk_at_a_time(ready):
    run = ready(Contrastive(hard_negatives=2, cache_chunk=2), optim={"train_passage_encoder": True})
    batch, _ = negatives_batch(run)
    sizes = []
    run.module.model.encoder.passage.register_forward_hook(lambda tower, tokens, output: sizes.append(len(output)))
    run.module.objective(run.module.model, batch, sources(run))
    assert sizes == [2, 1, 2, 2, 2]


def test_hard_negatives_that_did_not_come_are_missed(ready):
    run = ready(Contrastive(), optim={"train_passage_encoder": True})
    batch, _ = negatives_batch(run, num_negatives=1)
    message = r"contrastive: expected {} hard negatives for each question, as objective.hard_negatives says, came {}"
    with pytest.raises(DataError, match=message.format(0, 1)):
        run.module.objective(run.module.model, batch, sources(run))
    with pytest.raises(DataError, match=message.format(2, 0)):
        Contrastive(hard_negatives=2)(run.module.model, first_batch(run), sources(run))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_negatives": -1}, r"objective.hard_negatives: expected 0, or more .*got -1 with gold_passages"),
        ({"hard_negatives": 2, "examples": "denoising"}, r"examples=gold_passages .*got 2 with denoising"),
        ({"cache_chunk": 0}, r"objective.cache_chunk: expected at least 1 text at a time, or null, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Contrastive(**settings)


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
