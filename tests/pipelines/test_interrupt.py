"""Ctrl-C on the command line leaves a run that goes on, and ends where it would have ended."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rag_lightning.utils.io import read_json

ROOT = Path(__file__).parents[2]
MAX_STEPS = 36


def losses(folder: Path) -> dict[int, float]:
    """Every version's lines in order: a later one's stand in for an earlier one's of the same step."""
    found: dict[int, float] = {}
    for file in sorted((folder / "logs").glob("version_*/metrics.csv")):
        with file.open() as stream:
            rows = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(stream) if row["train/loss"]}
        assert not found.keys() & rows.keys(), "a step was taken twice"
        found |= rows
    return found


@pytest.fixture
def settings(tiny_model_overrides, tiny_data_overrides):
    return [
        *tiny_model_overrides,
        *tiny_data_overrides,
        f"trainer.max_steps={MAX_STEPS}",
        "trainer.log_every_n_steps=1",
        "trainer.accumulate_grad_batches=2",
        "data.batch_size=2",
        "data.sample_answers=true",
        "data.limit_validation=2",
        "trainer.check_val_every_n_epoch=5",
        "generator.settings.dropout=0.2",
        "optim.train_passage_encoder=true",
        "reindex.schedule=6",
    ]


def interrupted(folder: Path, settings: list[str]) -> tuple[int, str, str]:
    """Starts a training as a user does, and presses Ctrl-C once the index has been refreshed for the second time."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rag_lightning", "train", *settings, f"hydra.run.dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + 120
        while not list((folder / "index").glob("step00000012-*")):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < end, "timed out"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, errors


def test_an_interrupted_run_resumes_to_the_same_losses_and_model(cli, settings, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    code, output, errors = interrupted(folder, settings)
    assert code == 1, errors[-3000:]
    assert "Ctrl-C: ending after this step and saving a checkpoint" in output
    assert f"interrupted; resume with: rag-lightning train resume={folder}" in output
    assert "Traceback" not in errors
    stopped_at = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 12 <= stopped_at < MAX_STEPS
    assert not (folder / "metrics.json").exists()
    assert sorted(losses(folder)) == list(range(stopped_at))

    cli("train", folder, f"resume={folder}")
    cli("train", whole, *settings)
    expected = losses(whole)
    assert sorted(expected) == list(range(MAX_STEPS))
    assert losses(folder) == pytest.approx(expected, rel=1e-6)
    mine, theirs = read_json(folder / "metrics.json"), read_json(whole / "metrics.json")
    mine.pop("seconds"), theirs.pop("seconds")
    utility, expected_utility = (figures.pop("retrieval_utility") for figures in (mine, theirs))
    assert utility == pytest.approx(expected_utility, abs=1e-5)  # a difference of two log-likelihoods of about 15
    assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert (folder / "predictions.jsonl").exists()
    assert (folder / "model" / "rag_config.json").exists()


def test_resume_says_what_is_missing_and_what_cannot_be_changed(cli, settings, tmp_path, capsys):
    with pytest.raises(SystemExit, match="resume: expected a run folder with config.yaml, found none in"):
        cli("train", tmp_path / "none", f"resume={tmp_path / 'none'}")
    folder = tmp_path / "run"
    quick = ["trainer.max_steps=2", "trainer.accumulate_grad_batches=1", "trainer.check_val_every_n_epoch=1"]
    cli("train", folder, *settings, *quick, "callbacks=no_validation")
    with pytest.raises(SystemExit, match="resume: expected plain values .*, got objective=rag_sequence"):
        cli("train", folder, f"resume={folder}", "objective=rag_sequence")
    cli("train", folder, f"resume={folder}", "trainer.max_steps=4")
    assert sorted(losses(folder)) == [0, 1, 2, 3]
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(SystemExit, match=r"resume: expected a run folder with checkpoints/last.ckpt, found none"):
        cli("train", folder, f"resume={folder}")
