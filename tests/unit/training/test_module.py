"""The shared step: who learns, how losses become one number, what is refused, what is measured."""

import inspect
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.errors import CheckpointError, ConfigError, DataError, NonFiniteLossError
from rag_lightning.metrics.text import corpus_bleu
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.training.module import RagLightningModule, check_shapes
from rag_lightning.training.objectives import ClosedBook, Contrastive, Denoising, MarginalObjective, Sources
from rag_lightning.training.optim import OptimSettings

PARTS = {"query_encoder": "encoder.query.", "passage_encoder": "encoder.passage.", "generator": "generator."}


def part_of(name):
    return next(part for part, prefix in PARTS.items() if name.startswith(prefix))


# ---------------------------------------------------------------------- who learns


@pytest.mark.parametrize(
    ("objective", "trained"),
    [
        (MarginalObjective(kind="rag_token"), ("query_encoder", "generator")),
        (MarginalObjective(kind="rag_sequence"), ("query_encoder", "passage_encoder", "generator")),
        (MarginalObjective(kind="rag_token"), ("query_encoder",)),
        (MarginalObjective(kind="rag_token"), ("passage_encoder",)),
        (MarginalObjective(kind="rag_token"), ("generator",)),
        (Contrastive(), ("query_encoder", "passage_encoder")),
        (Denoising(), ("generator",)),
    ],
)
def test_trained_parts_change_and_frozen_parts_do_not(objective, trained, tiny_run, tiny_model):
    switches = {f"train_{part}": part in trained for part in PARTS}
    model = tiny_model(dropout=0.1)
    run = tiny_run(model=model, objective=objective, optim=switches, max_steps=3)
    before = run.weights()
    run.fit()
    assert run.module.trained == trained
    after, changed = run.weights(), dict.fromkeys(PARTS, False)
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            changed[part_of(name)] = True
    assert changed == {part: part in trained for part in PARTS}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (part_of(name) in trained)
        assert parameter.grad is None or part_of(name) in trained
    run.module.train()  # frozen parts drop nothing
    modules = {
        "query_encoder": model.encoder.query,
        "passage_encoder": model.encoder.passage,
        "generator": model.generator,
    }
    for part, module in modules.items():
        assert all(child.training == (part in trained) for child in module.modules())


def test_shared_towers_learn_together(tiny_run, tiny_model):
    run = tiny_run(model=tiny_model(shared=True), optim={"train_passage_encoder": True}, schedule=2, max_steps=3)
    before = run.weights()
    run.fit()
    assert not torch.equal(
        before["encoder.query.backbone.embeddings.word_embeddings.weight"],
        run.weights()["encoder.query.backbone.embeddings.word_embeddings.weight"],
    )
    assert run.module.model.encoder.query is run.module.model.encoder.passage
    with pytest.raises(ConfigError, match="towers are shared"):
        tiny_run(model=tiny_model(shared=True))


def test_nothing_to_train_is_refused(tiny_run):
    for objective in (MarginalObjective(kind="rag_token"), Denoising()):
        with pytest.raises(ConfigError, match="nothing to train"):
            tiny_run(objective=objective, optim={"train_query_encoder": False, "train_generator": False})


def test_each_part_has_its_own_rate_along_one_schedule(tiny_run):
    rates = {"lr_query_encoder": 1e-3, "lr_passage_encoder": 2e-3, "lr_generator": 4e-3}
    run = tiny_run(
        optim={**rates, "train_passage_encoder": True, "schedule": "linear", "warmup_steps": 2},
        schedule=3,
        max_steps=6,
        accumulate_grad_batches=2,
    ).fit()
    names = [group["name"] for group in run.trainer.optimizers[0].param_groups]
    factors = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]  # the rate of the next step, by optimiser steps taken
    for steps, row in zip(run.recorder.steps, run.recorder.rates, strict=True):
        assert row == pytest.approx([rates[f"lr_{name.split('/')[0]}"] * factors[steps] for name in names])


# ---------------------------------------------------------------------- one number


def by_hand(model, data, *, batches, denominator):
    """Plain PyTorch: one AdamW step for each list of batches, losses summed and divided by hand."""
    objective = MarginalObjective(kind="rag_token")
    groups = [
        {"params": [p], "lr": 1e-2, "weight_decay": 0.01 if p.ndim >= 2 else 0.0}
        for part in (model.encoder.query, model.generator)
        for p in part.parameters()
    ]
    optimizer = torch.optim.AdamW(groups)
    for step in batches:
        optimizer.zero_grad()
        for batch in step:
            outcome = objective(model, batch, Sources(data.assembler, data.retriever))
            (outcome.loss_B.sum() / denominator(step)).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("reduction", "accumulate"),
    [("example_mean", 1), ("example_mean", 2), ("sum", 1), ("sum", 2), ("token_mean", 1)],
)
def test_reductions_against_plain_torch(reduction, accumulate, tiny_run, tiny_model):
    settings = {"optim": {"schedule": "constant"}, "module": {"reduction": reduction}, "max_steps": 4}
    run = tiny_run(**settings, accumulate_grad_batches=accumulate, data={"batch_size": 4 // accumulate}).fit()

    model = tiny_model()
    other = tiny_run(model=model, data={"batch_size": 4 // accumulate})
    other.data.setup("fit")
    other.data.ensure_index(step=0)
    other.data.trainer = None
    loader = list(other.data.train_dataloader())
    steps = [loader[place : place + accumulate] for place in range(0, len(loader), accumulate)]
    assert len(steps) == 4  # one epoch, the last step with a single question
    denominators = {
        "example_mean": lambda step: 4,
        "sum": lambda step: 1,
        "token_mean": lambda step: int((step[0].labels[:, 1:] != 0).sum()),
    }
    model.train()
    by_hand(model, other.data, batches=steps, denominator=denominators[reduction])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.weights()[name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", ["example_mean", "sum"])
def test_accumulation_is_one_big_batch(reduction, tiny_run):
    def fit(batch_size, accumulate):
        run = tiny_run(
            data={"batch_size": batch_size, "sample_answers": True},
            optim={"train_passage_encoder": True, "eps": 1e-3},
            schedule=2,
            module={"reduction": reduction},
            max_steps=8,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
        ).fit()
        return run.weights(), run.recorder

    big, recorder = fit(4, 1)
    for batch_size, accumulate in ((2, 2), (1, 4)):
        small, parts = fit(batch_size, accumulate)
        for name, value in big.items():
            torch.testing.assert_close(small[name], value, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}")
        # 13 questions are 4 steps an epoch; a step's loss is the mean over its questions, the last has one question
        sizes = [min(batch_size, 13 - start) for start in range(0, 13, batch_size)] * 2
        means = []
        for step in range(1, 9):
            chosen = [
                (n, loss) for n, loss, s in zip(sizes, parts.losses, _step_of(parts.steps), strict=True) if s == step
            ]
            means.append(sum(n * loss for n, loss in chosen) / sum(n for n, _ in chosen))
        assert means == pytest.approx(recorder.losses, rel=1e-5)


def _step_of(steps):
    """The optimiser step that each micro-batch belongs to, from the steps taken when it ended."""
    return [step if step > before else step + 1 for before, step in zip([0, *steps], steps, strict=False)]


def test_an_unknown_reduction_is_refused(tiny_model):
    module = RagLightningModule.__new__(RagLightningModule)
    initialise = inspect.unwrap(RagLightningModule.__init__)  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match="reduction: expected one of example_mean, token_mean, sum, got 'mean'"):
        initialise(module, model=tiny_model(), objective=ClosedBook(), optim=OptimSettings(), reduction="mean")


def test_label_smoothing_and_bf16_train(tiny_run):
    smooth = tiny_run(objective=MarginalObjective(kind="rag_token", label_smoothing=0.1), max_steps=2).fit()
    assert smooth.recorder.losses != tiny_run(max_steps=2).fit().recorder.losses
    half = tiny_run(precision="bf16-mixed", max_steps=6).fit()
    assert all(math.isfinite(loss) for loss in half.recorder.losses)
    assert half.recorder.losses[-1] < half.recorder.losses[0]


# ---------------------------------------------------------------------- refusals


class Poisoned(MarginalObjective):
    """NaN for one question at its second visit."""

    def __init__(self, *, question_id: str, visit: int) -> None:
        super().__init__(kind="rag_token")
        self.question_id = question_id
        self.visit = visit

    def __call__(self, model, batch, sources):
        outcome = super().__call__(model, batch, sources)
        for row, question in enumerate(batch.questions):
            if question.id == self.question_id:
                self.visit -= 1
                if self.visit == 0:
                    outcome.loss_B[row].data.fill_(float("nan"))
        return outcome


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_loss_that_is_not_finite_names_step_and_question_and_leaves_a_resumable_checkpoint(
    tiny_run, tiny_model, tmp_path
):
    settings = {"max_steps": 9, "index_dir": tmp_path / "index"}
    whole = tiny_run(model=tiny_model(dropout=0.1), **settings).fit()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_exception=True)
    run = tiny_run(
        model=tiny_model(dropout=0.1),
        objective=Poisoned(question_id="q-5", visit=2),
        callbacks=[checkpoint],
        **settings,
    )
    with pytest.raises(NonFiniteLossError) as caught:
        run.fit()
    done = len(run.recorder.losses)
    assert 4 <= done < 8  # in the second epoch
    message = str(caught.value)
    assert f"at step {done} (batch {done - 4}, questions q-5)" in message
    assert "last checkpoint is kept" in message
    resumed = tiny_run(model=tiny_model(dropout=0.1), **settings).fit(tmp_path / "last.ckpt")
    assert run.recorder.losses == whole.recorder.losses[:done]
    # the batch that failed is met again; its dropout was drawn once already, so only what follows may differ
    assert len(resumed.recorder.losses) == 9 - done
    assert resumed.recorder.steps == whole.recorder.steps[done:]


@pytest.mark.parametrize("question_id", ["q-5", "q-9", "q-11"])  # the second epoch's first, second and last batch
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_batch_that_failed_is_met_again_without_dropout_exactly(question_id, tiny_run, tmp_path):
    settings = {"max_steps": 9, "index_dir": tmp_path / "index"}
    whole = tiny_run(**settings).fit()
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_exception=True)
    run = tiny_run(objective=Poisoned(question_id=question_id, visit=2), callbacks=[checkpoint], **settings)
    with pytest.raises(NonFiniteLossError):
        run.fit()
    resumed = tiny_run(**settings).fit(tmp_path / "last.ckpt")
    assert run.recorder.losses + resumed.recorder.losses == whole.recorder.losses


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"lr_query_encoder": 1e30}, r"step 1 \(batch 1, questions q-\d+, .*query encoder has diverged"),
        ({"lr_generator": 1e30}, r"the loss is not finite at step 1 \(batch 1, questions q-\d+, "),
    ],
)
def test_weights_that_diverge_name_step_and_questions(rates, message, tiny_run):
    with pytest.raises(Exception, match=message) as caught:
        tiny_run(optim=rates).fit()
    assert isinstance(caught.value, (DataError, NonFiniteLossError))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_another_vocabulary_names_the_tensor(tiny_run, tiny_model, tiny_passages, tmp_path):
    run = tiny_run(max_steps=1, callbacks=[ModelCheckpoint(dirpath=tmp_path)]).fit()
    run.trainer.save_checkpoint(tmp_path / "one.ckpt")
    smaller = train_word_tokenizer([row["text"] for row in tiny_passages], vocab_size=150)
    smaller.save_pretrained(tmp_path / "tokenizer")
    model = tiny_model(tokenizer=str(tmp_path / "tokenizer"))
    other = tiny_run(model=model)
    before = other.weights()
    with pytest.raises(
        CheckpointError, match=r"checkpoint: expected model\.\S+ of shape \(150.*came \((\d+).*tokenizer"
    ):
        other.fit(tmp_path / "one.ckpt")
    assert all(torch.equal(value, other.weights()[name]) for name, value in before.items())


def test_check_shapes_takes_what_fits():
    check_shapes({"a": torch.zeros(2, 3)}, {"a": torch.ones(2, 3), "more": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"expected bias of shape \(2,\), came \(3,\)\. Give"):
        check_shapes({"bias": torch.zeros(2)}, {"bias": torch.zeros(3)})


# ---------------------------------------------------------------------- what is measured

ANSWERS = {"exact_match", "f1", "nll"}
RETRIEVAL = {"recall@1", "recall@3", "mrr", "answer_recall@1", "answer_recall@3", "answer_mrr"}
DIAGNOSTICS = {"distinct_passage_ratio", "index_age_steps"}
READING = {"posterior_entropy", "retrieval_utility"}


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (MarginalObjective(kind="rag_token"), ANSWERS | RETRIEVAL | DIAGNOSTICS | READING),
        (MarginalObjective(kind="rag_sequence"), ANSWERS | RETRIEVAL | DIAGNOSTICS | READING),
        (ClosedBook(), ANSWERS),
        (Denoising(), ANSWERS),
        (Contrastive(), RETRIEVAL | DIAGNOSTICS),
    ],
)
def test_validation_and_test_measure_what_there_is_to_measure(objective, expected, tiny_run, tiny_model, tiny_world):
    files = {"validation": str(tiny_world.validation), "test": str(tiny_world.test)}
    run = tiny_run(
        model=tiny_model(num_passages=0 if isinstance(objective, ClosedBook) else 3),
        objective=objective,
        data=files,
        optim={"train_passage_encoder": True},
        max_steps=4,
    ).fit()
    seen = {name.removeprefix("val/") for name in run.trainer.callback_metrics if name.startswith("val/")}
    assert seen == expected
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert {name.removeprefix("test/") for name in figures} == expected
    for name, value in figures.items():
        assert math.isfinite(value), name
        if name.split("/")[1] in ANSWERS - {"nll"} | RETRIEVAL | {"distinct_passage_ratio"}:
            assert 0.0 <= value <= 1.0, name


def test_figures_against_the_predictions_themselves(tiny_run, tiny_world):
    """Batches of 4 and 1: a mean of batch means would be another number."""
    run = tiny_run(data={"test": str(tiny_world.test)}, max_steps=15, optim={"train_passage_encoder": True}, schedule=4)
    run.fit()
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    questions = run.data.questions["test"]
    predictions = run.module.predictions
    assert [prediction.id for prediction in predictions] == [question.id for question in questions]
    ranks = [
        next((rank for rank, p in enumerate(prediction.passages, 1) if p.id in question.positive_passage_ids), None)
        for prediction, question in zip(predictions, questions, strict=True)
    ]
    assert figures["test/recall@1"] == pytest.approx(sum(rank == 1 for rank in ranks) / 5)
    assert figures["test/recall@3"] == pytest.approx(sum(rank is not None for rank in ranks) / 5)
    assert figures["test/mrr"] == pytest.approx(sum(1 / rank for rank in ranks if rank is not None) / 5)
    found = [passage.id for prediction in predictions for passage in prediction.passages]
    assert figures["test/distinct_passage_ratio"] == pytest.approx(len(set(found)) / len(found))
    nlls, utilities, entropies = [], [], []
    model = run.module.model
    run.module.eval()
    with torch.no_grad():
        for batch in run.data.test_dataloader():
            outcome = run.module.objective(model, batch, Sources(run.data.assembler, run.data.retriever))
            closed = ClosedBook()(model, batch, Sources(run.data.assembler))
            nlls += outcome.loss_B.tolist()
            utilities += (closed.loss_B - outcome.loss_B).tolist()
            posterior_BK = outcome.marginal.log_posterior_BK
            entropies += (-(posterior_BK.exp() * posterior_BK).sum(dim=1)).tolist()
    assert figures["test/nll"] == pytest.approx(sum(nlls) / 5, rel=1e-5)
    assert figures["test/retrieval_utility"] == pytest.approx(sum(utilities) / 5, rel=1e-3, abs=1e-5)
    assert figures["test/posterior_entropy"] == pytest.approx(sum(entropies) / 5, rel=1e-4)


def test_training_lines_carry_loss_entropies_and_index_age(tiny_run):
    run = tiny_run(max_steps=2).fit()
    assert set(run.trainer.callback_metrics) == {
        "train/loss",
        "train/posterior_entropy",
        "train/prior_entropy",
        "index/age_steps",
    }
    assert run.recorder.ages == [0.0, 1.0]
    assert 0.0 <= float(run.trainer.callback_metrics["train/posterior_entropy"]) <= math.log(3) + 1e-6


def test_validation_without_decoding_and_utility(tiny_run, tiny_world):
    quick = {"generate_in_validation": False, "retrieval_utility": False}
    run = tiny_run(module=quick, data={"validation": str(tiny_world.validation)}, max_steps=4).fit()
    seen = {name.removeprefix("val/") for name in run.trainer.callback_metrics if name.startswith("val/")}
    assert seen == {"nll"} | RETRIEVAL | DIAGNOSTICS | {"posterior_entropy"}
    assert run.module.predictions == []


def test_evaluation_of_an_untrained_module_needs_no_fit(tiny_run, tiny_world):
    run = tiny_run(data={"validation": str(tiny_world.validation), "test": str(tiny_world.test)})
    (tested,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    (validated,) = run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert tested["test/nll"] > 0
    assert validated["val/nll"] > 0


def test_figures_of_texts_stand_beside_exact_match(tiny_run, tiny_world):
    data = {"validation": str(tiny_world.validation), "test": str(tiny_world.test)}
    settings = {"text_metrics": ["bleu1", "knowledge_f1"], "recall_at": (1,)}
    run = tiny_run(data=data, module=settings, max_steps=1, val_check_interval=1)
    run.fit()
    assert {"val/bleu1", "val/knowledge_f1", "val/exact_match"} <= set(run.trainer.callback_metrics)
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    answers = {prediction.id: prediction.answer for prediction in run.module.predictions}
    questions = run.data.questions["test"]
    expected = corpus_bleu([answers[one.id] for one in questions], [one.answers for one in questions], max_order=1)
    assert float(run.trainer.callback_metrics["test/bleu1"]) == pytest.approx(expected, rel=1e-5)
