"""When the index is made anew, and what is kept when that fails."""

import csv
import errno

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from rag_lightning.errors import ConfigError, CorruptSnapshotError
from rag_lightning.index import snapshot as snapshot_module
from rag_lightning.index.snapshot import SnapshotStore, open_snapshot
from rag_lightning.training.live_index import LiveIndex
from rag_lightning.training.reindex import ReindexSchedule

BOTH = {"train_passage_encoder": True}


def due(schedule, stop=6000):
    return [step for step in range(stop) if ReindexSchedule.parse(schedule).is_due(step)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (1500, [1500, 3000, 4500]),
        ("1500", [1500, 3000, 4500]),
        ("0-1000:500,1000-:2000", [500, 1000, 3000, 5000]),
        ("1000-3000:1000", [2000, 3000]),
        ("0-1000:400,2000-:1500", [400, 800, 3500, 5000]),
        (" 0-1000:500 , 1000-:4000 ", [500, 1000, 5000]),
        (None, []),
        ("none", []),
        ("", []),
    ],
)
def test_schedules(schedule, expected):
    assert due(schedule) == expected


@given(period=st.integers(1, 50), step=st.integers(0, 500))
def test_a_period_is_its_multiples(period, step):
    assert ReindexSchedule.parse(period).is_due(step) == (step > 0 and step % period == 0)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("often", "expected a number of steps or pieces such as '0-1000:500,1000-:2000', got 'often'"),
        ("0-1000", "expected a number of steps or pieces"),
        ("-5:3", "expected a number of steps or pieces"),
        ("0-1000:x", "expected a period of at least 1 step"),
        ("0-1000:0", "expected a period of at least 1 step"),
        (0, "expected a period of at least 1 step, got 0"),
        ("1000-500:10", "expected each piece to end after it starts, got '1000-500:10'"),
        ("0-1000:10,500-:20", "expected pieces in order without overlap"),
        ("0-:10,500-:20", "expected pieces in order without overlap"),
        ("-3", "expected a number of steps or pieces"),
        ("1.5", "expected a number of steps or pieces"),
        ("0-10:5,", "expected a number of steps or pieces"),
    ],
)
def test_nonsense_is_refused(schedule, message):
    with pytest.raises(ConfigError, match=message):
        ReindexSchedule.parse(schedule)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_refreshes_happen_at_the_steps_that_are_due_and_once(accumulate, tiny_run, monkeypatch):
    built = []
    build = LiveIndex.build

    def counted(index, step, **probe):
        built.append(step)
        return build(index, step, **probe)

    monkeypatch.setattr(LiveIndex, "build", counted)
    run = tiny_run(
        schedule="0-4:2,4-:3",
        optim=BOTH,
        max_steps=8,
        accumulate_grad_batches=accumulate,
        data={"batch_size": 2},
    ).fit()
    assert built == [0, 2, 4, 7]
    live = [0] * 2 + [2] * 2 + [4] * 3 + [7] * 2  # by step, counted from 0
    micro = zip(run.recorder.steps, run.recorder.snapshots, strict=True)
    assert all(int(name[4:12]) == live[step] for step, name in micro)
    searched = [max(0, steps - 1) for steps in run.recorder.steps if accumulate == 1]
    if accumulate == 1:  # the age that a step logs is that of the index it searched
        assert run.recorder.ages == [float(step - live[step]) for step in searched]


def test_each_refresh_is_logged_with_overlap_and_age(tiny_run, tiny_world, tmp_path):
    run = tiny_run(
        schedule=3,
        optim=BOTH,
        max_steps=7,
        data={"validation": str(tiny_world.validation)},
        logger=CSVLogger(str(tmp_path), name="logs"),
        log_every_n_steps=2,  # refreshes fall between the logged steps too
    ).fit()
    with next(tmp_path.rglob("metrics.csv")).open() as stream:
        rows = list(csv.DictReader(stream))
    refreshes = {int(row["step"]): row for row in rows if row["reindex/overlap@3"]}
    assert set(refreshes) == {2, 5}  # the third and the sixth step, counted from 0
    for row in refreshes.values():
        assert 0.0 <= float(row["reindex/overlap@3"]) <= 1.0
        assert float(row["reindex/replaced_age_steps"]) == 3.0
        assert float(row["reindex/seconds"]) > 0.0
    ages = {int(row["step"]): float(row["index/age_steps"]) for row in rows if row["index/age_steps"]}
    assert ages == {1: 1.0, 3: 0.0, 5: 2.0}
    assert [float(row["val/index_age_steps"]) for row in rows if row["val/index_age_steps"]] == [1.0]
    kept = [int(name[4:12]) for name in SnapshotStore(run.data.index_dir).ids()]
    assert kept == [3, 6]  # keep_last=2


def test_overlap_is_that_of_the_two_indexes(tiny_run, tmp_path):
    """Against a search of both snapshots by hand."""
    run = tiny_run(schedule=4, optim=BOTH, max_steps=4, logger=CSVLogger(str(tmp_path)), log_every_n_steps=1).fit()
    old, new = (SnapshotStore(run.data.index_dir).open(name) for name in SnapshotStore(run.data.index_dir).ids())
    run.module.eval()
    questions = run.data.questions["train"]
    with torch.no_grad():
        queries_BD = run.module.model.encoder.query(run.module.model.query_tokens([q.question for q in questions]))
    kept = [
        len(set(before.tolist()) & set(after.tolist())) / 3
        for before, after in zip(old.index.search(queries_BD, 3)[1], new.index.search(queries_BD, 3)[1], strict=True)
    ]
    with next(tmp_path.rglob("metrics.csv")).open() as stream:
        (logged,) = [float(row["reindex/overlap@3"]) for row in csv.DictReader(stream) if row["reindex/overlap@3"]]
    assert logged == pytest.approx(sum(kept) / len(kept))


def test_a_schedule_without_trained_passage_encoder_is_refused(tiny_run):
    with pytest.raises(
        ConfigError, match="the passage encoder does not learn.*train_passage_encoder=true.*reindex=none"
    ):
        tiny_run(schedule=2).fit()


def test_probing_leaves_dropout_as_it_was(tiny_run, tiny_model):
    run = tiny_run(model=tiny_model(dropout=0.3), schedule=2, optim={**BOTH, "train_generator": False}, max_steps=3)
    run.fit()
    model = run.module.model
    assert model.encoder.query.training
    assert model.encoder.passage.training
    assert not model.generator.training


def test_the_test_searches_an_index_of_the_trained_tower(tiny_run, tiny_world):
    run = tiny_run(optim=BOTH, max_steps=3, data={"test": str(tiny_world.test)}).fit()
    assert run.data.snapshot_step == 0
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    manifest = run.data.dense.snapshot.manifest
    assert manifest.encoder_hash == run.module.model.encoder.passage_hash()
    assert manifest.step == 3
    assert figures["test/index_age_steps"] == 0.0


def test_a_frozen_tower_keeps_its_index_for_the_test(tiny_run, tiny_world):
    run = tiny_run(max_steps=3, data={"test": str(tiny_world.test)}).fit()
    run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert len(SnapshotStore(run.data.index_dir).ids()) == 1


class FullDisk(L.Callback):
    """From a step on, writing an index fails."""

    def __init__(self, monkeypatch, *, step: int) -> None:
        self.monkeypatch = monkeypatch
        self.step = step

    def on_train_batch_start(self, trainer, *_: object) -> None:
        if trainer.global_step == self.step:

            def full(path, vectors):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")

            self.monkeypatch.setattr(snapshot_module, "write_vectors", full)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_full_disk_ends_the_run_with_a_checkpoint_and_the_old_index(tiny_run, tmp_path, monkeypatch):
    settings = {"schedule": 2, "optim": BOTH, "max_steps": 5, "index_dir": tmp_path / "index"}
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", save_last=True, save_on_exception=True)
    with monkeypatch.context() as patch:
        run = tiny_run(callbacks=[FullDisk(patch, step=3), checkpoint], **settings)
        with pytest.raises(CorruptSnapshotError, match="No space left on device.*Published snapshots are untouched"):
            run.fit()
    assert run.recorder.steps == [1, 2, 3]
    store = SnapshotStore(tmp_path / "index")
    assert [int(name[4:12]) for name in store.ids()] == [0, 2]
    assert sorted(path.name for path in store.root.iterdir()) == store.ids()  # nothing half built
    assert run.data.dense.snapshot_id == store.ids()[-1]
    assert open_snapshot(store.root / store.ids()[-1]).manifest.step == 2

    resumed = tiny_run(**settings).fit(tmp_path / "ckpt" / "last.ckpt")  # there is space again
    whole = tiny_run(**{**settings, "index_dir": tmp_path / "other"}).fit()
    assert run.recorder.losses == whole.recorder.losses[:3]
    assert resumed.recorder.losses == whole.recorder.losses[4:]  # the missed refresh was made up for
    assert resumed.recorder.snapshots == whole.recorder.snapshots[4:]
