"""A resumed run is the uninterrupted run: same losses, same weights, same snapshots, bit for bit."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.training.objectives import Denoising, MarginalObjective, PolicyGradient

# 13 questions in batches of 2 are 7 batches an epoch, the last of one question; two batches make an optimiser step, the
# last of an epoch one: 4 optimiser steps an epoch.
TRAINING = {
    "data": {"batch_size": 2, "sample_answers": True, "seed": 3},
    "optim": {"train_passage_encoder": True, "schedule": "cosine", "warmup_steps": 2},
    "schedule": 3,
    "max_steps": 10,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 1.0,
}


class CtrlC(L.Callback):
    """Sends SIGINT to this process during a micro-batch."""

    def __init__(self, *, batch: int) -> None:
        self.batch = batch
        self.seen = 0

    def on_train_batch_start(self, *_: object) -> None:
        self.seen += 1
        if self.seen == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


def last_checkpoint(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        dirpath=folder, filename="{step}", save_last=True, save_on_exception=True, enable_version_counter=False
    )


def assert_equal_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture
def uninterrupted(tiny_run, tiny_model):
    return tiny_run(model=tiny_model(dropout=0.2), **TRAINING).fit()


@pytest.mark.parametrize(
    ("interrupt_at_batch", "ends_at_step"),
    [
        (3, 2),  # mid-epoch, in the middle of an accumulation: goes on to the end of the step
        (7, 4),  # the last batch of an epoch
        (8, 5),  # mid second epoch, between two refreshes
        (10, 6),  # the step of a refresh, which has happened when the run ends
        (14, 8),  # the end of the second epoch
        (15, 9),  # the first step of the third, a refresh
    ],
)
def test_resume_equals_uninterrupted(
    interrupt_at_batch, ends_at_step, uninterrupted, tiny_run, tiny_model, tmp_path, monkeypatch
):
    checkpoints, index = tmp_path / "checkpoints", tmp_path / "index"
    model = tiny_model(dropout=0.2)
    stopped = tiny_run(
        model=model,
        index_dir=index,
        callbacks=[CtrlC(batch=interrupt_at_batch), last_checkpoint(checkpoints)],
        **TRAINING,
    )
    with pytest.raises(SystemExit):
        stopped.fit()
    assert stopped.recorder.steps[-1] == ends_at_step
    live = stopped.recorder.snapshots[-1]

    torch.manual_seed(987)  # another process knows nothing of this one's random state
    resumed = tiny_run(
        model=tiny_model(dropout=0.2, seed=55), index_dir=index, callbacks=[last_checkpoint(checkpoints)], **TRAINING
    )
    torch.manual_seed(987)
    resumed.fit(checkpoints / "last.ckpt")

    whole, done = uninterrupted.recorder, len(stopped.recorder.losses)
    assert stopped.recorder.losses == whole.losses[:done]
    assert resumed.recorder.losses == whole.losses[done:]
    assert resumed.recorder.steps == whole.steps[done:]
    assert resumed.recorder.rates == whole.rates[done:]
    assert resumed.recorder.ages == whole.ages[done:]
    assert stopped.recorder.snapshots + resumed.recorder.snapshots == whole.snapshots
    assert resumed.recorder.snapshots[0] == live or ends_at_step == 8  # 9 is a refresh
    assert [int(name[4:12]) for name in dict.fromkeys(whole.snapshots)] == [0, 3, 6, 9]
    assert_equal_weights(uninterrupted.weights(), resumed.weights())
    assert len(set(whole.losses)) == len(whole.losses)  # the comparison compares something


def test_a_resumed_policy_knows_where_it_began(tiny_run, tiny_model, tmp_path):
    """The draws are those of the step, and the divergence is counted from the start, not from the checkpoint."""

    def run(**settings):
        objective = PolicyGradient(
            objective=MarginalObjective(kind="rag_token"),
            policies=["retriever", "generator"],
            reward=lambda attempt: (len(attempt.answer) % 5) / 4,
            num_samples=2,
            kl_weight=0.3,
        )
        return tiny_run(
            model=tiny_model(dropout=0.2),
            objective=objective,
            **{**TRAINING, "optim": {"schedule": "cosine", "warmup_steps": 2}, "schedule": None, **settings},
        )

    whole = run().fit()
    checkpoints, index = tmp_path / "checkpoints", tmp_path / "index"
    stopped = run(index_dir=index, callbacks=[CtrlC(batch=7), last_checkpoint(checkpoints)])
    with pytest.raises(SystemExit):
        stopped.fit()
    torch.manual_seed(987)
    resumed = run(index_dir=index, callbacks=[last_checkpoint(checkpoints)])
    torch.manual_seed(987)
    resumed.fit(checkpoints / "last.ckpt")
    assert resumed.recorder.losses == whole.recorder.losses[len(stopped.recorder.losses) :]
    assert_equal_weights(whole.weights(), resumed.weights())


def test_dropout_shuffling_and_sampling_matter(uninterrupted, tiny_run, tiny_model):
    """The equality above is not for want of randomness: each source of it changes the losses."""
    losses = uninterrupted.recorder.losses
    other_order = tiny_run(
        model=tiny_model(dropout=0.2), **{**TRAINING, "data": {**TRAINING["data"], "seed": 4}, "max_steps": 1}
    ).fit()
    assert other_order.recorder.losses != losses[:2]
    first_answers = tiny_run(
        model=tiny_model(dropout=0.2), **{**TRAINING, "data": {**TRAINING["data"], "sample_answers": False}}
    ).fit()
    assert first_answers.recorder.losses != losses
    dropped = tiny_run(model=tiny_model(dropout=0.2), max_steps=1, **{k: TRAINING[k] for k in ("data", "optim")})
    torch.manual_seed(2)
    assert dropped.fit().recorder.losses[0] != losses[0]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed run saves nothing
@pytest.mark.parametrize("objective", [MarginalObjective(kind="rag_sequence"), Denoising()], ids=["rag", "denoising"])
def test_resume_from_a_checkpoint_saved_in_passing_and_at_validation(
    objective, tiny_run, tiny_model, tiny_world, tmp_path
):
    """A run killed outright goes on from whatever checkpoint it left last."""
    settings = {
        "objective": objective,
        "data": {"batch_size": 4, "validation": str(tiny_world.validation)},
        "max_steps": 9,
        "val_check_interval": 2,
        "index_dir": tmp_path / "index",
    }
    every_step = ModelCheckpoint(
        dirpath=tmp_path / "every", filename="{step}", save_top_k=-1, every_n_train_steps=1, save_last=False
    )
    at_validation = ModelCheckpoint(
        dirpath=tmp_path / "validation", filename="{step}", monitor="val/nll", save_top_k=-1
    )
    whole = tiny_run(model=tiny_model(dropout=0.2), callbacks=[every_step, at_validation], **settings).fit()
    saved = {int(path.stem.split("=")[1]): path for path in (tmp_path / "every").glob("step=*.ckpt")}
    assert set(saved) == set(range(1, 10))
    validated = {int(path.stem.split("=")[1]): path for path in (tmp_path / "validation").glob("step=*.ckpt")}
    assert set(validated) == {2, 4, 6, 8}  # epochs are of 4 steps: mid-epoch and at their end
    for step, path in [*((step, saved[step]) for step in (1, 4, 6)), *validated.items()]:
        resumed = tiny_run(model=tiny_model(dropout=0.2, seed=9), **settings).fit(path)
        assert resumed.recorder.losses == whole.recorder.losses[step:], path
        assert_equal_weights(whole.weights(), resumed.weights())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_from_the_end_of_an_epoch_without_validation(tiny_run, tiny_model, tmp_path):
    """Such a run once met the first batch of the ended epoch again, and every later one a step late."""
    settings = {"max_steps": 10, "index_dir": tmp_path / "index"}
    at_end = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1)
    whole = tiny_run(model=tiny_model(dropout=0.2), callbacks=[at_end], **settings).fit()
    saved = {int(path.stem.split("=")[1]): path for path in tmp_path.glob("step=*.ckpt")}
    assert set(saved) == {4, 8, 10}
    for step in (4, 8):
        resumed = tiny_run(model=tiny_model(dropout=0.2), **settings).fit(saved[step])
        assert resumed.recorder.losses == whole.recorder.losses[step:]
        assert resumed.recorder.rates == whole.recorder.rates[step:]
        assert_equal_weights(whole.weights(), resumed.weights())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_opens_the_snapshot_that_was_live(tiny_run, tiny_model, tmp_path):
    """Not an index of the newer weights: the run would have searched the old one until the next refresh."""
    settings = {**TRAINING, "index_dir": tmp_path / "index", "max_steps": 5}
    run = tiny_run(model=tiny_model(), callbacks=[last_checkpoint(tmp_path)], **settings)
    run.fit()
    run.trainer.save_checkpoint(tmp_path / "now.ckpt")
    state = torch.load(tmp_path / "now.ckpt", weights_only=True)["RagDataModule"]
    assert state["snapshot_id"].startswith("step00000003")
    resumed = tiny_run(model=tiny_model(seed=4), **{**settings, "max_steps": 6, "schedule": 100})
    resumed.fit(tmp_path / "now.ckpt")
    assert resumed.recorder.snapshots == [state["snapshot_id"]] * 2
    assert resumed.recorder.ages == [2.0, 2.0]
    assert len(SnapshotStore(tmp_path / "index").ids()) == 2


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_without_the_snapshot_names_it(tiny_run, tiny_model, tmp_path):
    run = tiny_run(model=tiny_model(), callbacks=[last_checkpoint(tmp_path)], max_steps=2).fit()
    run.trainer.save_checkpoint(tmp_path / "now.ckpt")
    moved = tiny_run(model=tiny_model(), index_dir=tmp_path / "elsewhere", max_steps=4)
    with pytest.raises(FileNotFoundError, match="no snapshot 'step00000000-"):
        moved.fit(tmp_path / "now.ckpt")
