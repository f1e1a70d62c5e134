"""The null passage: a choice more beside the K found, in the marginal, in answers, metrics and files."""

import inspect
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RagSettings
from rag_lightning.retrieval.null import NullPassage, check_similarities
from rag_lightning.text.prompts import Prompt
from rag_lightning.training.objectives import (
    Contrastive,
    CrossEncoderDistillation,
    InBatchContrastive,
    LeaveOneOut,
    MarginalObjective,
    PerplexityDistillation,
    Sources,
)
from rag_lightning.training.optim import modules_of
from rag_lightning.types import Hits, RagBatch, TokenBatch

TEXTS = ["who made Amber", "who made Iron"]


@pytest.fixture
def null_model(tiny_encoder, tiny_generator):
    """Returns a builder of models with a null passage; K = 3."""

    def build(seed=0, **settings):
        torch.manual_seed(seed)
        chosen = {"num_passages": 3, "temperature": 0.1, "max_target_tokens": 8, "null_passage": True, **settings}
        return RagModel(
            encoder=tiny_encoder(),
            generator=tiny_generator(),
            prompt=Prompt(max_passage_tokens=40, max_tokens=64),
            settings=RagSettings(**chosen),
            decoding_options=DecodingOptions(max_new_tokens=6),
        )

    return build


@pytest.fixture
def ready(tiny_run, null_model):
    """Returns ``ready(objective)``: a run with a live index, and its first batch."""

    def build(objective=None, model=None, **named):
        objective = objective if objective is not None else MarginalObjective(kind="rag_token")
        run = tiny_run(model=model if model is not None else null_model(), objective=objective, **named)
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.data.trainer = None
        run.module.eval()
        return run, next(iter(run.data.train_dataloader()))

    return build


def sources(run):
    return Sources(run.data.assembler, run.data.retriever)


def test_it_stands_last_beside_the_k_found(ready):
    run, batch = ready()
    model = run.module.model
    texts = [question.question for question in batch.questions]
    hits, scores_BK = model.retrieve(batch.query, texts, run.data.retriever)
    assert hits.has_null
    assert hits.ids_BK.shape == scores_BK.shape == (4, 4)
    assert hits.ids_BK[:, 3].tolist() == [-1] * 4
    queries_BD = model.encoder.query(batch.query)
    torch.testing.assert_close(scores_BK[:, 3], queries_BD @ model.null_passage.vector_D)
    kept, model.null_passage = model.null_passage, None
    without, plain_BK = model.retrieve(batch.query, texts, run.data.retriever)
    model.null_passage = kept
    assert torch.equal(without.ids_BK, hits.retrieved.ids_BK)
    assert torch.equal(without.scores_BK, hits.retrieved.scores_BK)
    torch.testing.assert_close(plain_BK, scores_BK[:, :3])
    assert without.retrieved is without


@pytest.mark.parametrize("marginal", ["rag_token", "rag_sequence"])
def test_the_marginal_is_that_of_k_plus_one_contexts(marginal, ready):
    """By a double loop in float64 over contexts scored one by one, the last of them the question alone."""
    run, batch = ready(MarginalObjective(kind=marginal))
    model = run.module.model.double()
    with torch.no_grad():
        outcome = run.module.objective(model, batch, sources(run))
    assembler = run.data.assembler
    for row in range(4):
        prompt = type(batch.prompt)(batch.prompt.input_ids[row : row + 1], batch.prompt.attention_mask[row : row + 1])
        scores, tokens = outcome.doc_scores_BK[row].tolist(), []
        for place in range(4):
            alone = assembler.without_passage(prompt)
            row_ids = outcome.hits.ids_BK[row : row + 1, place : place + 1]
            context = alone if place == 3 else assembler.contexts(row_ids, prompt)
            with torch.no_grad():
                scored = model.generator.score(model.generator.encode(context), batch.labels[row : row + 1], 1)
            mask = scored.target_mask_BT[0]
            tokens.append(scored.token_log_probs_BKT[0, 0][mask].tolist())
        total = sum(math.exp(score / 0.1) for score in scores)
        prior = [math.exp(score / 0.1) / total for score in scores]
        if marginal == "rag_sequence":
            expected = math.log(sum(p * math.exp(sum(each)) for p, each in zip(prior, tokens, strict=True)))
        else:
            steps = zip(*tokens, strict=True)
            expected = sum(math.log(sum(p * math.exp(v) for p, v in zip(prior, step, strict=True))) for step in steps)
        assert float(outcome.marginal.log_likelihood_B[row]) == pytest.approx(expected, rel=1e-9)
        assert float(outcome.marginal.log_prior_BK[row, 3].exp()) == pytest.approx(prior[3], rel=1e-9)


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_its_gradient_is_that_of_finite_differences(metric, ready, null_model):
    run, batch = ready(model=null_model(metric=metric))
    model = run.module.model.double()
    vector_D = model.null_passage.vector_D

    def loss():
        texts = [question.question for question in batch.questions]
        hits, scores_BK = model.retrieve(batch.query, texts, run.data.retriever)
        contexts = run.data.assembler.contexts(hits.ids_BK, batch.prompt)
        return model.marginal(RagBatch(contexts, scores_BK, batch.labels)).nll_B.sum()

    loss().backward()
    assert float(vector_D.grad.abs().max()) > 0
    for place in range(0, len(vector_D), 5):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                vector_D[place] += step
                ends.append(float(loss().detach()))
                vector_D[place] -= step
        assert float(vector_D.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_it_starts_at_the_tower_s_vector_of_an_empty_passage(tiny_encoder):
    encoder = tiny_encoder(dropout=0.5)
    vector_D = NullPassage.of(encoder).vector_D
    tokens = encoder.tokenizer([""], return_tensors="pt")
    encoder.eval()
    empty_1D = encoder.passage_tower()(TokenBatch(tokens["input_ids"], tokens["attention_mask"]))
    torch.testing.assert_close(vector_D.detach(), empty_1D[0].detach())
    encoder.tokenizer = None
    assert NullPassage.of(encoder).vector_D.tolist() == pytest.approx([0.25] * 16)


@pytest.mark.parametrize("decoding", ["rag_token", "rag_sequence_fast", "rag_sequence_thorough", "fid"])
def test_answers_list_it_last_and_it_is_saved(decoding, ready, tmp_path):
    run, _ = ready()
    model = run.module.model
    with torch.no_grad():
        model.null_passage.vector_D += 0.3
    predictions = model.generate(TEXTS, retriever=run.data.retriever, decoding=decoding)
    for prediction in predictions:
        null = prediction.passages[-1]
        assert len(prediction.passages) == 4
        assert (null.id, null.title, null.text) == ("", "", "")
        assert null.probability > 0
        assert sum(passage.probability for passage in prediction.passages) == pytest.approx(1.0, abs=1e-5)
    model.save_pretrained(tmp_path / "model")
    again = RagModel.from_pretrained(tmp_path / "model")
    assert again.settings.null_passage
    assert torch.equal(again.null_passage.vector_D, model.null_passage.vector_D)
    assert again.generate(TEXTS, retriever=run.data.retriever, decoding=decoding) == predictions


def test_a_damaged_file_is_refused_and_older_models_have_none(null_model, tiny_model, tmp_path):
    null_model().save_pretrained(tmp_path / "model")
    place = tmp_path / "model" / "null_passage.safetensors"
    assert set(load_file(place)) == {"vector_D"}
    save_file({"other": torch.zeros(3)}, place)
    with pytest.raises(CheckpointError, match="expected vector_D alone, came \\['other'\\]"):
        RagModel.from_pretrained(tmp_path / "model")
    tiny_model().save_pretrained(tmp_path / "plain")
    assert RagModel.from_pretrained(tmp_path / "plain").null_passage is None
    assert not (tmp_path / "plain" / "null_passage.safetensors").exists()


def test_it_learns_with_the_query_encoder_and_leaves_the_metrics_of_k_alone(tiny_run, null_model, tiny_world):
    files = {"test": str(tiny_world.test)}
    run = tiny_run(model=null_model(), data=files, module={"recall_at": (1, 3, 4)}, max_steps=2)
    before = run.weights()["null_passage.vector_D"]
    run.fit()
    assert not torch.equal(run.weights()["null_passage.vector_D"], before)
    assert 0 < float(run.trainer.callback_metrics["train/null_probability"]) < 1
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert "test/recall@4" not in figures  # K is 3
    assert 0 < figures["test/null_posterior"] < 1
    assert 0 < figures["test/null_probability"] < 1
    run.module.model.null_passage = None
    (plain,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    for name in ("recall@1", "recall@3", "mrr", "answer_recall@3", "distinct_passage_ratio"):
        assert figures[f"test/{name}"] == plain[f"test/{name}"]
    assert "test/null_posterior" not in plain


def test_frozen_with_the_query_encoder(tiny_run, null_model):
    run = tiny_run(model=null_model(), optim={"train_query_encoder": False}, max_steps=1)
    before = run.weights()["null_passage.vector_D"]
    run.fit()
    assert torch.equal(run.weights()["null_passage.vector_D"], before)
    assert len(list(modules_of(run.module.model)["query_encoder"].children())) == 2


@pytest.mark.parametrize("kind", ["rag_token", "fid"])
def test_losses_for_the_retriever_know_it(kind, ready):
    class Constant:
        def score(self, questions, passages, *, batch_size=32):
            assert all(passage.id for passage in passages)
            return torch.arange(float(len(passages)))

    losses = {
        "pdist": PerplexityDistillation(),
        "loop": LeaveOneOut(),
        "ce": CrossEncoderDistillation(cross_encoder=Constant()),
    }
    run, batch = ready(MarginalObjective(kind=kind, retriever_losses=losses))
    outcome = run.module.objective(run.module.model, batch, sources(run))
    for name in losses:
        assert bool(torch.isfinite(outcome.terms[name]).all())
    # the cross-encoder judges the three found: the divergence to p(z|x) given that one of them is chosen
    target = torch.arange(12.0).view(4, 3).softmax(dim=1)
    found = outcome.marginal.log_prior_BK[:, :3].log_softmax(dim=1)
    prior = torch.log_softmax(outcome.doc_scores_BK[:, :3] / 0.1, dim=1)
    torch.testing.assert_close(found, prior)
    divergence_B = (target * (target.log() - prior)).sum(dim=1)
    torch.testing.assert_close(outcome.terms["ce"], divergence_B, atol=1e-5, rtol=1e-4)
    outcome.terms["pdist"].sum().backward()
    assert float(run.module.model.null_passage.vector_D.grad.abs().sum()) > 0


def test_what_cannot_weigh_it_is_refused(tiny_model, tiny_generator, tiny_run, null_model):
    with pytest.raises(ConfigError, match="num_passages of at least 1, came 0"):
        RagSettings(num_passages=0, null_passage=True)
    with pytest.raises(ConfigError, match="model.null_passage: expected an encoder"):
        RagModel(encoder=None, generator=tiny_generator(), settings=RagSettings(null_passage=True))
    with pytest.raises(ConfigError, match="model.null_passage: the contrastive objective .* never weighs it"):
        tiny_run(model=null_model(), objective=Contrastive())

    class Words:
        snapshot_id, gradient_to = "bm25-1", ()

    hits = Hits(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), "bm25-1")
    with pytest.raises(ConfigError, match="model.null_passage: expected a retriever whose .* came bm25-1"):
        inspect.unwrap(check_similarities)(Words(), hits, "model.null_passage")
    assert replace(hits, has_null=True).retrieved.ids_BK.shape == (1, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "fid"},
        {"kind": "stuffed"},
        {"kind": "rag_token", "teaches_retriever": False, "retriever_losses": {"a": InBatchContrastive()}},
    ],
)
def test_objectives_that_never_weigh_it_are_refused(settings, tiny_model, tiny_run):
    model = tiny_model()
    model.settings = replace(model.settings, null_passage=True)
    with pytest.raises(ConfigError, match="model.null_passage: objective .* never weighs it: it would not learn"):
        tiny_run(model=RagModel.from_parts(model.parts()), objective=MarginalObjective(**settings))
