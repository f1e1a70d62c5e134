"""Runs beside a paper's figures: which row a run is of, what is missing, what the notes say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.reports.comparison import cells_of_groups, cells_of_paper, lines_of, pairs_of
from rag_lightning.reports.notes import data_notes
from rag_lightning.reports.papers import paper_table
from rag_lightning.reports.runs import by_signature, find_runs
from rag_lightning.reports.scores import question_scores
from rag_lightning.utils.hashing import fingerprint
from tests.report_runs import ANSWERS, write_job, write_questions, write_run

RIGHT_3, RIGHT_2 = [*ANSWERS[:3], "x"], [*ANSWERS[:2], "x", "x"]
NQ = {"dataset": "nq"}
Cli = Callable[..., None]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Learned and frozen, two seeds each, of which one frozen run has not finished."""
    write_questions(tmp_path / "data")
    data = tmp_path / "data"
    for seed in (0, 1):
        answers = RIGHT_3 if seed == 0 else list(ANSWERS)
        write_run(tmp_path / f"runs/learned/seed={seed}", answers, seed=seed, choices=NQ, data=data)
    frozen = "rag/table6_rag_token_frozen"
    write_run(tmp_path / "runs/frozen/seed=0", RIGHT_2, experiment=frozen, choices=NQ, data=data)
    write_run(tmp_path / "runs/frozen/seed=1", None, seed=1, experiment=frozen, choices=NQ, data=data)
    return tmp_path / "runs"


def report(cli: Cli, runs: Path, *arguments: str) -> None:
    cli("report", runs.parent / "out", f"runs={runs}", *arguments)


def refused(cli: Cli, runs: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        report(cli, runs, *arguments)
    return str(caught.value.code)


def row(runs: Path, name: str, file: str = "rag_table6.md") -> list[str]:
    lines = (runs / file).read_text(encoding="utf-8").splitlines()
    (found,) = [line for line in lines if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_each_run_finds_its_row_and_what_is_missing_is_shown(cli: Cli, runs: Path) -> None:
    report(cli, runs, "paper=rag/table6", "compare=[rag_token,rag_token_frozen]", "num_resamples=200")
    learned = row(runs, "rag_token")
    assert learned[1:5] == ["nq_em: exact_match", "87.5 ± 17.7", "2", "43.5"]
    assert learned[5].startswith("+44.0 [+")
    assert learned[6:] == ["0123456", "[rag/table6_rag_token](<learned/seed=0/config.yaml>)"]
    assert row(runs, "rag_token_frozen")[2:5] == ["50.0", "1 of 2", "37.8"]
    assert row(runs, "rag_sequence")[2:] == ["–", "0 of 2", "44.0", "–", "–", "–"]
    text = (runs / "rag_table6.md").read_text(encoding="utf-8")
    assert "Not measured, and in no mean: frozen/seed=1." in text
    assert "Without a run: rag_token_bm25 (nq_em), rag_sequence_bm25 (nq_em)" in text
    assert "triviaqa_em" not in text
    assert "Smaller than the paper's" not in text, "scale=paper is the paper's own"
    assert "rag_token − rag_token_frozen, nq_em: exact_match: +37.5 [" in text
    assert "paired by questions" in text
    told = json.loads((runs / "rag_table6.json").read_text(encoding="utf-8"))
    (learned,) = [one for one in told["rows"] if one["row"] == "rag_token"]
    assert learned["values"] == {"0": 75.0, "1": 100.0}
    assert learned["drawn"] == "seeds and questions"


def test_latex_is_whole_and_escaped(cli: Cli, runs: Path) -> None:
    report(cli, runs, "paper=rag/table6", "num_resamples=50")
    text = (runs / "rag_table6.tex").read_text(encoding="utf-8")
    for part in ("\\toprule", "\\midrule", "\\bottomrule", "rag\\_token\\_frozen", "87.5 $\\pm$ 17.7", "in \\%."):
        assert part in text
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:]
    assert {line.count(" & ") for line in body} == {7}
    assert all(line.endswith("\\\\") for line in body)
    assert text.isascii()


def test_other_commits_data_and_scales_are_named(cli: Cli, runs: Path) -> None:
    data = runs.parent / "data"
    write_run(
        runs / "learned/seed=2", RIGHT_3, seed=2, choices={**NQ, "scale": "mini"}, data=data, commit="fedcba9876+"
    )
    record = json.loads((runs / "learned/seed=2/run.json").read_text())
    record["data"]["train"] = {"file": "other.jsonl", "sha256": "ab" * 32, "bytes": 1}
    (runs / "learned/seed=2/run.json").write_text(json.dumps(record))
    report(cli, runs, "paper=rag/table6", "num_resamples=50")
    text = (runs / "rag_table6.md").read_text(encoding="utf-8")
    assert "Different commits: 0123456: frozen/seed=0, frozen/seed=1, learned/seed=0, learned/seed=1; fedcba9+" in text
    assert "Different train data in nq_em: none told: " in text
    assert "other.jsonl #abababab: learned/seed=2." in text
    assert "Smaller than the paper's: scale=mini (learned/seed=2)." in text


def test_runs_of_the_test_set_beside_figures_of_the_development_set_are_named(cli: Cli, runs: Path) -> None:
    """Test figures stood beside table 6's without a word; an evaluation on the validation file is what it asks for."""

    def say(name: str, **files: dict[str, str]) -> None:
        path = runs / name / "run.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "data": {**record["data"], **files}}))

    validation = {"file": "validation.jsonl", "sha256": "cd" * 32}
    say("learned/seed=0", validation=validation, test=validation)
    say("learned/seed=1", validation=validation, test={"file": "test.jsonl", "sha256": "ef" * 32})
    report(cli, runs, "paper=rag/table6", "num_resamples=50")
    text = (runs / "rag_table6.md").read_text(encoding="utf-8")
    (told,) = [line for line in text.splitlines() if "figures are of the development set; tested on others:" in line]
    assert "learned/seed=1" in told
    assert "frozen/seed=0" in told, "nothing tells its validation file"
    assert "learned/seed=0" not in told
    report(cli, runs, "paper=rag/table1", "rows={rag_token: 'learned/*'}", "num_resamples=50")
    assert "development set" not in (runs / "rag_table1.md").read_text(encoding="utf-8"), "table 1 is of test sets"


def record_data(run: Path, name: str, file: str, sha256: str) -> None:
    record = json.loads((run / "run.json").read_text())
    record.setdefault("data", {})[name] = {"file": file, "sha256": sha256, "bytes": 1}
    (run / "run.json").write_text(json.dumps(record))


def test_one_file_in_two_places_is_one_file(cli: Cli, runs: Path) -> None:
    for seed in (0, 1):
        record_data(runs / f"learned/seed={seed}", "test", f"cache{seed}/questions.jsonl", "ab" * 32)
    assert data_notes(find_runs(runs / "learned")) == []
    record_data(runs / "learned/seed=1", "test", "cache1/questions.jsonl", "cd" * 32)
    (note,) = data_notes(find_runs(runs / "learned"))
    assert note == (
        "Different test data: cache0/questions.jsonl #abababab: seed=0; cache1/questions.jsonl #cdcdcdcd: seed=1."
    )


def test_a_job_that_never_started_is_wanted_and_not_measured(cli: Cli, runs: Path) -> None:
    recipe = ("experiment=rag/table6_rag_token", "dataset=nq")
    write_job(runs / "learned/seed=2", *recipe, seed=2)
    report(cli, runs, "paper=rag/table6", "num_resamples=50")
    assert row(runs, "rag_token")[3] == "2 of 3"
    text = (runs / "rag_table6.md").read_text(encoding="utf-8")
    assert "Not measured, and in no mean: frozen/seed=1, learned/seed=2." in text
    write_job(runs / "learned/seed=3", *recipe, "optim.lr=1", seed=3)
    write_job(runs / "learned/seed=4", *recipe, "optim.lr=1", seed=4)
    groups = [[run.seed for run in group] for group in by_signature(find_runs(runs / "learned"))]
    assert groups == [[0, 1, 2], [3, 4]]


def test_a_plain_table_shows_what_has_not_finished_and_names_commits_and_data(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    data, _ = write_questions(tmp_path / "data")
    for seed in (0, 1):
        write_run(runs / f"seed={seed}", RIGHT_3, seed=seed, data=data.parent)
    report(cli, runs)
    before = (runs / "results.md").read_text(encoding="utf-8")
    assert len(before.splitlines()) == 4, "nothing to note"
    write_run(runs / "seed=2", None, seed=2)
    write_run(runs / "seed=3", RIGHT_2, seed=3, data=data.parent, commit="fedcba9876")
    record_data(runs / "seed=3", "test", "other.jsonl", "ab" * 32)
    write_job(runs / "seed=4", seed=4)
    report(cli, runs, "order=['seed=4']")
    text = (runs / "results.md").read_text(encoding="utf-8")
    assert [line[:10] for line in text.splitlines()[2:7]] == [f"| seed={seed} |" for seed in (4, 0, 1, 3, 2)]
    assert row(runs, "seed=2", "results.md")[1:] == ["–"] * 5
    notes = [
        "Different commits: 0123456: seed=0, seed=1; fedcba9: seed=3.",
        f"Different test data: {data}: seed=0, seed=1; other.jsonl #abababab: seed=3.",
        "Without figures (not finished, failed or pruned), and in no mean: seed=2, seed=4.",
    ]
    shown = capsys.readouterr().out.replace("\n", "")
    for note in notes:
        assert f"\n- {note}" in text.replace(" #unknown", "")
        assert note.partition(":")[0] in shown
    assert list(json.loads((runs / "results.json").read_text())) == ["seed=0", "seed=1", "seed=3"]
    record_data(runs / "seed=3", "test", str(data), fingerprint(data)["sha256"])
    report(cli, runs, "errors=true")
    text = (runs / "errors.md").read_text(encoding="utf-8")
    assert "- Different commits: 0123456: " in text
    assert "- Different passages data" not in text


def test_a_curve_says_how_many_of_those_wanted_it_is_of(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    runs = tmp_path / "runs"
    for k, seed in ((1, 0), (1, 1), (2, 0)):
        write_run(runs / f"k={k},seed={seed}", RIGHT_3, seed=seed)
    write_job(runs / "k=2,seed=1", "k=2", seed=1)
    write_run(runs / "k=3,seed=0", None, seed=0, commit="fedcba9876")
    report(cli, runs, "curve=k", "metrics=[exact_match]")
    assert row(runs, "1", "curve.md")[1:] == ["2", "75.0 ± 0.0"]
    assert row(runs, "2", "curve.md")[1:] == ["1 of 2", "75.0"]
    assert row(runs, "3", "curve.md")[1:] == ["0 of 2", "–"]
    text = (runs / "curve.md").read_text(encoding="utf-8")
    assert "and in no mean: k=2,seed=1, k=3,seed=0." in text
    assert "commits" not in text, "of measured runs alone"


def test_settings_apart_are_rows_apart(runs: Path) -> None:
    for seed in (0, 1):
        write_run(runs / f"k={seed}", RIGHT_2, seed=seed, choices=NQ, data=runs.parent / "data", settings={"k": 10})
    cells = cells_of_paper(find_runs(runs), paper_table("rag/table6"), {}, None)
    told = {cell.settings: [run.name for run in cell.runs] for cell in cells if cell.row == "rag_token"}
    assert list(told.values()) == [["k=0", "k=1"], ["learned/seed=0", "learned/seed=1"]]
    assert "settings.k=10" in told


def test_runs_of_other_recipes_stand_beside_a_row_when_told(cli: Cli, runs: Path) -> None:
    for seed in (0, 1):
        write_run(runs / f"films/seed={seed}", RIGHT_2, seed=seed, experiment="films/joint", data=runs.parent / "data")
    report(
        cli, runs, "paper=rag/table6", "rows={rag_sequence: 'films/*'}", "column=webquestions_em", "num_resamples=50"
    )
    assert row(runs, "rag_sequence")[1:5] == ["webquestions_em: exact_match", "50.0 ± 0.0", "2", "44.9"]
    text = (runs / "rag_table6.md").read_text(encoding="utf-8")
    assert "Not the paper's recipe, data or size: rag_sequence: films/joint." in text
    assert "Not in this table: frozen/seed=0, frozen/seed=1, learned/seed=0, learned/seed=1." in text
    message = refused(cli, runs, "paper=rag/table6", "rows={rag_sequence: 'films/*'}")
    assert "run 'films/seed=0': expected a choice of dataset among" in message


def test_without_a_paper_groups_stand_alone(cli: Cli, runs: Path) -> None:
    report(cli, runs, "rows={ours: 'learned/*', theirs: 'frozen/*'}", "compare=[ours,theirs]", "metrics=[exact_match]")
    assert row(runs, "ours", "groups.md")[1:4] == ["exact_match", "87.5 ± 17.7", "2"]
    assert "ours − theirs, exact_match: +37.5 [" in (runs / "groups.md").read_text(encoding="utf-8")


def test_seeds_alone_are_drawn_where_predictions_are_gone(runs: Path) -> None:
    for path in runs.rglob("predictions.jsonl"):
        path.unlink()
    cells = cells_of_groups(find_runs(runs), {}, ["exact_match"])
    lines = {line.cell.row: line for line in lines_of(cells, None)}
    assert lines["rag/table6_rag_token nq"].ours.mean == 87.5
    (pair,) = pairs_of(cells, ["rag/table6_rag_token nq", "rag/table6_rag_token_frozen nq"])
    assert (pair.drawn, pair.difference, pair.interval) == ("seeds", 37.5, (25.0, 50.0))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["paper=rag/table66"], "paper: expected one of rag/table1, "),
        (["paper=rag/table6", "rows={bm25: '*'}"], "rows: expected some of rag_token_bm25, "),
        (["paper=rag/table6", "rows=[a]"], "rows: expected a pattern of run names for each row"),
        (
            ["paper=rag/table6", "rows={rag_token: 'x*'}"],
            "rows: expected runs that match 'x*', found none among frozen",
        ),
        (["paper=rag/table6", "column=em"], "column: expected some of nq_em, "),
        (["paper=rag/table1"], "paper=rag/table1: expected runs of rag/table1_rag_token, "),
        (["paper=rag/table6", "compare=[rag_token]"], "compare: expected two of rag_token_bm25, "),
        (["paper=rag/table6", "compare=[rag_token,x]"], "compare: expected some of rag_token_bm25, "),
        (["paper=rag/table6", "compare=[rag_token,rag_sequence]"], "expected a column that both rag_token and rag_seq"),
        (["column=nq_em"], "column: expected paper=TABLE with it"),
        (["paper=rag/table6", "curve=seed"], "report: curve: ask for it in a report of its own"),
        (["questions=x"], "questions, passages: expected errors, plots, page or paper with them"),
        (
            ["paper=rag/table6", "metrics=[f1]"],
            "metrics: expected curve, or rows, compare or num_seeds without a paper",
        ),
        (["num_resamples=50"], "num_resamples: expected paper, rows, compare or findings with it, got none"),
        (["errors=true", "num_heatmaps=0"], "num_heatmaps: expected plots=true with it"),
        (["plots=true", "page_passages=3"], "page_passages: expected page=true or predictions=FILE with it"),
        (["output=x.html"], "output: expected predictions=FILE with it"),
        (["predictions=x"], "expected runs=DIR, or predictions=FILE with questions=FILE; one of them"),
    ],
)
def test_what_cannot_be_compared_is_refused(cli: Cli, runs: Path, arguments: list[str], expected: str) -> None:
    assert expected in refused(cli, runs, *arguments)


def test_no_runs_and_broken_runs_are_named(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"expected run folders with metrics\.json or config\.yaml in .* found none"
    ):
        find_runs(runs.parent / "data")
    (runs / "learned/seed=0/config.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(DataError, match="config.yaml: expected YAML, as rag-lightning train writes it"):
        find_runs(runs)


def test_questions_that_have_changed_are_refused(runs: Path) -> None:
    (run,) = find_runs(runs / "learned/seed=0")
    run.record["data"]["test"]["sha256"] = "0" * 64
    with pytest.raises(DataError, match=r"expected the questions that .* was tested on, came a file that has changed"):
        question_scores(run, "exact_match")


def test_predictions_of_another_test_are_refused(runs: Path) -> None:
    (runs / "learned/seed=0/metrics.json").write_text(json.dumps({"exact_match": 0.25}), encoding="utf-8")
    (run,) = find_runs(runs / "learned/seed=0")
    with pytest.raises(DataError, match=r"expected a mean exact_match of 0\.2500, as in metrics\.json, came 0\.7500"):
        question_scores(run, "exact_match")
