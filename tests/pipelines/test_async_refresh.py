"""A refresh beside training: the same trajectory without lag, and nothing lost whatever dies."""

import contextlib
import inspect
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import ConfigError
from rag_lightning.index.snapshot import SnapshotStore, open_snapshot
from rag_lightning.retrieval import index_builder
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.retrieval.index_builder import IndexBuilder, RefreshJob, copy_of_passage_tower, write_job
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.training.async_refresh import AsyncRefresher
from rag_lightning.training.live_index import LiveIndex
from rag_lightning.training.reindex import _check_settings

BOTH = {"train_passage_encoder": True}
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Slow(L.Callback):
    """Steps that take a while, until enough refreshes have gone live."""

    def __init__(self, *, seconds: float = 0.03, refreshes: int = 1, most: float = 400.0) -> None:
        self.seconds, self.refreshes, self.until = seconds, refreshes, time.monotonic() + most

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        time.sleep(self.seconds)
        seen = {name for name in trainer.callbacks[2].snapshots if not name.startswith("step00000000")}
        trainer.should_stop = len(seen) >= self.refreshes or time.monotonic() > self.until


class CtrlC(L.Callback):
    """Presses Ctrl-C during a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def whole(root: Path) -> list[int]:
    """The steps of the published snapshots, each opened and verified."""
    return [open_snapshot(root / name).manifest.step for name in SnapshotStore(root).ids()]


def test_without_lag_the_trajectory_is_the_synchronous_one(tiny_run):
    sync = tiny_run(schedule=2, optim=BOTH, max_steps=7).fit()
    beside = tiny_run(schedule=2, optim=BOTH, max_steps=7, reindex={"mode": "async", "lag_steps": 0}).fit()
    assert beside.recorder.snapshots == sync.recorder.snapshots  # the ids hold a hash of the vectors
    assert beside.recorder.losses == sync.recorder.losses
    for name, value in sync.weights().items():
        assert torch.equal(beside.weights()[name], value), name
    assert len(set(sync.recorder.snapshots)) == 4


def test_a_lag_is_kept_exactly_and_resumed(tiny_run, tmp_path):
    """Checkpoints are taken while refreshes are under way: a resumed run goes on with the tower of that step."""
    settings = {"schedule": 4, "optim": BOTH, "reindex": {"mode": "async", "lag_steps": 3}}
    run = tiny_run(max_steps=14, index_dir=tmp_path / "a", **settings).fit()
    steps = [int(name[4:12]) for name in run.recorder.snapshots]
    assert steps == [0] * 6 + [4] * 4 + [8] * 4  # begun at 4, 8 and 12; live at the end of 7, 11 and 15
    assert run.recorder.ages == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5]

    for step in (5, 9):  # under way since 4; since 8
        place = {"index_dir": tmp_path / f"stopped-{step}", "max_steps": 14}
        last = ModelCheckpoint(dirpath=tmp_path / f"ckpt-{step}", save_last=True, save_on_exception=True)
        with pytest.raises(SystemExit):
            tiny_run(callbacks=[CtrlC(step), last], **place, **settings).fit()
        resumed = tiny_run(**place, **settings).fit(tmp_path / f"ckpt-{step}" / "last.ckpt")
        assert resumed.recorder.losses == run.recorder.losses[step:]
        assert resumed.recorder.snapshots == run.recorder.snapshots[step:]


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [6, 8]), (3, [4, 6, 8])])  # 6 is the last checkpoint's
def test_old_snapshots_are_collected_and_an_old_checkpoint_gets_a_fresh_one(
    keep_last, kept, tiny_run, tmp_path, caplog
):
    settings = {"schedule": 2, "optim": BOTH, "index_dir": tmp_path / "index", "max_steps": 9}
    settings["reindex"] = {"keep_last": keep_last}
    keep = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    tiny_run(callbacks=[keep], **settings).fit()
    assert whole(tmp_path / "index") == kept
    resumed = tiny_run(**settings).fit(tmp_path / "ckpt" / "step=3.ckpt")
    assert "the checkpoint's index snapshot step00000002-" in caplog.text
    assert [int(name[4:12]) for name in resumed.recorder.snapshots] == [4, 4, 6, 6, 8, 8]


def test_training_goes_on_and_takes_the_snapshot_when_it_is_there(tiny_run, caplog):
    with caplog.at_level(logging.INFO, logger="rag_lightning"):
        run = tiny_run(
            schedule="0-5:5", optim=BOTH, max_steps=5000, max_epochs=-1, reindex={"mode": "async"}, callbacks=[Slow()]
        ).fit()
    (message,) = [text for text in caplog.messages if "index refreshed" in text]
    assert "'reindex/lag_steps': " in message
    steps = [int(name[4:12]) for name in run.recorder.snapshots]
    assert sorted(set(steps)) == [0, 5]
    assert steps.count(0) > 5  # it did not wait
    assert sorted(path.name for path in run.data.index_dir.iterdir() if path.name.startswith(".job")) == []


def test_a_builder_that_is_killed_costs_an_attempt_and_no_more(tiny_run, caplog):
    """kill -9 while it has a job, three times; the fourth attempt is left alone."""
    run = tiny_run(
        schedule="0-5:5",
        optim=BOTH,
        max_steps=100_000,
        max_epochs=-1,
        reindex={"mode": "async", "max_attempts": 4},
        callbacks=[Slow(seconds=0.02)],
    )
    kills = 0

    def kill() -> None:
        nonlocal kills
        known = None
        while kills < 3:
            refresher = run.trainer.callbacks[0].refresher
            process = getattr(refresher, "_process", None)
            if process is not None and process.pid != known:
                known = process.pid
                os.kill(known, signal.SIGSTOP)  # so that it is in the middle of something when it is killed
                while refresher._current is None or refresher._current.attempts <= kills:
                    time.sleep(0.01)
                os.kill(known, signal.SIGKILL)
                kills += 1
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run.fit()
    killer.join(timeout=10)
    assert kills == 3
    assert caplog.text.count("the index builder ended with status -9") == 3
    assert {int(name[4:12]) for name in run.recorder.snapshots} == {0, 5}
    assert whole(run.data.index_dir) == [0, 5]


class Hanging(Slow):
    """Stops the first builder for good, and gives the second all the time it needs."""

    first = None

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        refresher = trainer.callbacks[0].refresher
        if self.first is None:
            self.first = refresher._process.pid
            os.kill(self.first, signal.SIGSTOP)
        elif refresher._process is not None and refresher._process.pid != self.first:
            refresher._timeout_s = 600.0


def test_a_builder_that_hangs_is_not_waited_for_without_end(tiny_run, caplog):
    reindex = {"mode": "async", "timeout_s": 0.5}
    run = tiny_run(
        schedule="0-5:5", optim=BOTH, max_steps=100_000, max_epochs=-1, reindex=reindex, callbacks=[Hanging()]
    ).fit()
    assert caplog.text.count("the index builder did not finish within 0.5 seconds (reindex.timeout_s)") == 1
    assert {int(name[4:12]) for name in run.recorder.snapshots} == {0, 5}


def test_a_refresh_that_cannot_be_done_is_given_up_and_training_goes_on(tiny_run, monkeypatch, caplog):
    monkeypatch.setattr(LiveIndex, "job", _wrong_corpus(LiveIndex.job))
    run = tiny_run(
        schedule=2, optim=BOTH, max_steps=5, reindex={"mode": "async", "lag_steps": 1, "max_attempts": 2}
    ).fit()
    assert {int(name[4:12]) for name in run.recorder.snapshots} == {0}
    assert "attempt 2 of 2: StaleIndexError: " in caplog.text
    assert "expected the corpus 0000 that training began with" in caplog.text
    assert "the refresh of step 2 was given up" in caplog.text


def _wrong_corpus(job):
    def wrong(index, step, **settings):
        return replace(job(index, step, **settings), corpus_hash="0000")

    return wrong


def test_two_runs_do_not_share_a_folder(tiny_run, tmp_path):
    class Second(L.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            with pytest.raises(ConfigError, match=rf"pid {os.getpid()} on host"):
                tiny_run(schedule=2, optim=BOTH, index_dir=tmp_path / "index", max_steps=1).fit()

    tiny_run(schedule=2, optim=BOTH, index_dir=tmp_path / "index", max_steps=1, callbacks=[Second()]).fit()
    tiny_run(schedule=2, optim=BOTH, index_dir=tmp_path / "index", max_steps=1).fit()  # and is free afterwards


def test_settings_that_nothing_would_read_are_refused(tiny_run):
    for settings, message in [
        ({"lag_steps": 2}, "reindex.lag_steps: a synchronous refresh has no lag"),
        ({"mode": "async", "lag_steps": -1}, "reindex.lag_steps: expected 0 or more, got -1"),
        ({"keep_last": 0}, "reindex.keep_last: expected 1 or more, got 0"),
        ({"min_overlap": 0.0}, "reindex.min_overlap: expected a share above 0"),
        ({"trigger": "staleness", "probe_size": 0}, "set reindex.probe_size above 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny_run(reindex=settings, schedule=2)
    with pytest.raises(ConfigError, match="reindex.timeout_s: expected seconds above 0, got 0"):
        tiny_run(reindex={"mode": "async", "timeout_s": 0.0}, schedule=2)
    usual = ["sync", "schedule", 0.9, 50, 64, 2, None, 3]
    for place, name, choices in ((0, "mode", "sync or async"), (1, "trigger", "schedule or staleness")):
        wrong = [*usual[:place], "later", *usual[place + 1 :]]
        with pytest.raises(ConfigError, match=f"reindex.{name}: expected {choices}, got 'later'"):
            inspect.unwrap(_check_settings)(*wrong)


# ---------------------------------------------------------------------- kill -9 at any moment


@pytest.fixture
def ready_job(tiny_run, tiny_world):
    """A run with a live snapshot and a job for the next."""
    run = tiny_run(optim=BOTH)
    run.data.setup("fit")
    run.data.ensure_index(step=0)
    index = run.data.index
    job = index.job(7, passages=str(tiny_world.passages), cache_dir=run.data.cache_dir, device="cpu")
    with torch.no_grad():
        next(run.module.model.encoder.passage.parameters()).add_(0.1)
    write_job(index.root / ".job-step00000007-x", job, copy_of_passage_tower(run.module.model.encoder), None)
    return run


WORKER = """
import os, sys, torch
from pathlib import Path
from rag_lightning.retrieval.index_builder import IndexBuilder
torch.set_num_threads(1)
IndexBuilder().build(Path(sys.argv[1]))  # once for the imports and caches
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        IndexBuilder().run(Path(sys.argv[1]))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""


def test_killed_at_twenty_random_points_it_loses_nothing(ready_job):
    """Each time a new process does the job and is killed, evenly over the time that the job takes."""
    index = ready_job.data.index
    live, folder = index.retriever.snapshot, index.root / ".job-step00000007-x"
    vectors = live.vectors(torch.arange(24))
    store = index.store()
    rng = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def once(kill_after: float | None) -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            start = time.perf_counter()
            if kill_after is not None:
                time.sleep(kill_after)
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "over\n"
            return time.perf_counter() - start

        seconds = once(None)
        (published,) = [name for name in store.ids() if name != live.id]
        unfinished = 0
        for point in range(20):
            store.remove(published)
            (folder / index_builder.DONE_FILE).unlink(missing_ok=True)
            once(seconds * (point + rng.random()) / 20)
            assert whole(index.root) in ([0], [0, 7])
            assert torch.equal(store.open(live.id).vectors(torch.arange(24)), vectors)
            if (folder / index_builder.DONE_FILE).is_file():
                assert whole(index.root) == [0, 7]
            unfinished += store.ids() == [live.id]
            for left in index.root.glob("*.building"):  # one killed before it took its lock is left alone a minute
                os.utime(left, (0, 0))
            store.sweep()
            assert not list(index.root.glob("*.building"))
    assert unfinished >= 5  # it was not always too late


def test_a_builder_ends_with_its_trainer(ready_job, tmp_path):
    """The pipe closes when the trainer dies, however it dies."""
    refresher = AsyncRefresher(passages="p", cache_dir=tmp_path)
    refresher.start(ready_job.data.index)
    process = refresher._process
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    refresher.close()


def test_a_dpr_passage_encoder_is_built_with(tiny_world, tmp_path):
    """It was written as a question encoder, which cannot be loaded from its weights."""
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    tokenizer = load_tokenizer(tiny_world.tokenizer)
    config = DPRConfig(**size, vocab_size=len(tokenizer), max_position_embeddings=64)
    towers = [Tower(backbone=kind(config), pooling="dpr_pooler") for kind in (DPRQuestionEncoder, DPRContextEncoder)]
    encoder = BiEncoder(query=towers[0], passage=towers[1], tokenizer=tokenizer, max_passage_tokens=40).eval()
    corpus = PassageCorpus.read(tiny_world.passages)
    job = RefreshJob(
        passages=str(tiny_world.passages),
        corpus_hash=corpus.hash,
        cache_dir=str(tmp_path / "cache"),
        index_dir=str(tmp_path / "index"),
        step=3,
        metric="inner_product",
        factory="exact",
        storage="float16",
        num_training_vectors=None,
        nprobe=None,
        ef_search=None,
        seed=0,
        batch_size=7,
        device="cpu",
        dtype="float32",
        recall_at=10,
    )
    write_job(tmp_path / "job", job, copy_of_passage_tower(encoder), None)
    snapshot = IndexBuilder().build(tmp_path / "job")
    assert snapshot.manifest.encoder_hash == encoder.passage_hash()
    with torch.no_grad():
        expected = encoder.passage(PassageTokens(encoder=encoder, corpus=corpus).batch(np.arange(24)))
    torch.testing.assert_close(snapshot.vectors(torch.arange(24)), expected, rtol=2e-3, atol=2e-3)


def test_what_an_earlier_life_left_is_not_taken_for_this_ones(tiny_run, tmp_path):
    """A finished job of the same step, of other weights, once went live in place of the refresh asked for."""
    settings = {"schedule": 2, "optim": BOTH, "index_dir": tmp_path / "index", "max_steps": 5}
    settings["reindex"] = {"mode": "async", "lag_steps": 1, "keep_last": 9}
    first = tiny_run(**settings).fit()
    left = tmp_path / "index" / ".job-step00000002-old"
    left.mkdir()
    wrong = first.recorder.snapshots[0]
    (left / index_builder.DONE_FILE).write_text(f'{{"snapshot_id": "{wrong}", "seconds": 1}}')
    second = tiny_run(**settings).fit()
    assert second.recorder.snapshots == first.recorder.snapshots
    assert not left.exists()
