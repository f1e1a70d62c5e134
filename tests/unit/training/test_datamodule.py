"""RagDataModule: every bad input is refused before anything trains, and one snapshot is live at a time."""

import json
import logging
import os
from dataclasses import replace

import pytest
import torch

from rag_lightning.errors import ConfigError, CorruptSnapshotError, DataError, MissingFileError, StaleIndexError
from rag_lightning.index.snapshot import SnapshotStore, open_snapshot
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.live_index import IndexSettings
from rag_lightning.training.objectives import ClosedBook, Contrastive, Denoising, MarginalObjective
from rag_lightning.utils import distributed


def prepared(run, stage="fit"):
    run.data.setup(stage)
    return run.data


# ---------------------------------------------------------------------- bad input


def test_missing_files_are_named(tiny_run, tmp_path):
    for name in ("passages", "train", "validation", "test"):
        with pytest.raises(MissingFileError, match=f"no such file: .*nowhere-{name}.jsonl"):
            prepared(tiny_run(data={name: str(tmp_path / f"nowhere-{name}.jsonl")}))


def test_files_that_are_wanted_and_not_given_are_named(tiny_run):
    with pytest.raises(ConfigError, match="data.passages: expected a passage file, this objective needs one"):
        prepared(tiny_run(data={"passages": None}))
    with pytest.raises(ConfigError, match="data.train: expected a question file to train on, came none"):
        prepared(tiny_run(data={"train": None}))


def test_more_passages_than_the_corpus_has(tiny_run, tiny_model, tiny_world):
    run = tiny_run(model=tiny_model(num_passages=25))
    with pytest.raises(ConfigError, match=r"num_passages: expected at most the 24 passages of .*, got 25: lower"):
        prepared(run)
    assert prepared(tiny_run(model=tiny_model(num_passages=24))).corpus.hash


def test_a_malformed_line_names_file_line_and_field(tiny_run, tmp_path):
    path = tmp_path / "train.jsonl"
    good = '{"id": "1", "question": "who made Amber", "answers": ["Ada Ash"]}\n'
    for line, message in [
        ('{"id": "2", "question": "who"', r"train.jsonl, line 2: expected one JSON object"),
        ('{"id": "2", "question": "who", "answers": []}', r"line 2: field 'answers': expected at least one answer"),
        ('{"id": "2", "question": "who", "answers": [""]}', r"line 2: field 'answers': .* non-empty strings"),
        ('{"id": "1", "question": "who", "answers": ["a"]}', r"id '1' on line 1 and again on line 2"),
        (
            '{"id": "2", "question": "who", "answers": ["a"], "positive_passage_ids": ["film-99"]}',
            r"line 2: field 'positive_passage_ids': .* came 'film-99'",
        ),
    ]:
        path.write_text(good + line + "\n")
        with pytest.raises(DataError, match=message):
            prepared(tiny_run(data={"train": str(path)}))
    path.write_text("")
    with pytest.raises(DataError, match="expected at least one question, came none"):
        prepared(tiny_run(data={"train": str(path)}))


def test_regex_questions_cannot_be_trained_on_but_can_be_tested_on(tiny_run, json_lines, tmp_path):
    path = json_lines(tmp_path / "trec.jsonl", [{"id": "t1", "question": "who made Amber", "answer_regex": "Ada|Ash"}])
    with pytest.raises(DataError, match="trec.jsonl: question 't1' has no answer string to train on .*CuratedTREC"):
        prepared(tiny_run(data={"train": str(path)}))
    run = tiny_run(data={"test": str(path)}, max_steps=1).fit()
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert figures["test/exact_match"] in (0.0, 1.0)
    assert "test/f1" not in figures
    assert "test/nll" not in figures
    assert figures["test/answer_mrr"] >= 0.0


def test_warm_up_objectives_name_the_question_without_gold_passage(tiny_run, json_lines, tmp_path):
    path = json_lines(tmp_path / "bare.jsonl", [{"id": "bare", "question": "who made Amber", "answers": ["Ada Ash"]}])
    for objective in (Denoising(), Contrastive()):
        with pytest.raises(DataError, match="question 'bare' has no positive_passage_ids"):
            tiny_run(objective=objective, data={"train": str(path)}, optim={"train_passage_encoder": True}).fit()


def test_inverse_cloze_needs_no_questions(tiny_run):
    objective = Contrastive(examples="inverse_cloze")
    data = {"train": None, "batch_size": 12}
    run = tiny_run(objective=objective, data=data, optim={"train_passage_encoder": True}, max_steps=2).fit()
    assert run.recorder.losses[0] > 0


def test_a_retriever_can_practise_on_spans_of_passages(tiny_run):
    data = {"batch_size": 12, "denoising": {"copy_share": 1.0, "rename_share": 0.5}}
    objective = Contrastive(examples="denoising")
    run = tiny_run(objective=objective, data=data, optim={"train_passage_encoder": True}, max_steps=2).fit()
    batch = next(iter(run.data.train_dataloader()))
    assert all(question.id.startswith("span-") for question in batch.questions)
    assert batch.passages is not None
    assert run.recorder.losses[0] > 0


@pytest.mark.parametrize("objective", [Contrastive(), Contrastive(examples="inverse_cloze")])
def test_nothing_to_contrast_with_is_refused(objective, tiny_run):
    with pytest.raises(ConfigError, match="data.batch_size: expected at least 2 examples .*negatives, got 1"):
        tiny_run(objective=objective, data={"batch_size": 1}, optim={"train_passage_encoder": True}).fit()


@pytest.mark.parametrize(("batch_size", "refused"), [(3, True), (4, False)])
def test_processes_that_share_no_negatives_need_two_questions_each(batch_size, refused, tiny_run, monkeypatch):
    settings = {"data": {"batch_size": batch_size}, "optim": {"train_passage_encoder": True}}
    together = prepared(tiny_run(objective=Contrastive(), **settings))
    apart = prepared(tiny_run(objective=Contrastive(cross_process=False), **settings))
    together.trainer = apart.trainer = None
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert together.train_dataloader().world_size == 2  # two questions in all are enough
    if refused:
        with pytest.raises(ConfigError, match="at least 4 examples over all .*of its process as negatives, got 3"):
            apart.train_dataloader()
    else:
        assert apart.train_dataloader().world_size == 2


def test_hard_negatives_come_with_training_batches_only(tiny_run, tiny_world, json_lines, tmp_path):
    rows = [
        json.loads(line) | {"negative_passage_ids": ["film-20"]} for line in tiny_world.train.read_text().splitlines()
    ]
    path = str(json_lines(tmp_path / "mined.jsonl", rows))
    objective = Contrastive(hard_negatives=2)
    data = prepared(
        tiny_run(objective=objective, data={"train": path, "validation": path}, optim={"train_passage_encoder": True})
    )
    data.trainer = None
    batch = next(iter(data.train_dataloader()))
    assert batch.negative_ids_BM.shape == (4, 2)
    assert (batch.negative_ids_BM == 20).any(dim=1).all()
    assert next(iter(data.val_dataloader())).negatives is None


def test_fewer_questions_than_processes_is_refused(tiny_run, monkeypatch):
    data = prepared(tiny_run(data={"batch_size": 2}))
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="batch_size: expected at least one question for each of 3 processes, got 2"):
        data.train_dataloader()


def test_long_passages_are_counted_and_reported_once(tiny_run, json_lines, tiny_passages, tmp_path, caplog):
    long = [{**row, "text": row["text"] + " made by" * 60} if row["id"] < "film-2" else row for row in tiny_passages]
    count = sum(row["id"] < "film-2" for row in tiny_passages)
    path = json_lines(tmp_path / "long.jsonl", long)
    with caplog.at_level(logging.WARNING, logger="rag_lightning"):
        prepared(tiny_run(data={"passages": str(path), "cache_dir": str(tmp_path / "cache")}))
    reports = [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()]
    assert len(reports) == 2  # one for the generator's vocabulary, one for the encoder's
    assert all(str(count) in report and "40" in report for report in reports), reports


def test_use_before_set_up_is_refused(tiny_model):
    data = RagDataModule()
    for use, message in [
        (lambda: data.model, "call bind"),
        (lambda: data.corpus, "this run reads no passages"),
        (lambda: data.assembler, r"setup\(\) has not run"),
        (lambda: data.encoder_tokens(torch.zeros(1, 1, dtype=torch.long)), "no passage encoder"),
    ]:
        with pytest.raises(ConfigError, match=message):
            use()


# ---------------------------------------------------------------------- splits


def test_splits_are_read_and_limited(tiny_run, tiny_world):
    splits = {"validation": str(tiny_world.validation), "test": str(tiny_world.test)}
    data = prepared(tiny_run(data={**splits, "limit_validation": 3}))
    assert {name: len(questions) for name, questions in data.questions.items()} == {
        "train": 13,
        "validation": 5,
        "test": 5,
    }
    assert [len(batch.questions) for batch in data.val_dataloader()] == [3]
    assert [q.id for batch in data.test_dataloader() for q in batch.questions] == [f"q-{n}" for n in range(18, 23)]
    assert prepared(tiny_run()).val_dataloader() == []
    only_test = prepared(tiny_run(data=splits), "test")
    assert set(only_test.questions) == {"test"}


def test_closed_book_needs_no_passages(tiny_run, tiny_model):
    run = tiny_run(model=tiny_model(num_passages=0), objective=ClosedBook(), data={"passages": None}, max_steps=1).fit()
    assert run.data.retriever is None
    assert run.data.state_dict() == {}


# ---------------------------------------------------------------------- the live index


def indexed(run):
    data = prepared(run)
    data.ensure_index(step=0)
    return data


def test_the_index_holds_the_passage_towers_vectors_in_corpus_order(tiny_run, tiny_model):
    run = tiny_run(model=tiny_model(dropout=0.5))  # encoding the corpus drops nothing
    data = indexed(run)
    run.module.model.eval()
    with torch.no_grad():
        for row, passage in enumerate(data.corpus):
            tokens = data._passage_tokens.batch_of([passage])
            vector_D = run.module.model.encoder.passage(tokens)[0]
            torch.testing.assert_close(data.retriever.vectors(torch.tensor([[row]]))[0, 0], vector_D)
    manifest = data.dense.snapshot.manifest
    assert (manifest.num_vectors, manifest.dimension, manifest.step) == (24, 16, 0)
    assert manifest.encoder_hash == run.module.model.encoder.passage_hash()


def test_a_live_index_is_kept_unless_a_fresh_one_is_asked_for_and_needed(tiny_run):
    run = tiny_run()
    data = indexed(run)
    first = data.dense.snapshot_id
    data.ensure_index(step=7, fresh=True)
    assert data.dense.snapshot_id == first  # the tower has not changed
    with torch.no_grad():
        next(run.module.model.encoder.passage.parameters()).add_(0.1)
    data.ensure_index(step=8)
    assert data.dense.snapshot_id == first
    data.ensure_index(step=9, fresh=True)
    assert data.dense.snapshot_id != first
    assert data.snapshot_step == 9
    assert len(SnapshotStore(run.data.index_dir).ids()) == 2


def test_a_ready_snapshot_is_used_if_it_belongs_to_tower_and_corpus(
    tiny_run, tiny_model, json_lines, tiny_passages, tmp_path
):
    snapshot = indexed(tiny_run()).dense.snapshot
    again = indexed(tiny_run(data={"index": IndexSettings(snapshot=str(snapshot.path))}))
    assert again.dense.snapshot_id == snapshot.id
    assert not again.index_dir.exists()  # nothing was encoded
    manifest = replace(again.dense.snapshot.manifest, step=500)
    again.dense.swap(replace(again.dense.snapshot, manifest=manifest))
    assert again.snapshot_step == 0  # those were another run's steps
    with pytest.raises(StaleIndexError, match=rf"(?s){snapshot.manifest.encoder_hash[:12]}"):
        indexed(tiny_run(model=tiny_model(seed=5), data={"index": IndexSettings(snapshot=str(snapshot.path))}))
    fewer = json_lines(tmp_path / "passages.jsonl", tiny_passages[:20])
    with pytest.raises(StaleIndexError, match=rf"(?s){snapshot.manifest.corpus_hash[:12]}"):
        indexed(tiny_run(data={"index": IndexSettings(snapshot=str(snapshot.path)), "passages": str(fewer)}))


def test_a_snapshot_of_another_metric_is_refused(tiny_run, tiny_model):
    snapshot = indexed(tiny_run()).dense.snapshot
    model = tiny_model()
    object.__setattr__(model.settings, "metric", "l2")
    with pytest.raises(StaleIndexError, match="expected metric 'l2' as the model's, came 'inner_product'"):
        indexed(tiny_run(model=model, data={"index": IndexSettings(snapshot=str(snapshot.path))}))


def test_a_torn_snapshot_is_refused(tiny_run):
    snapshot = indexed(tiny_run()).dense.snapshot
    file = snapshot.path / "vectors.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptSnapshotError, match="vectors.npy"):
        indexed(tiny_run(data={"index": IndexSettings(snapshot=str(snapshot.path))}))


def test_a_full_disk_leaves_the_live_snapshot_as_it_was(tiny_run, monkeypatch):
    run = tiny_run()
    data = indexed(run)
    live = data.dense.snapshot

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CorruptSnapshotError, match="No space left on device.*need.*are free"):
            data.index.build(5)
    assert data.dense.snapshot_id == live.id
    assert SnapshotStore(data.index_dir).ids() == [live.id]
    assert [path.name for path in data.index_dir.iterdir()] == [live.id]  # no half-built folder
    assert open_snapshot(live.path).id == live.id
    assert data.index.build(5).manifest.step == 5  # and it goes on once there is space


def test_state_names_the_live_snapshot_and_restores_it(tiny_run, tiny_model, tmp_path):
    index = tmp_path / "index"
    data = indexed(tiny_run(index_dir=index))
    state = data.state_dict()
    other = tiny_run(model=tiny_model(seed=8), index_dir=index)  # its tower has moved on since
    prepared(other)
    other.data.load_state_dict(state)
    other.data.ensure_index(step=12)
    assert other.data.dense.snapshot_id == state["snapshot_id"] == data.dense.snapshot_id


def test_faiss_serves_the_same_passages(tiny_run):
    pytest.importorskip("faiss")
    flat = tiny_run(data={"index": IndexSettings(factory="Flat")}, max_steps=3).fit()
    exact = tiny_run(max_steps=3).fit()
    assert flat.recorder.losses == pytest.approx(exact.recorder.losses, rel=1e-5)
    assert flat.data.dense.snapshot.manifest.factory == "Flat"
    with pytest.raises(ConfigError, match="Nonsense"):
        indexed(
            tiny_run(data={"index": IndexSettings(factory="Nonsense17")}, objective=MarginalObjective(kind="rag_token"))
        )


# ---------------------------------------------------------------------- knowledge for metrics


def test_the_gold_passages_are_known_to_metrics_without_retrieval_too(tiny_run, tiny_model):
    run = tiny_run(model=tiny_model(num_passages=0), objective=ClosedBook())
    data = prepared(run)
    asked = [*data.questions["train"][:1], replace(data.questions["train"][1], positive_passage_ids=())]
    two = replace(asked[0], positive_passage_ids=("film-0", "film-1"))
    first, none, both = data.knowledge([*asked, two])
    assert first.startswith("Amber Amber was made by Ada Ash.")
    assert none is None
    assert both == f"{first} {data.knowledge([data.questions['train'][1]])[0]}"
    with_corpus = prepared(tiny_run())
    assert with_corpus.knowledge(asked) == [first, None]
    without = tiny_run(model=tiny_model(num_passages=0), objective=ClosedBook(), data={"passages": None})
    assert prepared(without).knowledge(asked) == [None, None]
