"""What papers found, beside runs: what is shown, what is the reverse, what cannot be told, what is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rag_lightning.cli.hydra_app import conf_dir
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.reports.findings import Finding, Outcome, finding_notes, finding_rows, findings, outcomes
from rag_lightning.reports.runs import find_runs
from rag_lightning.utils.io import read_json
from tests.report_runs import ANSWERS, write_questions, write_run

Cli = Callable[..., None]
FIRST, SECOND = "table6/row=rag_token_frozen,seed=*", "table6/row=rag_token_bm25,seed=*"


def finding(first: str = FIRST, second: str = SECOND, metric: str = "exact_match") -> Finding:
    return Finding("a paper", ("above", first), ("below", second), "", metric, (37.8, 29.7))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds each: frozen answers all, BM25 none, learned one question in four more than BM25, in one seed."""
    write_questions(tmp_path / "data")
    groups = {"frozen": [4, 4, 4], "bm25": [0, 0, 0], "joint": [1, 0, 0]}
    for name, rights in groups.items():
        for seed, num_right in enumerate(rights):
            answers = [*ANSWERS[:num_right], *["x"] * (4 - num_right)]
            write_run(
                tmp_path / f"runs/table6/row=rag_token_{name},seed={seed}", answers, seed=seed, data=tmp_path / "data"
            )
    return tmp_path / "runs"


def outcome(runs: Path, told: Finding) -> Outcome:
    (only,) = outcomes([told], find_runs(runs), num_resamples=300)
    return only


def test_a_difference_whose_interval_is_on_one_side_is_shown_or_the_reverse(runs: Path) -> None:
    shown = outcome(runs, finding())
    assert shown.verdict == "yes"
    assert finding_rows([shown]) == [
        ("a paper", "above > below", "37.8 / 29.7", "EM", "100.0 ± 0.0 / 0.0 ± 0.0", "+100.0 [+100.0, +100.0]", "yes")
    ]
    assert outcome(runs, finding(SECOND, FIRST)).verdict == "the reverse"
    one_seed_more = outcome(runs, finding("table6/row=rag_token_joint,seed=*"))
    assert one_seed_more.verdict == "not told apart"
    assert finding_rows([one_seed_more])[0][4:6] == ("8.3 ± 14.4 / 0.0 ± 0.0", "+8.3 [+0.0, +33.3]")


def test_recall_of_gold_passages_is_drawn_by_question_too(runs: Path) -> None:
    """All four questions find their passage first; BM25 is given others for two of them."""
    for seed in range(3):
        place = runs / f"table6/row=rag_token_bm25,seed={seed}"
        lines = (place / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        lines[:2] = [line.replace('"id": "p0"', '"id": "p2"').replace('"id": "p1"', '"id": "p2"') for line in lines[:2]]
        (place / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (place / "metrics.json").write_text('{"exact_match": 0.0, "recall@1": 0.5}', encoding="utf-8")
    told = outcome(runs, finding(metric="recall@1"))
    assert told.pair is not None
    assert told.pair.drawn == "seeds and questions"
    assert finding_rows([told])[0][4:6] == ("100.0 ± 0.0 / 50.0 ± 0.0", "+50.0 [+0.0, +100.0]")
    (runs / "table6/row=rag_token_bm25,seed=0/metrics.json").write_text('{"recall@1": 0.75}', encoding="utf-8")
    with pytest.raises(DataError, match=r"expected a mean recall@1 of 0\.7500, as in metrics\.json, came 0\.5000"):
        outcome(runs, finding(metric="recall@1"))


def test_what_is_missing_is_shown_as_missing(runs: Path) -> None:
    absent = outcome(runs, finding("table6/row=nowhere,seed=*"))
    assert absent.verdict == "not measured"
    assert finding_rows([absent])[0][4:] == ("– / 0.0 ± 0.0", "–", "not measured")
    (runs / "table6/row=rag_token_frozen,seed=1/metrics.json").unlink()
    part = outcome(runs, finding())
    assert finding_rows([part])[0][4] == "100.0 ± 0.0 (2 of 3) / 0.0 ± 0.0"
    assert "Not measured, and in no mean: table6/row=rag_token_frozen,seed=1." in finding_notes([part])


def test_the_command_writes_the_table_and_says_where_commits_differ(runs: Path, cli: Cli) -> None:
    write_run(
        runs / "table6/row=rag_token_frozen,seed=3", list(ANSWERS), seed=3, commit="f" * 40, data=runs / "../data"
    )
    cli("report", runs.parent / "out", f"runs={runs}", "findings=reproduce", "num_resamples=100")
    text = (runs / "findings.md").read_text(encoding="utf-8")
    assert "| RAG, table 6 | frozen > BM25 (RAG-Token, films) | 37.8 / 29.7 | EM | 100.0 ± 0.0 / 0.0 ± 0.0 |" in text
    assert "- Different commits: " in text
    told = read_json(runs / "findings.json")
    assert isinstance(told, dict)
    assert len(told["findings"]) == len(findings("reproduce"))
    assert told["findings"][0]["shown"] == "yes"
    with pytest.raises(SystemExit, match="findings: expected some of reproduce; got 'reprodce'"):
        cli("report", runs.parent / "out", f"runs={runs}", "findings=reprodce")
    with pytest.raises(SystemExit, match="curve: ask for it in a report of its own"):
        cli("report", runs.parent / "out", f"runs={runs}", "findings=reproduce", "curve=seed")


def test_an_unknown_list_is_named() -> None:
    with pytest.raises(ConfigError, match="findings: expected some of reproduce; got 'x'"):
        findings("x")


def test_every_finding_stands_for_a_sweep_that_make_reproduce_runs() -> None:
    """The first part of a pattern is a sweep under ``conf/sweep/reproduce``, which the Makefile starts."""
    makefile = (Path(__file__).parents[3] / "Makefile").read_text(encoding="utf-8")
    sweeps = {path.stem for path in (conf_dir() / "sweep" / "reproduce").glob("*.yaml")}
    assert {name for name in sweeps if f"sweep=reproduce/{name}" not in makefile} == set()
    for one in findings("reproduce"):
        for _, pattern in (one.first, one.second):
            assert pattern.partition("/")[0] in sweeps
