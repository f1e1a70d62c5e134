"""Mean and standard deviation over seeds, and the curve that the command line draws of them."""

import json
import math

import numpy as np
import pytest

from rag_lightning.errors import DataError
from rag_lightning.reports.groups import Spread, by_setting, spreads


def runs(tmp_path=None):
    figures = {"null": [0.2, 0.3, 0.25], "20": [0.4, 0.5], "5": [0.6]}
    return {
        f"reindex.schedule={value},seed={seed}": {"exact_match": em, "recall@1": em + 0.1, "seconds": 1.0}
        for value, all_seeds in figures.items()
        for seed, em in enumerate(all_seeds)
    }


def test_spread_is_numpys():
    values = [0.1, 0.4, 0.45, 0.2]
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert math.isnan(Spread.of([0.3]).sd)


def test_runs_are_grouped_by_the_setting_and_not_by_the_seed():
    groups = by_setting(runs(), "reindex.schedule")
    assert {value: len(members) for value, members in groups.items()} == {"null": 3, "20": 2, "5": 1}
    assert str(spreads(groups, "exact_match")["null"]) == "25.0 ± 5.0"
    assert spreads(groups, "f1") == {}


@pytest.mark.parametrize("name", ["joint", "seed=1", "reindex.schedule=5,seed=0,model.num_passages=3"])
def test_a_run_that_does_not_tell_is_named(name):
    with pytest.raises(DataError, match=f"run '{name}': expected a name that tells reindex.schedule"):
        by_setting({name: {}}, "reindex.schedule")


def test_the_command_line_draws_the_curve(cli, tmp_path):
    pytest.importorskip("matplotlib")
    for name, metrics in runs().items():
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "metrics.json").write_text(json.dumps(metrics))
    arguments = ["report", tmp_path / "out", f"runs={tmp_path / 'sweep'}", "curve=reindex.schedule"]
    cli(*arguments)
    table = (tmp_path / "sweep" / "curve.md").read_text().splitlines()
    assert [row.split()[1] for row in table[2:]] == ["5", "20", "null"]  # by size
    cli(*arguments, "order=[null,20,5]")
    table = (tmp_path / "sweep" / "curve.md").read_text().splitlines()
    assert table[2:] == [
        "| null | 3 | 25.0 ± 5.0 | 35.0 ± 5.0 | – |",
        "| 20 | 2 of 3 | 45.0 ± 7.1 | 55.0 ± 7.1 | – |",
        "| 5 | 1 of 3 | 60.0 | 70.0 | – |",
    ]
    assert (tmp_path / "sweep" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    curve = json.loads((tmp_path / "sweep" / "curve.json").read_text())["curves"]["exact_match"]
    assert curve["20"]["num_runs"] == 2
