"""What finished runs measured."""

import json
import os
from pathlib import Path

import pytest

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.reports.collect import collect_runs, summary


def write_run(folder: Path, text: str, time: int) -> None:
    folder.mkdir(parents=True)
    file = folder / "metrics.json"
    file.write_text(text, encoding="utf-8")
    os.utime(file, (time, time))


def test_runs_are_named_and_in_order_of_time(tmp_path: Path) -> None:
    for name, time in (("b", 100), ("a", 300), ("c", 200)):
        write_run(tmp_path / name, json.dumps({"exact_match": time / 1000}), time)
    (tmp_path / "unfinished").mkdir()
    write_run(tmp_path / "deeper" / "not_direct", "{}", 400)
    runs = collect_runs(tmp_path)
    assert list(runs) == ["b", "c", "a"]
    assert runs["c"] == {"exact_match": 0.2}


def test_a_folder_without_finished_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(MissingFileError, match=r"expected run folders with metrics\.json in .*Has a run finished"):
        collect_runs(tmp_path)
    with pytest.raises(MissingFileError, match="runs: no such file"):
        collect_runs(tmp_path / "nowhere")


@pytest.mark.parametrize(("text", "expected"), [("[1]", "expected an object of metrics"), ("{", "not valid JSON")])
def test_a_broken_file_is_named(text: str, expected: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", text, 1)
    with pytest.raises(DataError, match=expected) as caught:
        collect_runs(tmp_path)
    assert "metrics.json" in str(caught.value)


def test_a_summary_has_the_five_figures_whatever_was_measured() -> None:
    metrics = {"exact_match": 0.5, "f1": 0.75, "recall@1": 0.25, "recall@5": 1, "seconds": 3.5, "nll": 2.0}
    assert summary(metrics) == {"exact_match": 0.5, "f1": 0.75, "recall@1": 0.25, "recall@5": 1.0, "seconds": 3.5}
    assert summary({"exact_match": 0.5}) == {
        "exact_match": 0.5,
        "f1": 0.0,
        "recall@1": 0.0,
        "recall@5": 0.0,
        "seconds": 0.0,
    }
