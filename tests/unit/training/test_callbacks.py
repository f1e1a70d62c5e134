"""Random state, interrupts, outputs."""

import json
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.training.callbacks import InterruptCallback, OutputCallback, RandomStateCallback
from rag_lightning.utils.io import read_json


def test_random_state_goes_on_where_it_stopped():
    torch.manual_seed(5)
    torch.rand(3)
    state = RandomStateCallback().state_dict()
    expected = torch.rand(4)
    torch.manual_seed(6)
    callback = RandomStateCallback()
    callback.load_state_dict(state)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    callback.on_train_start(trainer, L.LightningModule())
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(6)
    callback.on_train_start(trainer, L.LightningModule())  # only once
    assert not torch.equal(torch.rand(4), expected)


def test_a_run_on_more_processes_keeps_its_own_state_on_the_new_ones():
    callback = RandomStateCallback()
    callback.load_state_dict({"ranks": []})
    torch.manual_seed(6)
    expected = torch.rand(2)
    torch.manual_seed(6)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    callback.on_train_start(trainer, L.LightningModule())
    assert torch.equal(torch.rand(2), expected)


class Press(L.Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook
        self.pressed = False

    def press(self, hook: str) -> None:
        if hook == self.hook and not self.pressed:
            self.pressed = True
            os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_start(self, *_: object) -> None:
        self.press("train")

    def on_validation_batch_start(self, *_: object) -> None:
        self.press("validation")


@pytest.mark.parametrize(("hook", "steps"), [("train", 1), ("validation", 3)])
def test_ctrl_c_ends_after_a_step_saves_and_gives_the_signal_back(hook, steps, tiny_run, tiny_world, tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)
    run = tiny_run(
        data={"validation": str(tiny_world.validation)},
        callbacks=[Press(hook), ModelCheckpoint(dirpath=tmp_path, save_last=True, save_on_exception=True)],
        max_steps=9,
        val_check_interval=2,
    )
    with pytest.raises(SystemExit) as ended:
        run.fit()
    assert ended.value.code == 1
    assert run.trainer.global_step == steps
    assert "ending after this step and saving a checkpoint" in capsys.readouterr().out
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    callback = next(c for c in run.trainer.callbacks if isinstance(c, InterruptCallback))
    callback.teardown(run.trainer, run.module, "fit")
    assert signal.getsignal(signal.SIGINT) in (before, signal.SIG_IGN)


def test_outputs_are_written_in_question_order(tiny_run, tiny_world, tmp_path):
    run = tiny_run(
        data={"test": str(tiny_world.test), "eval_batch_size": 2},
        callbacks=[OutputCallback(directory=str(tmp_path / "run"))],
        max_steps=1,
    ).fit()
    (figures,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    metrics = read_json(tmp_path / "run" / "metrics.json")
    assert metrics == {**{name.removeprefix("test/"): value for name, value in figures.items()}, "num_questions": 5}
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"q-{number}" for number in range(18, 23)]
    for line in lines:
        assert set(line) == {"id", "question", "answer", "log_likelihood", "passages"}
        assert len(line["passages"]) == 3
        assert sum(passage["probability"] for passage in line["passages"]) == pytest.approx(1.0, abs=1e-5)
