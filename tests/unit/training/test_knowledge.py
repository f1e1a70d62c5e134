"""Distillation inside the objective: which part each term moves, what the teacher reads, and what it leaves alone."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.losses.knowledge import predictive_log_probs, soft_target_kl, tempered
from rag_lightning.rag import RagModel
from rag_lightning.rag_parts import RetrieverSource
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.training.objectives import (
    ClosedBook,
    Contrastive,
    KnowledgeDistillation,
    MarginalObjective,
    Objective,
    PerplexityDistillation,
    Sources,
    Teacher,
)
from rag_lightning.types import Hits, RagBatch


@pytest.fixture
def teacher_of(tmp_path):
    """Returns ``teacher_of(model)``: a saved model as a teacher."""

    def build(model, name="teacher"):
        model.save_pretrained(tmp_path / name)
        return Teacher(source=str(tmp_path / name))

    return build


@pytest.fixture
def indexed_teacher(tiny_run, tiny_world, tiny_model, tmp_path):
    """Returns ``indexed_teacher()``: a saved model with the index that it searches."""

    def build():
        model = tiny_model(seed=5)
        run = tiny_run(model=model, index_dir=tmp_path / "teacher" / "index")
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        model.retriever_source = RetrieverSource(str(tiny_world.passages), str(run.data.dense.snapshot.path))
        model.save_pretrained(tmp_path / "teacher" / "model")
        return Teacher(source=str(tmp_path / "teacher"))

    return build


@pytest.fixture
def ready(tiny_run):
    """Returns ``ready(objective, model=None)``: a training run with a live index, and its first batch."""

    def build(objective, model=None):
        run = tiny_run(model=model, objective=objective)
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.data.trainer = None
        return run, next(iter(run.data.train_dataloader()))

    return build


def outcome_of(run, batch):
    return run.module.objective(
        run.module.model, batch, Sources(run.data.assembler, run.data.retriever, run.data.encoder_tokens)
    )


def moved(model):
    parts = {"query": model.encoder.query, "generator": model.generator} if model.encoder else {}
    parts = parts or {"generator": model.generator}
    return {
        name
        for name, part in parts.items()
        if any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())
    }


BOTH = {"query", "generator"}
FLOW = [
    # weights of hard, soft, posterior; the objective's settings; parts reached
    ((0.0, 1.0, 0.0), {}, {"generator"}),
    ((0.0, 0.0, 1.0), {}, {"query"}),
    ((0.0, 0.0, 1.0), {"teaches_retriever": False}, {"query"}),
    ((0.0, 1.0, 1.0), {}, BOTH),
    ((1.0, 1.0, 0.0), {"teaches_retriever": False}, {"generator"}),
    ((1.0, 0.0, 1.0), {"teaches_retriever": False}, BOTH),
    ((1.0, 1.0, 1.0), {"marginal_weight": 0.5}, BOTH),
    ((1.0, 1.0, 0.0), {"teaches_retriever": False, "retriever_losses": {"a": PerplexityDistillation()}}, BOTH),
]


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "fid"])
@pytest.mark.parametrize(("weights", "settings", "expected"), FLOW)
def test_which_part_each_term_moves(weights, settings, expected, kind, ready, tiny_model, teacher_of):
    hard, soft, posterior = weights
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind=kind, **settings),
        teacher=teacher_of(tiny_model(seed=5)),
        hard_weight=hard,
        soft_weight=soft,
        posterior_weight=posterior,
        temperature=2.0,
    )
    assert isinstance(objective, Objective)
    run, batch = ready(objective)
    run.module.model.requires_grad_(True)
    outcome = outcome_of(run, batch)
    outcome.loss_B.sum().backward()
    assert moved(run.module.model) == expected
    named = {"query_encoder": "query", "generator": "generator"}
    assert {named[part] for part in objective.trains if part in named} == expected
    assert all(parameter.grad is None for parameter in objective.teacher.model.parameters())
    terms = {name: outcome.terms[name] for name in ("hard", "soft", "posterior") if name in outcome.terms}
    expected_B = sum(weight * terms[name] for name, weight in objective.weights.items() if weight > 0)
    torch.testing.assert_close(outcome.loss_B, expected_B)


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "fid"])
def test_terms_are_what_the_teacher_says_of_the_students_passages(kind, ready, tiny_model, teacher_of):
    """Put together by hand: the teacher's own prior and logits, both models' mixtures, the divergence of both."""
    master = tiny_model(seed=5)
    master.settings = replace(master.settings, objective=kind)
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_sequence"),
        teacher=teacher_of(master),
        posterior_weight=1.0,
        temperature=2.0,
    )
    run, batch = ready(objective)
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        model, corpus = run.module.model, run.data.corpus
        contexts = run.data.assembler.contexts(outcome.hits.ids_BK, batch.prompt)
        queries_BD = master.encoder.query(master.query_tokens([question.question for question in batch.questions]))
        texts = [[master.encoder.passage_text(corpus[row]) for row in rows] for rows in outcome.hits.ids_BK.tolist()]
        scores_BK = torch.zeros(4, 3)
        for row, line in enumerate(texts):
            for place, text in enumerate(line):
                tokens = master.encoder.tokenizer([text], return_tensors="pt")
                vector = master.encoder.passage_tower()(
                    replace(batch.query, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
                )
                scores_BK[row, place] = vector[0] @ queries_BD[row]
        log_probs = []
        for reader, scores, sequence, fused in (
            (master, scores_BK, kind == "rag_sequence", kind == "fid"),
            (model, outcome.doc_scores_BK, True, False),
        ):
            encoded, prior = reader.generator.encode(contexts), (scores / 0.1).log_softmax(dim=1)
            alone = reader.generator.score(encoded, batch.labels, 3, keep_logits=True)
            said_BK = alone.token_log_probs_BKT.sum(dim=2)
            if fused:
                alone = reader.generator.score(encoded.fused(prior > -torch.inf), batch.labels, 1, keep_logits=True)
            mask = alone.target_mask_BT
            weights = torch.zeros(4, 1) if fused else prior
            log_probs.append(predictive_log_probs(alone.logits_BKTV, weights, batch.labels[:, 1:], mask, sequence))
            if reader is master:
                posterior_BK = (prior + said_BK).softmax(dim=1)
        teacher, student = log_probs
        expected_B = soft_target_kl(tempered(teacher, 2.0), student, mask, 2.0)
        torch.testing.assert_close(outcome.terms["soft"], expected_B, atol=1e-4, rtol=1e-4)
        divergence_B = (posterior_BK * (posterior_BK.log() - prior)).sum(dim=1)
        torch.testing.assert_close(outcome.terms["posterior"], divergence_B, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "fid"])
def test_a_teacher_that_is_the_student_teaches_nothing(kind, ready, tiny_model, teacher_of):
    student = tiny_model(seed=3)
    student.settings = replace(student.settings, objective=kind)
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind=kind), teacher=teacher_of(student), hard_weight=0.0, temperature=3.0
    )
    run, batch = ready(objective, student)
    outcome = outcome_of(run, batch)
    outcome.loss_B.sum().backward()
    assert float(outcome.loss_B.detach().abs().max()) < 1e-4
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-5 for p in student.parameters())


def test_passages_that_were_not_found_are_taught_to_nobody(ready, tiny_model, teacher_of, monkeypatch):
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"), teacher=teacher_of(tiny_model(seed=5)), posterior_weight=1.0
    )
    run, batch = ready(objective)
    model, retrieve = run.module.model, run.module.model.retrieve

    def one_less(*arguments, **named):
        hits, scores_BK = retrieve(*arguments, **named)
        ids_BK = hits.ids_BK.clone()
        ids_BK[0, 2] = -1
        hits = Hits(hits.scores_BK.masked_fill(ids_BK < 0, -torch.inf), ids_BK, hits.snapshot_id)
        return hits, scores_BK.masked_fill(ids_BK < 0, -torch.inf)

    monkeypatch.setattr(model, "retrieve", one_less)
    outcome = outcome_of(run, batch)
    outcome.loss_B.sum().backward()
    assert torch.isfinite(outcome.loss_B).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_teacher_without_an_encoder_holds_all_passages_alike(ready, tiny_model, teacher_of):
    master = tiny_model(seed=5)
    master.encoder = None
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"), teacher=teacher_of(master), posterior_weight=1.0
    )
    run, batch = ready(objective)
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        contexts = run.data.assembler.contexts(outcome.hits.ids_BK, batch.prompt)
        said = master.generator.score(master.generator.encode(contexts), batch.labels, 3).token_log_probs_BKT.sum(dim=2)
    target, prior = said.softmax(dim=1), outcome.marginal.log_prior_BK
    expected_B = (target * (target.log() - prior)).sum(dim=1)
    torch.testing.assert_close(outcome.terms["posterior"], expected_B, atol=1e-5, rtol=1e-4)


def test_a_teacher_reads_as_it_was_trained_to(ready, tiny_model, teacher_of):
    """Another prompt than the student's gives another distribution, that of the teacher's own contexts."""
    alike, other = tiny_model(seed=5), tiny_model(seed=5)
    other.prompt = replace(other.prompt, question_template=" is asked of {question}")
    outcomes = []
    for name, master in (("alike", alike), ("other", other)):
        objective = KnowledgeDistillation(
            objective=MarginalObjective(kind="rag_token"), teacher=teacher_of(master, name), soft_weight=1.0
        )
        run, batch = ready(objective)
        with torch.no_grad():
            outcomes.append(outcome_of(run, batch).terms["soft"])
    assert not torch.allclose(*outcomes)


def test_evaluation_asks_no_teacher(ready, tiny_model):
    asked = []
    master = tiny_model(seed=5)
    teacher = Teacher(source="nowhere/at-all", load=lambda source: asked.append(source) or master)
    objective = KnowledgeDistillation(objective=MarginalObjective(kind="rag_token"), teacher=teacher)
    run, batch = ready(objective)
    assert asked == ["nowhere/at-all"]
    teacher.on_students_passages = None  # a call would fail
    run.module.eval()
    sources = Sources(run.data.assembler, run.data.retriever, teaching=False)
    outcome = run.module.objective(run.module.model, batch, sources)
    assert outcome.terms == {}
    torch.testing.assert_close(outcome.loss_B, outcome.marginal.nll_B)
    assert outcome.marginal.logits_BRTV is None


# ---------------------------------------------------------------------- the teacher's own passages, and the cache


def test_a_student_that_retrieves_may_be_taught_from_the_teachers_own_passages(indexed_teacher, ready, tiny_model):
    """What the teacher would say with them, whatever the student found: its RAG forward, put together by hand."""
    teacher = indexed_teacher()
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"), teacher=teacher, passages="own", hard_weight=0.0
    )
    run, batch = ready(objective, tiny_model(seed=1))
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        master, texts = teacher.model, [question.question for question in batch.questions]
        hits, scores_BK = master.retrieve(master.query_tokens(texts), texts, master.default_retriever())
        log_probs = []
        for model, ids_BK, scores in (
            (master, hits.ids_BK, scores_BK),
            (run.module.model, outcome.hits.ids_BK, outcome.doc_scores_BK),
        ):
            encoded = model.generator.encode(run.data.assembler.contexts(ids_BK, batch.prompt))
            output = model.generator.score(encoded, batch.labels, 3, keep_logits=True)
            prior, mask = (scores / 0.1).log_softmax(dim=1), output.target_mask_BT
            log_probs.append(predictive_log_probs(output.logits_BKTV, prior, batch.labels[:, 1:], mask, False))
        expected_B = soft_target_kl(log_probs[0], log_probs[1], mask)
    torch.testing.assert_close(outcome.loss_B, expected_B, atol=1e-4, rtol=1e-4)


def closed_book(teacher, **settings):
    return KnowledgeDistillation(
        objective=ClosedBook(), teacher=teacher, passages="own", **{"temperature": 2.0, **settings}
    )


@pytest.mark.parametrize("top_tokens", [None, 5])
def test_the_cache_gives_back_what_the_teacher_said(top_tokens, indexed_teacher, ready, tiny_model, tmp_path):
    """Bit for bit, in the run that wrote it and in the next one, which does not load the teacher at all."""
    teacher, outcomes = indexed_teacher(), []
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        source = Teacher(source=teacher.source)
        objective = closed_book(source, top_tokens=top_tokens, cache=cache)
        run, batch = ready(objective, tiny_model(seed=1, num_passages=0))
        outcomes.append(outcome_of(run, batch))
        again = outcome_of(run, batch)
        assert torch.equal(again.loss_B, outcomes[-1].loss_B)
    assert not source.is_loaded
    for outcome in outcomes[1:]:
        assert torch.equal(outcome.terms["soft"], outcomes[0].terms["soft"])
    outcomes[-1].loss_B.sum().backward()
    assert moved(run.module.model) == {"generator"}
    kept = list((tmp_path / "cache").glob("targets-*/*"))
    assert sorted(path.suffix for path in kept) == [".json", ".safetensors"], "nothing pickled, nothing half-written"


def test_each_question_is_found_in_any_batch(indexed_teacher, ready, tiny_model, tmp_path):
    run, batch = ready(closed_book(indexed_teacher(), cache=str(tmp_path / "cache")), tiny_model(num_passages=0))
    with torch.no_grad():
        whole = outcome_of(run, batch)
        run.module.objective.teacher.on_own_passages = None  # a call would fail
        order = [2, 0]
        ids, mask = batch.prompt.input_ids[order], batch.prompt.attention_mask[order]
        part = replace(
            batch,
            questions=tuple(batch.questions[row] for row in order),
            prompt=replace(batch.prompt, input_ids=ids, attention_mask=mask),
            labels=torch.nn.functional.pad(batch.labels[order], (0, 2), value=run.module.model.generator.pad_token_id),
            positive_ids=batch.positive_ids[order],
            weights_B=batch.weights_B[order],
        )
        found = outcome_of(run, part)
    torch.testing.assert_close(found.terms["soft"], whole.terms["soft"][order])


def test_another_teacher_or_temperature_opens_another_cache(indexed_teacher, ready, tiny_model, tmp_path):
    teacher, folders = indexed_teacher(), set()
    for settings in ({}, {"temperature": 3.0}, {"top_tokens": 4}, {}):
        objective = closed_book(teacher, cache=str(tmp_path / "cache"), **settings)
        ready(objective, tiny_model(num_passages=0))
        folders.add(objective._cache.folder)
    assert len(folders) == 3
    model = teacher.model
    with torch.no_grad():
        next(model.generator.parameters()).add_(0.1)
    model.save_pretrained(tmp_path / "teacher" / "model")
    objective = closed_book(Teacher(source=teacher.source), cache=str(tmp_path / "cache"))
    ready(objective, tiny_model(num_passages=0))
    assert objective._cache.folder not in folders


def test_a_torn_part_of_a_cache_is_named(indexed_teacher, ready, tiny_model, tmp_path):
    teacher = indexed_teacher()
    run, batch = ready(closed_book(teacher, cache=str(tmp_path / "cache")), tiny_model(num_passages=0))
    outcome_of(run, batch)
    part = next((tmp_path / "cache").glob("*/part-*"))
    part.write_bytes(part.read_bytes()[:20])
    with pytest.raises(DataError, match="distill.cache: expected soft targets in .*part-.*Remove this file"):
        ready(closed_book(teacher, cache=str(tmp_path / "cache")), tiny_model(num_passages=0))


def test_a_closed_book_teacher_reads_nothing(ready, tiny_model, teacher_of):
    master = tiny_model(seed=5, num_passages=0)
    run, batch = ready(closed_book(teacher_of(master)), tiny_model(seed=1, num_passages=0))
    with torch.no_grad():
        outcome = outcome_of(run, batch)
        logits = [
            model.generator.score(
                model.generator.encode(run.data.assembler.without_passage(batch.prompt)),
                batch.labels,
                1,
                keep_logits=True,
            )
            for model in (master, run.module.model)
        ]
        mask = logits[0].target_mask_BT
        teacher, student = (output.logits_BKTV[:, 0][mask].double() / 2 for output in logits)
        each = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(dim=1)
    expected = [4 * float(part.sum()) for part in each.split(mask.sum(dim=1).tolist())]
    assert outcome.terms["soft"].tolist() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------------- a whole run


def test_training_draws_the_student_to_a_teacher_that_stays(tiny_run, tiny_model, teacher_of, tmp_path):
    teacher = teacher_of(tiny_model(seed=5))
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"), teacher=teacher, hard_weight=0.0, posterior_weight=0.5
    )
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    student = tiny_model(seed=1)
    names = set(student.state_dict())
    keep = ModelCheckpoint(dirpath=tmp_path / "kept", save_last=True)
    run = tiny_run(model=student, objective=objective, max_steps=24, callbacks=[keep], gradient_clip_val=1.0)
    soft = []
    run.recorder.on_train_batch_end = lambda trainer, *_: soft.append(float(trainer.callback_metrics["train/soft"]))
    run.fit()
    assert {"train/hard", "train/soft", "train/posterior", "train/loss"} <= set(run.trainer.callback_metrics)
    assert sum(soft[-4:]) < 0.7 * sum(soft[:4])
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), "the teacher never moves"
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())
    saved = torch.load(keep.last_model_path, weights_only=True)["state_dict"]
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == names
    assert all(name.startswith(("model.", "metrics.")) for name in saved)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_hard_loss_is_the_objective_itself(weight, ready, tiny_model, teacher_of):
    plain = MarginalObjective(kind="rag_token", label_smoothing=0.1)
    run, batch = ready(plain)
    with torch.no_grad():
        expected = outcome_of(run, batch).loss_B
        run.module.objective = KnowledgeDistillation(
            objective=plain, teacher=teacher_of(tiny_model(seed=5)), hard_weight=weight
        )
        outcome = outcome_of(run, batch)
    torch.testing.assert_close(outcome.terms["hard"], expected)
    torch.testing.assert_close(outcome.loss_B, weight * expected + outcome.terms["soft"])


# ---------------------------------------------------------------------- the teacher's answers


def answers_file(path, tiny_questions, json_lines, **changes):
    records = [
        {"id": q["id"], "question": q["question"], "answer": f"Taught {n}"} for n, q in enumerate(tiny_questions)
    ]
    return json_lines(path, [{**record, **changes.get(record["id"], {})} for record in records])


def test_training_reads_the_teachers_answers_and_evaluation_gold(
    tiny_run, tiny_world, tiny_questions, json_lines, tmp_path
):
    file = answers_file(tmp_path / "taught.jsonl", tiny_questions, json_lines)
    run = tiny_run(data={"answers_from": str(file), "validation": str(tiny_world.validation)})
    run.data.setup("fit")
    assert [question.answers for question in run.data.questions["train"]] == [(f"Taught {n}",) for n in range(13)]
    assert run.data.questions["validation"][0].answers == tuple(tiny_questions[13]["answers"])
    assert run.data.questions["train"][3].positive_passage_ids == ("film-3",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q-4": {"id": "other"}}, "expected an answer to each training question, came none for 'q-4'"),
        ({"q-4": {"answer": "  "}}, "came an empty answer for 'q-4'"),
        ({"q-4": {"id": "q-3"}}, "line 5: expected each question id once, came 'q-3' again"),
        ({"q-4": {"answer": None}}, "line 5: field 'answer': expected a string, came NoneType"),
    ],
)
def test_answers_that_would_train_on_nothing_are_refused(
    changes, message, tiny_run, tiny_questions, json_lines, tmp_path
):
    file = answers_file(
        tmp_path / "taught.jsonl", tiny_questions, json_lines, **{k.replace("_", "-"): v for k, v in changes.items()}
    )
    run = tiny_run(data={"answers_from": str(file)})
    with pytest.raises(DataError, match=message):
        run.data.setup("fit")


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature: expected a number above 0, got 0.0"),
        ({"temperature": -1.0}, "distill.temperature: expected a number above 0, got -1.0"),
        ({"temperature": math.nan}, "distill.temperature: expected a number above 0, got nan"),
        ({"temperature": math.inf}, "distill.temperature: expected a number above 0, got inf"),
        ({"hard_weight": math.nan}, "distill.hard_weight: expected 0 or more, got nan"),
        ({"soft_weight": -1.0}, "distill.soft_weight: expected 0 or more, got -1"),
        ({"soft_weight": 0.0}, "expected soft_weight or posterior_weight above 0, got 0 for both"),
        ({"top_tokens": 0}, "distill.top_tokens: expected at least 1, or null"),
        ({"cache": "somewhere"}, "distill.cache: expected distill.passages=own, got student"),
        (
            {"passages": "own", "posterior_weight": 1.0},
            "distill.posterior_weight: .* Expected distill.passages=student",
        ),
        ({"objective": ClosedBook()}, "distill.passages=student: expected a student that retrieves"),
        ({"objective": Contrastive()}, "distill: expected an objective that scores answers .*, got Contrastive"),
        (
            {
                "objective": MarginalObjective(
                    kind="rag_token", marginal_weight=0.0, retriever_losses={"a": PerplexityDistillation()}
                )
            },
            "distill.soft_weight: soft targets teach the generator, which objective.marginal_weight=0 leaves",
        ),
    ],
)
def test_settings_that_contradict_are_refused(settings, message):
    usual = {"objective": MarginalObjective(kind="rag_token"), "teacher": Teacher(source="anywhere")}
    with pytest.raises(ConfigError, match=message):
        KnowledgeDistillation(**{**usual, **settings})


def test_a_teacher_of_another_vocabulary_is_refused(tiny_run, tiny_model, teacher_of, tmp_path):
    tokenizer = train_word_tokenizer(["other words than the student knows"], vocab_size=80)
    tokenizer.save_pretrained(tmp_path / "other")
    teacher = teacher_of(tiny_model(seed=5, tokenizer=str(tmp_path / "other")))
    objective = KnowledgeDistillation(objective=MarginalObjective(kind="rag_token"), teacher=teacher)
    with pytest.raises(
        ConfigError,
        match=r"distill.teacher=.*teacher: expected a teacher of the student's vocabulary.*"
        r"The student has \d+ tokens of tokenizer \w{12} .*the teacher has \d+ tokens of tokenizer \w{12}"
        r".*data.answers_from",
    ):
        tiny_run(objective=objective)


def test_what_nothing_learns_from_is_refused(tiny_run, tiny_model, teacher_of):
    teacher = teacher_of(tiny_model(seed=5))
    base = MarginalObjective(kind="rag_token")
    for settings, frozen, message in (
        ({}, {"train_generator": False}, "soft_weight=1.0 would teach nothing.*optim.train_generator=true"),
        (
            {"posterior_weight": 1.0},
            {"train_query_encoder": False},
            "posterior_weight=1.0 would teach nothing.*optim.train_query_encoder=true",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_run(objective=KnowledgeDistillation(objective=base, teacher=teacher, **settings), optim=frozen)
    losses = {"pdist": PerplexityDistillation()}
    taught = MarginalObjective(kind="fid", retriever_losses=losses)
    with pytest.raises(ConfigError, match="retriever_loss: pdist would teach nothing"):
        tiny_run(
            objective=KnowledgeDistillation(objective=taught, teacher=teacher), optim={"train_query_encoder": False}
        )


def test_a_closed_book_teacher_is_given_no_passages(tiny_run, tiny_model, teacher_of):
    teacher = teacher_of(tiny_model(seed=5, num_passages=0))
    objective = KnowledgeDistillation(objective=MarginalObjective(kind="rag_token"), teacher=teacher)
    with pytest.raises(ConfigError, match=r"expected a teacher that reads passages, .* Set distill.passages=own"):
        tiny_run(objective=objective)


def test_a_teacher_without_an_index_has_no_passages_of_its_own(ready, tiny_model, teacher_of):
    run, batch = ready(closed_book(teacher_of(tiny_model(seed=5))), tiny_model(num_passages=0))
    with pytest.raises(ConfigError, match="distill.passages=own: expected a teacher saved with its index"):
        outcome_of(run, batch)


# ---------------------------------------------------------------------- with other ways of reading


def with_settings(model, **settings):
    model.settings = replace(model.settings, **settings)
    return RagModel.from_parts(model.parts())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_of_a_null_passage_the_teachers_posterior_says_nothing(direction, ready, tiny_model, teacher_of):
    """Once the null passage was taken for one that the teacher holds impossible, and driven to nothing."""
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"),
        teacher=teacher_of(tiny_model(seed=5)),
        soft_weight=0.0,
        hard_weight=0.0,
        posterior_weight=1.0,
        direction=direction,
    )
    run, batch = ready(objective, with_settings(tiny_model(), null_passage=True))
    model = run.module.model.eval()
    outcome = outcome_of(run, batch)
    outcome.loss_B.sum().backward()
    vector = model.null_passage.vector_D
    assert vector.grad is None or not vector.grad.any()
    assert any(weight.grad is not None and weight.grad.any() for weight in model.encoder.query.parameters())
    lesson = objective.teacher.on_students_passages(batch, outcome.hits, run.data.assembler)
    log_prior = outcome.doc_scores_BK[:, :-1].div(model.settings.temperature).log_softmax(dim=1)
    one, other = (
        (lesson.log_posterior_BK, log_prior) if direction == "forward" else (log_prior, lesson.log_posterior_BK)
    )
    torch.testing.assert_close(outcome.loss_B, (one.exp() * (one - other)).sum(dim=1), atol=1e-5, rtol=1e-4)


def test_a_teacher_with_one_prompt_judges_each_passage_by_reading_it_alone(ready, tiny_model, teacher_of):
    """Once its posterior was its prior, whatever the answer."""
    teacher = teacher_of(with_settings(tiny_model(seed=5), objective="stuffed", decoding="stuffed"))
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="rag_token"), teacher=teacher, soft_weight=1.0, posterior_weight=1.0
    )
    run, batch = ready(objective, tiny_model())
    outcome = outcome_of(run, batch)
    lesson = teacher.on_students_passages(batch, outcome.hits, run.data.assembler)
    other = teacher.on_students_passages(
        replace(batch, labels=batch.labels.roll(1, dims=0)), outcome.hits, run.data.assembler
    )
    assert not torch.allclose(lesson.log_posterior_BK, other.log_posterior_BK)
    apart = with_settings(teacher.model, objective="rag_token")
    contexts = run.data.assembler.contexts(outcome.hits.ids_BK, batch.prompt)
    scores = teacher._scores(batch, outcome.hits.ids_BK, run.data.corpus)
    expected = apart.marginal(RagBatch(contexts, scores, batch.labels)).log_posterior_BK
    torch.testing.assert_close(lesson.log_posterior_BK, expected, atol=1e-4, rtol=1e-4)


def test_a_student_with_one_prompt_learns_from_soft_targets(ready, tiny_model, teacher_of):
    objective = KnowledgeDistillation(
        objective=MarginalObjective(kind="stuffed"), teacher=teacher_of(tiny_model(seed=5)), hard_weight=0.0
    )
    run, batch = ready(objective, with_settings(tiny_model(), objective="stuffed", decoding="stuffed"))
    outcome_of(run, batch).loss_B.sum().backward()
    assert moved(run.module.model) == {"generator"}


def test_a_teacher_that_would_find_what_was_masked_is_refused(tiny_model, teacher_of):
    with pytest.raises(ConfigError, match="distill.passages=own: expected objective.examples=questions, got salient"):
        KnowledgeDistillation(
            objective=MarginalObjective(kind="rag_token", examples="salient_spans"),
            teacher=teacher_of(tiny_model(seed=5)),
            passages="own",
        )


def test_retriever_losses_that_would_count_nothing_are_refused(tiny_model, teacher_of):
    base = MarginalObjective(kind="rag_token", retriever_losses={"pdist": PerplexityDistillation()})
    with pytest.raises(ConfigError, match="pdist would be computed and count nothing, as distill.hard_weight=0"):
        KnowledgeDistillation(objective=base, teacher=teacher_of(tiny_model(seed=5)), hard_weight=0.0)
