"""The search that a sweep's jobs share: goes on where it stopped, prunes by the median of the others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from rag_lightning.errors import ConfigError, MissingExtraError, MissingFileError
from rag_lightning.training import study
from rag_lightning.training.pruned import pruned_at
from rag_lightning.training.study import JOURNAL_FILE, Dimension, PruningCallback, Search

optuna = pytest.importorskip("optuna", reason="needs the extra 'sweeps'")
SPACE = {
    "lr": Dimension(low=1e-4, high=1e-2, log=True),
    "k": Dimension(low=1, high=9, step=2, whole=True),
    "name": Dimension(choices=("a", "b")),
}


def search(folder: Path, **changes: Any) -> Search:
    return Search(folder, **{"space": SPACE, "settings": {"fixed": ["seed=0"]}, "num_startup_trials": 2, **changes})


def test_trials_lie_in_the_space_and_are_those_of_the_seed(tmp_path: Path) -> None:
    first, second = search(tmp_path / "a", seed=3), search(tmp_path / "b", seed=3)
    for _ in range(6):
        one = first.ask()
        assert one.values == second.ask().values
        assert 1e-4 <= one.values["lr"] <= 1e-2
        assert one.values["k"] in (1, 3, 5, 7, 9)
        assert one.values["name"] in ("a", "b")
    other = search(tmp_path / "c", seed=4).ask()
    assert other.values != first.trials()[0].values


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    before = search(tmp_path)
    for outcome, value in (("complete", 0.25), ("pruned", None), ("failed", None), ("complete", float("nan"))):
        before.tell(before.ask().number, outcome, value)
    before.ask()
    after = search(tmp_path)
    assert [trial.state for trial in after.trials()] == ["complete", "pruned", "failed", "failed", "running"]
    assert after.best() == after.trials()[0]
    after.tell(4, "complete", 0.5)
    after.tell(4, "complete", 0.75)
    assert after.trials()[4].value == 0.5, "what is told stays"
    assert search(tmp_path).best().number == 4
    assert after.ask().values not in [trial.values for trial in before.trials()[:5]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": {"fixed": ["seed=1"]}}, r"whose fixed is \['seed=0'\], got \['seed=1'\]"),
        ({"direction": "minimize"}, "whose direction is maximize, got minimize"),
        ({"space": {"lr": Dimension(low=0.0, high=1.0)}}, "whose space is .*choose another hydra.sweep.dir"),
    ],
)
def test_another_search_in_the_folder_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    search(tmp_path)
    with pytest.raises(ConfigError, match=message):
        search(tmp_path, **changes)


def a_trainer(step: int, value: float) -> Any:
    stands = {
        "__init__": lambda self: None,
        "global_rank": 0,
        "global_step": step,
        "max_steps": 100,
        "sanity_checking": False,
        "should_stop": False,
        "state": SimpleNamespace(fn="fit"),
        "callback_metrics": {"val/exact_match": torch.tensor(value)},
        "strategy": SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    }
    return type("StandIn", (L.Trainer,), stands)()


def curve(folder: Path, number: int, values: dict[int, float], **settings: Any) -> tuple[PruningCallback, Any]:
    """Reports a curve of validation figures as the job of a trial does; ends where it is pruned."""
    journal = str(folder / JOURNAL_FILE)
    callback = PruningCallback(directory=str(folder / str(number)), journal=journal, trial=number, **settings)
    trainer = None
    for step, value in values.items():
        trainer = a_trainer(step, value)
        callback.on_fit_start(trainer, L.LightningModule())
        callback.on_validation_end(trainer, L.LightningModule())
        if trainer.should_stop:
            break
    return callback, trainer


def test_the_median_of_the_others_prunes(tmp_path: Path) -> None:
    one = search(tmp_path)
    for level in (0.25, 0.5, 0.75):
        number = one.ask().number
        callback, _ = curve(tmp_path, number, {10: level, 20: level + 0.125})
        assert not callback.pruned, "none before three have ended"
        one.tell(number, "complete", level)
    good, poor, late = (one.ask().number for _ in range(3))
    callback, trainer = curve(tmp_path, good, {10: 0.5, 20: 0.625, 100: 0.0})
    assert not callback.pruned
    assert not trainer.should_stop
    callback, trainer = curve(tmp_path, poor, {10: 0.5, 20: 0.375})  # optuna holds the best so far against the median
    assert callback.pruned
    assert trainer.should_stop
    assert pruned_at(tmp_path / str(poor)) == {"step": 20, "monitor": "val/exact_match", "value": 0.375}
    callback, _ = curve(tmp_path, late, {10: 0.0, 20: 0.0}, num_warmup_steps=21)
    assert not callback.pruned


def test_a_resumed_run_reports_no_step_twice(tmp_path: Path) -> None:
    number = search(tmp_path).ask().number
    curve(tmp_path, number, {10: 0.5})
    curve(tmp_path, number, {10: 0.5, 20: 0.75})  # optuna would warn, which is an error here


def test_a_run_of_no_search_is_left_alone(tmp_path: Path) -> None:
    callback = PruningCallback(directory=str(tmp_path))
    trainer = a_trainer(10, 0.0)
    callback.on_fit_start(trainer, L.LightningModule())
    callback.on_validation_end(trainer, L.LightningModule())
    assert not trainer.should_stop


def test_bad_input_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match="callbacks.pruning.journal: expected a search's file, found none"):
        PruningCallback(directory=".", journal=str(tmp_path / "x"), trial=0).on_fit_start(
            a_trainer(1, 0.0), L.LightningModule()
        )
    number = search(tmp_path).ask().number
    with pytest.raises(ConfigError, match="monitor: expected one of val/exact_match, got val/f1"):
        curve(tmp_path, number, {10: 0.5}, monitor="val/f1")
    with pytest.raises(ConfigError, match="hydra.sweeper.sampler: expected one of tpe, random, got 'grid'"):
        study.check_search("grid", "maximize")
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"sweep=optuna needs the package 'optuna'.*rag_lightning\[sweeps\]"):
        search(tmp_path)
