"""Logs, calibration and the pictures of both; what the pictures look like was judged by eye."""

from pathlib import Path

import numpy as np
import pytest

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.reports.calibration import reliability
from rag_lightning.reports.logs import curve, read_log
from rag_lightning.reports.run_plots import _shared_points, plot_calibration, plot_index_age, plot_learning_curves

HEAD = "epoch,step,train/loss,val/exact_match,val/index_age_steps\n"
LOG = [{"step": float(step), "train/loss": 2.0, "val/exact_match": 0.5, "val/index_age_steps": 3.0} for step in (3, 7)]


def write_log(folder: Path, version: int, text: str) -> None:
    (folder / f"logs/version_{version}").mkdir(parents=True)
    (folder / f"logs/version_{version}/metrics.csv").write_text(HEAD + text, encoding="utf-8")


def test_a_resumed_run_goes_on_where_it_began_again(tmp_path: Path) -> None:
    write_log(tmp_path, 2, "0,5,1.5,,\n0,7,1.0,,\n")
    write_log(tmp_path, 10, "0,7,0.5,,\n0,7,,0.75,2\n")
    write_log(tmp_path, 1, "0,3,3.0,,\n0,5,9.0,,\n")
    rows = read_log(tmp_path)
    assert curve(rows, "train/loss") == {4: 3.0, 6: 1.5, 8: 0.5}
    assert curve(rows, "val/exact_match") == {8: 0.75}
    assert read_log(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("text", "expected"), [("0,3,x,,\n", "line 2: expected numbers"), ("0,,1,,\n", "column 'step'")]
)
def test_a_broken_log_is_named(text: str, expected: str, tmp_path: Path) -> None:
    write_log(tmp_path, 0, text)
    with pytest.raises(DataError, match=f"metrics.csv, .*{expected}|{expected}"):
        read_log(tmp_path)


def test_only_steps_of_all_seeds_are_drawn() -> None:
    points = _shared_points([{1: 1.0, 2: 3.0}, {1: 2.0}, {}])
    assert {step: (point.mean, point.num_runs) for step, point in points.items()} == {1: (1.5, 2)}


def test_the_error_is_that_of_loops() -> None:
    rng = np.random.default_rng(0)
    sure, right = rng.random(500), rng.random(500) < 0.4
    expected = 0.0
    for number in range(10):
        inside = [place for place, one in enumerate(sure) if number / 10 <= one < (number + 1) / 10]
        if inside:
            gap = abs(np.mean([right[place] for place in inside]) - np.mean([sure[place] for place in inside]))
            expected += len(inside) / 500 * gap
    told = reliability(sure, right)
    assert told.error == pytest.approx(expected)
    assert told.counts.sum() == 500
    assert reliability(np.array([1.0, 0.0]), np.array([True, False])).error == 0.0


def test_what_is_no_probability_is_refused() -> None:
    with pytest.raises(DataError, match="expected probabilities between 0 and 1"):
        reliability(np.array([1.5]), np.array([True]))
    with pytest.raises(DataError, match="came 0 for 0 answers"):
        reliability(np.array([]), np.array([], dtype=bool))
    with pytest.raises(ConfigError, match="num_bins: expected at least 1, got 0"):
        reliability(np.array([0.5]), np.array([True]), num_bins=0)


def test_pictures_name_their_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # letters stay letters
    logs = {"joint $x": [LOG, LOG[:1]], "frozen": [LOG]}
    told = {name: reliability(np.array([0.2, 0.9]), np.array([False, True])) for name in logs}
    plot_learning_curves(logs, path=tmp_path / "curves.svg")
    plot_index_age(logs, path=tmp_path / "age.svg")
    plot_calibration(told, path=tmp_path / "calibration.svg")
    texts = {path.stem: path.read_text(encoding="utf-8").replace("&#160;", " ") for path in tmp_path.glob("*.svg")}
    for name, parts in (
        ("curves", ("joint $x (n = 2)", "frozen (n = 1)", "train/loss", "val/exact_match (%)", "optimiser steps")),
        ("age", ("joint $x", "frozen", "age of the index (steps)")),
        ("calibration", ("joint $x (ECE 15.0 %)", "share of right answers")),
    ):
        for part in parts:
            assert part in texts[name], (name, part)
    assert "val/recall@5" not in texts["curves"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learning curves: expected logs of train/loss, .* Train with logger=csv"):
        plot_learning_curves({"a": [[]]}, path=tmp_path / "a.png")
    with pytest.raises(DataError, match="index age: expected validations that log val/index_age_steps"):
        plot_index_age({"a": [[{"step": 1.0}]]}, path=tmp_path / "a.png")
    with pytest.raises(DataError, match="expected answers of at least one group"):
        plot_calibration({}, path=tmp_path / "a.png")
