"""Sweeps end to end in the tiny world: checked first, one failure loses no other, relaunching goes on."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rag_lightning.cli import train
from rag_lightning.cli.sweeping.records import JobRecord, read_record
from rag_lightning.reports.runs import find_runs
from rag_lightning.training.study import Dimension, Search
from rag_lightning.utils.io import read_json

Cli = Callable[..., None]


def refusal(cli: Cli, folder: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli("train", folder, "-m", *arguments)
    return str(caught.value)


def record_of(folder: Path) -> JobRecord:
    record = read_record(folder)
    assert record is not None
    return record


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Which jobs fit, and whether from a checkpoint."""
    fits: list[tuple[str, bool]] = []
    fit = train._fit

    def noting(trainer: Any, module: Any, data: Any, folder: Path, checkpoint: Path | None, fitted: Any) -> bool:
        fits.append((folder.name, checkpoint is not None))
        return fit(trainer, module, data, folder, checkpoint, fitted)

    monkeypatch.setattr(train, "_fit", noting)
    return fits


def test_a_failed_job_loses_no_other_and_a_relaunch_runs_what_is_missing(
    cli: Cli, tiny_train: list[str], tmp_path: Path, started: list[tuple[str, bool]]
) -> None:
    swept = [*tiny_train, "optim.lr_generator=-1,0.001", "seed=0,1"]
    poor, good = ([f"optim.lr_generator={rate},seed={seed}" for seed in (0, 1)] for rate in (-1, 0.001))
    foreign = tmp_path / poor[0] / "checkpoints" / "last.ckpt"
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    message = refusal(cli, tmp_path, *swept)
    assert not foreign.exists(), "of a run that nobody knows: nothing to resume"
    assert "error: sweep: 2 of 4 jobs failed, 2 are done and kept in" in message
    assert "  optim.lr_generator=-1 seed=0: optim.lr_generator: expected a positive number, got -1" in message
    assert str(tmp_path / poor[1] / "error.txt") in message
    assert f"with hydra.sweep.dir={tmp_path}: it runs only what is missing" in message
    assert "ConfigError" in (tmp_path / poor[1] / "error.txt").read_text()
    assert [record_of(tmp_path / name).status for name in (*poor, *good)] == ["failed"] * 2 + ["finished"] * 2
    assert record_of(tmp_path / good[1]).value == read_json(tmp_path / good[1] / "metrics.json")["exact_match"]
    assert started == [(name, False) for name in good]

    # one is done, one was killed with a checkpoint, one before its first
    killed, early = good
    before = read_json(tmp_path / killed / "metrics.json")
    for name in good:
        record_of(tmp_path / name).become(tmp_path / name, "running")
        (tmp_path / name / "metrics.json").unlink()
    (tmp_path / early / "checkpoints" / "last.ckpt").unlink()
    started.clear()
    valid = [*tiny_train, "optim.lr_generator=0.001", "seed=0,1"]
    named = "hydra.sweep.subdir='optim.lr_generator=${optim.lr_generator},seed=${seed}'"
    cli("train", tmp_path, "-m", *valid, named)
    assert started == [(killed, True), (early, False)]
    after = read_json(tmp_path / killed / "metrics.json")
    assert {**after, "seconds": 0} == {**before, "seconds": 0}

    started.clear()
    cli("train", tmp_path, "-m", *valid, named)
    assert started == [], "all are done"
    message = refusal(cli, tmp_path, *valid, named, "data.batch_size=3")
    assert "expected a run of the same configuration, found one that differs: data.batch_size: 4 -> 3" in message
    assert "hydra.sweeper.rerun=changed. No job was started" in message
    assert started == []
    (tmp_path / killed / "old").touch()
    cli("train", tmp_path, "-m", *valid[:-1], "seed=0", named, "data.batch_size=3", "hydra.sweeper.rerun=changed")
    assert started == [(killed, False)]
    assert not (tmp_path / killed / "old").exists()
    assert OmegaConf.load(tmp_path / killed / "config.yaml").data.batch_size == 3


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        (["optim.lr_generatr=1e-3,1e-4"], r"job 0 \(optim.lr_generatr=0.001\): Could not override.*Key 'lr_generatr'"),
        (["+optim.lr_generatr=1e-3,1e-4"], "expected a setting of OptimSettings .*got 'lr_generatr': check its name"),
        (["objective=rag_token,rag_nothing"], "job 1 .*Could not find 'objective/rag_nothing'"),
        (["optim.lr_generator=1e-3,half"], r"job 1 .*expected float, got 'half' \(str\)"),
        (["data.seed=0,'${nowhere}'"], "job 1 .*Interpolation key 'nowhere' not found"),
        (["seed=0,1", "hydra.sweep.subdir=one"], "expected a folder for each job, got .*one for seed=0 and for seed=1"),
        (["seed=range(0,50)", "hydra.sweeper.max_jobs=49"], "expected at most 49 jobs, got 50. .*max_jobs=50"),
        (["optim.lr_generator=interval(0,1)"], "does not support sweep type.*For intervals: sweep=optuna"),
        (["seed=0,1", "hydra.sweeper.rerun=maybe"], "hydra.sweeper.rerun: expected one of never, changed, all"),
        (["sweep=optuna", "trainer.max_stepz=choice(1,2)"], "job 0 .*Could not override 'trainer.max_stepz'"),
        (["sweep=optuna", "hydra.sweeper.num_trials=0"], "hydra.sweeper.num_trials: expected 1 or more, got 0"),
        (["sweep=optuna", "hydra.sweeper.rerun=all"], "rerun: expected never in a search"),
        (["sweep=optuna", "hydra.sweeper.params=null"], "expected settings to search over, got single values alone"),
        (["sweep=optuna", "optim.warmup_steps=choice(3,many)"], "expected int, got 'many'"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_job(
    swept: list[str], message: str, cli: Cli, tiny_train: list[str], tmp_path: Path, started: list[tuple[str, bool]]
) -> None:
    text = refusal(cli, tmp_path, *tiny_train, *swept)
    assert re.search(message, text, flags=re.DOTALL), text
    assert started == []
    assert list(tmp_path.glob("*/")) == [], "no folder of a job"


def test_evaluations_are_swept_too_and_what_is_done_is_left_out(
    cli: Cli, tiny_train: list[str], tmp_path: Path
) -> None:
    cli("train", tmp_path / "run", *tiny_train)
    assert sys.float_info.min / 2 > 0, "training flushes subnormal numbers, and leaves the process as it was"
    swept = [f"checkpoint={tmp_path / 'run'}", "num_passages=1,2"]
    cli("evaluate", tmp_path / "sweep", "-m", *swept)
    places = {number: tmp_path / "sweep" / f"num_passages={number}" for number in (1, 2, 3)}
    assert read_json(places[2] / "evaluation.json")["checkpoint"] == str(tmp_path / "run")
    for number in (1, 2):
        record = json.loads((places[number] / "predictions.jsonl").read_text().splitlines()[0])
        assert len(record["passages"]) == number
    written = {number: (places[number] / "metrics.json").stat().st_mtime_ns for number in (1, 2)}
    cli("evaluate", tmp_path / "sweep", "-m", swept[0], "num_passages=1,2,3")
    assert {number: (places[number] / "metrics.json").stat().st_mtime_ns for number in (1, 2)} == written
    assert (places[3] / "metrics.json").is_file()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert [run.seed for run in find_runs(tmp_path / "sweep")] == [0, 0, 0], "known without the run they judge"


def test_a_search_goes_on_and_prunes(
    cli: Cli, tiny_train: list[str], tmp_path: Path, started: list[tuple[str, bool]]
) -> None:
    pytest.importorskip("optuna", reason="needs the extra 'sweeps'")
    space = "hydra.sweeper.params={optim.lr_generator: 'tag(log, interval(1e-4, 1e-2))'}"
    chosen = [*tiny_train, "sweep=optuna", space, "trainer.val_check_interval=1", "hydra.sweeper.seed=1"]
    chosen += ["optim.lr_query_encoder=0.001", "model.temperature=0.1"]  # fixed, so no longer of the space
    cli("train", tmp_path, "-m", *chosen, "hydra.sweeper.num_trials=2")
    assert [name for name, _ in started] == ["trial=000", "trial=001"]
    rates = [OmegaConf.load(tmp_path / name / "config.yaml").optim.lr_generator for name, _ in started]
    assert len(set(rates)) == 2
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    best = read_json(tmp_path / "best.json")
    assert best["settings"] == {"optim.lr_generator": rates[best["trial"]]}
    assert (tmp_path / "trial=001" / "metrics.json").is_file()

    # three others that were far better: the next trial is ended at its first validation
    (line,) = {one for one in (tmp_path / "study.journal").read_text().splitlines() if '"settings"' in one}
    fixed = json.loads(line)["user_attr"]["settings"]["fixed"]
    space_of = {"optim.lr_generator": Dimension(low=1e-4, high=1e-2, log=True)}
    search = Search(tmp_path, space=space_of, settings={"fixed": fixed})
    for _ in range(3):
        trial = search._study.ask(search._space)
        trial.report(1.0, 1)
        search.tell(trial.number, "complete", 1.0)
    started.clear()
    cli("train", tmp_path, "-m", *chosen, "hydra.sweeper.num_trials=6")
    assert started == [("trial=005", False)]
    record = record_of(tmp_path / "trial=005")
    assert record.status == "pruned"
    assert read_json(tmp_path / "trial=005" / "pruned.json")["step"] == 1
    assert not (tmp_path / "trial=005" / "metrics.json").exists(), "it is not tested"
    assert [trial.state for trial in search.trials()] == ["complete"] * 5 + ["pruned"]
    message = refusal(cli, tmp_path, *chosen, "data.batch_size=3")
    assert "expected the search that the folder holds, whose fixed is" in message


@pytest.mark.parametrize(("launcher", "plugin"), [("joblib", "joblib"), ("submitit_local", "submitit")])
def test_jobs_in_processes_of_their_own(
    launcher: str, plugin: str, cli: Cli, tiny_train: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="needs the extra 'sweeps'")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    rates = "optim.lr_generator=0.001,-1"
    message = refusal(cli, tmp_path, f"hydra/launcher={launcher}", *tiny_train, rates)
    assert "1 of 2 jobs failed, 1 are done" in message
    assert "optim.lr_generator: expected a positive number, got -1" in message
    good = record_of(tmp_path / "optim.lr_generator=0.001")
    assert good.status == "finished"
    assert good.num_threads == max(1, (os.cpu_count() or 1) // (2 if launcher != "joblib" else os.cpu_count() or 1))
    assert (tmp_path / "optim.lr_generator=0.001" / "metrics.json").is_file()
    assert record_of(tmp_path / "optim.lr_generator=-1").status == "failed"
