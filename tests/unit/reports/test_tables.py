"""Tables for the screen and for Markdown."""

from rich.console import Console

from rag_lightning.reports.tables import markdown_table, rows, screen_table

RUNS = {
    "closed_book": {"exact_match": 0.125, "f1": 0.25, "seconds": 9.4},
    "joint": {"exact_match": 0.7, "f1": 0.8125, "recall@1": 0.0, "recall@5": 1.0, "seconds": 100.0},
}


def test_percentages_have_one_decimal_and_what_is_not_measured_a_dash() -> None:
    assert rows(RUNS) == [
        ("closed_book", "12.5", "25.0", "–", "–", "9"),
        ("joint", "70.0", "81.2", "0.0", "100.0", "100"),
    ]


def test_markdown_has_a_line_for_each_run_and_equal_columns() -> None:
    lines = markdown_table(RUNS).splitlines()
    assert lines[0] == "| run | EM % | F1 % | recall@1 % | recall@5 % | seconds |"
    assert lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert lines[3] == "| joint | 70.0 | 81.2 | 0.0 | 100.0 | 100 |"
    assert len({line.count("|") for line in lines}) == 1


def test_the_screen_shows_every_cell() -> None:
    console = Console(width=100, record=True, quiet=False, file=None)
    with console.capture() as captured:
        console.print(screen_table(RUNS, "a title"))
    shown = captured.get()
    assert "a title" in shown
    for cell in ("closed_book", "12.5", "joint", "81.2", "100.0"):
        assert cell in shown
