"""The retriever's losses inside the objective: values put together by hand, and which part each of them moves."""

import math
from dataclasses import replace

import pytest
import torch

from rag_lightning.errors import ConfigError
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.null import NullPassage
from rag_lightning.training.objectives import (
    AttentionDistillation,
    CrossEncoderDistillation,
    Emdr2,
    InBatchContrastive,
    LeaveOneOut,
    MarginalObjective,
    Objective,
    PerplexityDistillation,
    Sources,
)
from rag_lightning.training.objectives.retriever_losses import Reading, RetrieverLoss
from rag_lightning.types import TokenBatch
from tests.unit.losses.test_distillation import softmax

ENCODER_ONLY = {"marginal_weight": 0.0, "teaches_retriever": False}


@pytest.fixture
def ready(tiny_run):
    """Returns ``ready(objective)``: a run with a live index whose passage tower learns, and its first batch."""

    def build(objective):
        run = tiny_run(objective=objective, optim={"train_passage_encoder": True})
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.data.trainer = None
        run.module.eval()
        return run, next(iter(run.data.train_dataloader()))

    return build


def outcome_of(run, batch):
    return run.module.objective(
        run.module.model, batch, Sources(run.data.assembler, run.data.retriever, run.data.encoder_tokens)
    )


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_terms_and_weights_are_added_up(per_token, direction, ready):
    losses = {
        "pdist": PerplexityDistillation(weight=0.5, temperature=0.3, per_token=per_token, direction=direction),
        "emdr2": Emdr2(weight=2.0),
    }
    run, batch = ready(MarginalObjective(kind="rag_token", marginal_weight=0.25, retriever_losses=losses))
    with torch.no_grad():
        outcome = outcome_of(run, batch)
    marginal = outcome.marginal
    prior_BK = marginal.log_prior_BK.exp().tolist()
    for row, prior in enumerate(prior_BK):
        likelihoods = marginal.passage_log_likelihood_BK[row].tolist()
        length = int(marginal.num_tokens_B[row]) if per_token else 1
        target = softmax([value / length for value in likelihoods], 0.3)
        p, q = (target, prior) if direction == "forward" else (prior, target)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        sequence = -math.log(sum(a * math.exp(b) for a, b in zip(prior, likelihoods, strict=True)))
        assert float(outcome.terms["pdist"][row]) == pytest.approx(divergence, abs=1e-5)
        assert float(outcome.terms["emdr2"][row]) == pytest.approx(sequence, rel=1e-5)
        expected = 0.25 * float(marginal.nll_B[row]) + 0.5 * divergence + 2.0 * sequence
        assert float(outcome.loss_B[row]) == pytest.approx(expected, rel=1e-4)
    assert set(outcome.terms) == {"nll", "pdist", "emdr2"}


FLOW = [
    # objective's settings, parts that its gradient reaches
    ({}, {"query", "passage", "generator"}),
    ({"teaches_retriever": False}, {"generator"}),
    (
        {"teaches_retriever": False, "retriever_losses": {"a": PerplexityDistillation()}},
        {"query", "passage", "generator"},
    ),
    ({**ENCODER_ONLY, "retriever_losses": {"a": PerplexityDistillation()}}, {"query", "passage"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": PerplexityDistillation(direction="reverse")}}, {"query", "passage"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": LeaveOneOut()}}, {"query", "passage"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": Emdr2()}}, {"query", "passage"}),
    ({"marginal_weight": 0.0, "retriever_losses": {"a": Emdr2()}}, {"query", "passage"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": InBatchContrastive()}}, {"query", "passage"}),
    (
        {"teaches_retriever": False, "retriever_losses": {"a": InBatchContrastive()}},
        {"query", "passage", "generator"},
    ),
]


FID_FLOW = [
    ({}, {"generator"}),
    ({"retriever_losses": {"a": PerplexityDistillation()}}, {"query", "passage", "generator"}),
    ({"retriever_losses": {"a": LeaveOneOut(), "b": Emdr2()}}, {"query", "passage", "generator"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": LeaveOneOut()}}, {"query", "passage"}),
    ({"retriever_losses": {"a": AttentionDistillation()}}, {"query", "passage", "generator"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": AttentionDistillation()}}, {"query", "passage"}),
    ({"retriever_losses": {"a": InBatchContrastive()}}, {"query", "passage", "generator"}),
    ({**ENCODER_ONLY, "retriever_losses": {"a": InBatchContrastive()}}, {"query", "passage"}),
]


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [(kind, *row) for kind in ("rag_token", "rag_sequence") for row in FLOW] + [("fid", *row) for row in FID_FLOW],
)
def test_which_part_an_objective_moves(settings, expected, kind, ready):
    objective = MarginalObjective(kind=kind, **settings)
    run, batch = ready(objective)
    model = run.module.model.requires_grad_(True)
    outcome_of(run, batch).loss_B.sum().backward()
    parts = {"query": model.encoder.query, "passage": model.encoder.passage, "generator": model.generator}
    moved = {
        name
        for name, part in parts.items()
        if any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())
    }
    assert moved == expected
    named = {"query": "query_encoder", "passage": "passage_encoder", "generator": "generator"}
    assert {*objective.trains} - {"fusion"} == {named[name] for name in expected}


@pytest.mark.parametrize("missing", [False, True])
def test_fusion_in_decoder_reads_all_passages_at_once(missing, ready):
    """Against transformers' own forward over encoder states joined by hand: all, each alone, all without each."""
    run, batch = ready(MarginalObjective(kind="fid", retriever_losses={"loop": LeaveOneOut(per_token=False)}))
    model, seen = run.module.model, []
    bart, retrieve, term = model.generator.model, model.retrieve, run.module.objective.retriever_losses["loop"]

    def one_less(*arguments, **named):
        hits, scores_BK = retrieve(*arguments, **named)
        scores_BK = scores_BK.clone()
        scores_BK[0, -1] = -torch.inf
        return hits, scores_BK

    def watched(reading):
        seen.append(reading)
        return term(reading)

    watched.weight, watched.needs = 1.0, ("without",)
    run.module.objective.retriever_losses["loop"] = watched
    if missing:
        model.retrieve = one_less
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        hidden_NLH, mask_NL = outcome.encoded.hidden_NLH, outcome.encoded.attention_mask_NL
        for row in range(4):
            labels = batch.labels[row : row + 1]
            kept = [3 * row, 3 * row + 1] + ([] if missing and row == 0 else [3 * row + 2])

            def by_hand(places, labels=labels):
                states = torch.cat([hidden_NLH[place][mask_NL[place].bool()] for place in places])[None]
                logits = bart(
                    encoder_outputs=(states,),
                    attention_mask=torch.ones(1, states.shape[1], dtype=torch.long),
                    decoder_input_ids=labels[:, :-1],
                ).logits
                log_probs = logits.log_softmax(-1).gather(2, labels[:, 1:, None])[0, :, 0]
                return float(log_probs[labels[0, 1:] != model.generator.pad_token_id].sum())

            assert float(outcome.marginal.log_likelihood_B[row]) == pytest.approx(by_hand(kept), rel=1e-4)
            for place in kept:
                alone = float(outcome.marginal.passage_log_likelihood_BK[row, place - 3 * row])
                assert alone == pytest.approx(by_hand([place]), rel=1e-4)
                without = float(seen[0].without_BK[row, place - 3 * row])
                assert without == pytest.approx(by_hand([other for other in kept if other != place]), rel=1e-4)


def test_a_run_of_fusion_in_decoder_trains_answers_and_is_saved(tiny_run, tiny_model, tiny_world, tmp_path):
    model = tiny_model()
    model.settings = replace(model.settings, objective="fid", decoding="fid")
    objective = MarginalObjective(kind="fid", retriever_losses={"pdist": PerplexityDistillation()})
    run = tiny_run(model=model, objective=objective, data={"test": str(tiny_world.test)}, max_steps=2).fit()
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert 0 <= figures["test/exact_match"] <= 1
    predictions = model.eval().generate(["who made Amber"], retriever=run.data.retriever)
    model.save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert again.generate(["who made Amber"], retriever=run.data.retriever) == predictions
    # one passage is read the same however reading is called
    single = model.generate(["who made Amber"], retriever=run.data.retriever, num_passages=1)
    assert single[0].answer == model.generate(
        ["who made Amber"], retriever=run.data.retriever, num_passages=1, decoding="rag_token"
    )[0].answer  # fmt: skip


def test_emdr2_teaches_the_retriever_as_rag_sequence_does(ready):
    gradients = []
    for settings in ({}, {**ENCODER_ONLY, "retriever_losses": {"emdr2": Emdr2()}}):
        run, batch = ready(MarginalObjective(kind="rag_sequence", **settings))
        outcome_of(run, batch).loss_B.sum().backward()
        gradients.append([p.grad.clone() for p in run.module.model.encoder.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_leaving_one_out_prefers_what_is_missed():
    likelihoods = torch.log(torch.tensor([[0.9, 0.1, 0.1]]))
    scores = torch.zeros(1, 3, requires_grad=True)
    reading = Reading(likelihoods, torch.tensor([2]), doc_log_prior(scores))
    LeaveOneOut(temperature=0.5)(reading).sum().backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]


def test_training_lowers_and_logs_each_term(tiny_run):
    losses = {"pdist": PerplexityDistillation()}
    objective = MarginalObjective(kind="rag_token", teaches_retriever=False, retriever_losses=losses)
    assert isinstance(objective, Objective)
    assert isinstance(losses["pdist"], RetrieverLoss)
    run = tiny_run(objective=objective, max_steps=3).fit()
    assert {"train/pdist", "train/nll", "train/loss"} <= set(run.trainer.callback_metrics)
    figures = run.trainer.callback_metrics
    assert float(figures["train/loss"]) == pytest.approx(float(figures["train/nll"] + figures["train/pdist"]), rel=1e-5)


def test_attention_distillation_goes_by_what_is_taken_from_each_passage(ready):
    losses = {"adist": AttentionDistillation(temperature=0.05)}
    run, batch = ready(MarginalObjective(kind="fid", retriever_losses=losses))
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        generator, encoded = run.module.model.generator, outcome.encoded
        prior_BK = outcome.marginal.log_prior_BK.exp()
        attention_BL = generator.attention(encoded.fused(prior_BK > 0), batch.labels)
    width = encoded.hidden_NLH.shape[1]
    for row in range(4):
        useful = []
        for place in range(3):
            mask = encoded.attention_mask_NL[3 * row + place].bool()
            useful.append(float(attention_BL[row, place * width : (place + 1) * width][mask].mean()))
        target, prior = softmax(useful, 0.05), prior_BK[row].tolist()
        divergence = sum(a * math.log(a / b) for a, b in zip(target, prior, strict=True))
        assert float(outcome.terms["adist"][row]) == pytest.approx(divergence, abs=1e-5)
    with pytest.raises(
        ConfigError, match="objective rag_token: attention distillation needs .* expected objective=fid"
    ):
        MarginalObjective(kind="rag_token", retriever_losses=losses)


def test_the_retriever_follows_a_cross_encoder(ready):
    class ByLength:
        """Likes long passages; stands for a model that reads pairs."""

        def score(self, questions, passages, *, batch_size=32):
            asked.extend(zip(questions, passages, strict=True))
            return torch.tensor([float(len(passage.text)) for passage in passages])

    asked = []
    loss = CrossEncoderDistillation(cross_encoder=ByLength(), temperature=7.0)
    run, batch = ready(MarginalObjective(kind="rag_token", **ENCODER_ONLY, retriever_losses={"ce": loss}))
    outcome = outcome_of(run, batch)
    evidence = run.data.retriever.evidence(outcome.hits).passages
    assert asked == [
        (question.question, passage) for question, row in zip(batch.questions, evidence, strict=True) for passage in row
    ]
    for row in range(4):
        target = softmax([len(passage.text) for passage in evidence[row]], 7.0)
        prior = outcome.marginal.log_prior_BK[row].exp().tolist()
        divergence = sum(a * math.log(a / b) for a, b in zip(target, prior, strict=True))
        assert float(outcome.terms["ce"][row].detach()) == pytest.approx(divergence, abs=1e-5)
    outcome.loss_B.sum().backward()
    assert all(p.grad is None for p in run.module.model.generator.parameters())
    assert any(p.grad is not None for p in run.module.model.encoder.parameters())


def test_what_would_teach_nothing_is_refused(tiny_run):
    frozen = {"train_query_encoder": False, "train_passage_encoder": False}
    objective = MarginalObjective(kind="rag_token", retriever_losses={"pdist": PerplexityDistillation()})
    with pytest.raises(
        ConfigError, match="retriever_loss: pdist would teach nothing, as no part of the retriever learns"
    ):
        tiny_run(objective=objective, optim=frozen)
    with pytest.raises(ConfigError, match="marginal_weight=0 without retriever_losses teaches nothing"):
        MarginalObjective(kind="rag_token", marginal_weight=0.0)
    with pytest.raises(ConfigError, match="marginal_weight: expected 0 or more, got -1"):
        MarginalObjective(kind="rag_token", marginal_weight=-1.0)
    for made in (PerplexityDistillation, LeaveOneOut, AttentionDistillation):
        with pytest.raises(ConfigError, match=rf"{made.__name__}: expected a temperature above 0, got 0"):
            made(temperature=0.0)
    with pytest.raises(ConfigError, match="Emdr2: expected a weight above 0, got -1"):
        Emdr2(weight=-1.0)


# ---------------------------------------------------------------------- contrasting beside a reader


def naive_contrastive(model, corpus, batch, hits, gold):
    """The loss of each question by plain loops over texts: other gold passages, and own hits that are not gold."""
    tower, tokenizer = model.encoder.passage_tower(), model.encoder.tokenizer

    def vector(text, encode):
        tokens = tokenizer([text], return_tensors="pt")
        return encode(TokenBatch(tokens["input_ids"], tokens["attention_mask"]))[0].double()

    def score(question, row):
        one, other = vector(question.question, model.encoder.query), vector(text_of(row), tower)
        value = -(one - other).square().sum() if model.settings.metric == "l2" else (one * other).sum()
        return float(value) / model.settings.temperature

    def text_of(row):
        return model.encoder.passage_text(corpus[row])

    losses = []
    for place, question in enumerate(batch.questions):
        if gold[place] < 0:
            losses.append(0.0)
            continue
        own = {corpus.row_of(passage_id) for passage_id in question.positive_passage_ids}
        columns = [row for row in gold if row >= 0 and row not in own]
        columns += [row for row in hits.ids_BK[place].tolist() if row >= 0 and row not in own and row not in gold]
        scores = [score(question, gold[place]), *(score(question, row) for row in columns)]
        losses.append(math.log(sum(math.exp(value - scores[0]) for value in scores)))
    return losses


@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("reencodes", [True, False])
@pytest.mark.parametrize("kind", ["rag_token", "fid"])
def test_contrasting_equals_plain_loops(kind, reencodes, metric, ready):
    objective = MarginalObjective(kind=kind, retriever_losses={"contrastive": InBatchContrastive(weight=0.5)})
    run, batch = ready(objective)
    model, corpus = run.module.model, run.data.corpus
    model.settings = replace(model.settings, metric=metric)
    gold = batch.positive_ids.tolist()
    # the second question shares the first one's gold passage, the last one knows none
    questions = list(batch.questions)
    both = (questions[1].positive_passage_ids[0], questions[0].positive_passage_ids[0])
    questions[1] = replace(questions[1], positive_passage_ids=both)
    questions[3] = replace(questions[3], positive_passage_ids=())
    gold[3] = -1
    batch = replace(batch, questions=tuple(questions), positive_ids=torch.tensor(gold))
    reencode = run.data.encoder_tokens if reencodes else None
    outcome = objective(model, batch, Sources(run.data.assembler, run.data.retriever, reencode))
    with torch.no_grad():
        expected = naive_contrastive(model, corpus, batch, outcome.hits, gold)
    assert outcome.terms["contrastive"].tolist() == pytest.approx(expected, abs=1e-4)
    assert expected[3] == 0.0
    torch.testing.assert_close(outcome.loss_B, outcome.terms["nll"] + 0.5 * outcome.terms["contrastive"])
    outcome.terms["contrastive"].sum().backward()
    for tower, moves in ((model.encoder.query, True), (model.encoder.passage, reencodes)):
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in tower.parameters()) == moves
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in tower.parameters())


def test_questions_are_encoded_once(ready):
    run, batch = ready(MarginalObjective(kind="rag_token", retriever_losses={"contrastive": InBatchContrastive()}))
    tower, calls = run.module.model.encoder.query, []
    tower.register_forward_hook(lambda *_: calls.append(1))
    outcome_of(run, batch)
    assert len(calls) == 1


def test_without_gold_passages_contrasting_is_nothing_and_says_so_once(ready, caplog):
    run, batch = ready(MarginalObjective(kind="rag_token", retriever_losses={"contrastive": InBatchContrastive()}))
    bare = tuple(replace(question, positive_passage_ids=()) for question in batch.questions)
    batch = replace(batch, questions=bare, positive_ids=torch.full((4,), -1))
    for _ in range(2):
        outcome = outcome_of(run, batch)
        assert outcome.terms["contrastive"].tolist() == [0.0] * 4
    outcome.terms["contrastive"].sum().backward()
    grads = [p.grad for p in run.module.model.encoder.parameters() if p.grad is not None]
    assert all(float(grad.abs().sum()) == 0 for grad in grads)
    assert sum("no question of this batch has a gold passage" in line for line in caplog.messages) == 1


def test_a_null_passage_and_fillers_are_no_negatives(ready):
    run, batch = ready(MarginalObjective(kind="rag_token", retriever_losses={"contrastive": InBatchContrastive()}))
    model = run.module.model
    plain = outcome_of(run, batch).terms["contrastive"]
    model.null_passage = NullPassage(torch.full((16,), 5.0))
    torch.testing.assert_close(outcome_of(run, batch).terms["contrastive"], plain)
    model.null_passage = None
    filled = replace(batch, weights_B=torch.tensor([1.0, 1.0, 1.0, 0.0]))
    outcome = outcome_of(run, filled)
    with torch.no_grad():
        gold = [*batch.positive_ids.tolist()[:3], -1]
        expected = naive_contrastive(model, run.data.corpus, filled, outcome.hits, gold)
    assert outcome.terms["contrastive"].tolist() == pytest.approx(expected, abs=1e-4)


def test_contrasting_wants_similarities(ready):
    run, batch = ready(MarginalObjective(kind="rag_token", retriever_losses={"contrastive": InBatchContrastive()}))

    class Words(type(run.data.retriever)):
        gradient_to = ()

        def scores(self, hits, similarities_BK, query_vectors_BD):
            return hits.scores_BK

    run.data.retriever.__class__ = Words
    with pytest.raises(ConfigError, match="retriever_loss contrastive: expected a retriever whose document scores are"):
        outcome_of(run, batch)


@pytest.mark.parametrize("kind", ["rag_token", "fid"])
def test_a_run_contrasts_beside_the_reader_and_not_in_evaluation(kind, tiny_run, tiny_model, tiny_world):
    model = tiny_model()
    model.settings = replace(model.settings, objective=kind, decoding=kind)
    losses = {"contrastive": InBatchContrastive(), "pdist": PerplexityDistillation()}
    files = {"validation": str(tiny_world.validation), "test": str(tiny_world.test)}
    run = tiny_run(model=model, objective=MarginalObjective(kind=kind, retriever_losses=losses), data=files)
    taught = []
    for term in losses.values():
        whole = type(term).__call__

        def watched(self, reading, whole=whole):
            taught.append(torch.is_grad_enabled())
            return whole(self, reading)

        term.__class__ = type(type(term).__name__, (type(term),), {"__call__": watched})
    run.fit()
    assert {"train/contrastive", "train/pdist", "train/nll"} <= set(run.trainer.callback_metrics)
    in_training = len(taught)
    assert in_training == 2 * 4  # terms by steps
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert len(taught) == in_training
