"""Published figures: those that ship are those that were handed to us, and a table is found by its name."""

from pathlib import Path

import pytest
import yaml

from rag_lightning.cli.hydra_app import conf_dir
from rag_lightning.errors import ConfigError
from rag_lightning.reports.papers import paper_results, paper_table, table_names

GIVEN = Path(__file__).parents[4] / "shared" / "paper_results.yaml"


def test_the_figures_are_those_of_the_source() -> None:
    if not GIVEN.is_file():
        pytest.skip(f"no {GIVEN.name} beside the tests")
    assert paper_results() == yaml.safe_load(GIVEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("table", "row", "column", "figure"),
    [
        ("rag/table1", "rag_sequence", "nq", 44.5),
        ("rag/table1", "realm", "triviaqa_open", None),
        ("rag/table2", "rag_token", "fever3_accuracy", 72.5),
        ("rag/table6", "rag_sequence_bm25", "curatedtrec_em", 33.8),
        ("rag/hot_swap", "index_2016_leaders_2018", "accuracy", 4),
        ("rag_end2end/squad", "rag_original", "em", 28.12),
        ("realm/stale", "stale_30x", "recall_at_5", 15.1),
        ("fid/released", "large", "nq_test", 54.4),
        ("atlas/nq_64_shot", "large", "dev", 38.4),
        ("dpr/nq", "bm25_rerun", "top20", 62.9),
        ("dpr/nq", "bm25_rerun", "top1", None),
    ],
)
def test_a_figure_stands_where_the_paper_has_it(table: str, row: str, column: str, figure: float | None) -> None:
    assert paper_table(table).figure(row, column) == figure


def test_every_table_names_rows_and_columns_that_have_figures() -> None:
    for name in table_names():
        table = paper_table(name)
        for row in table.experiments:
            known = [column for column in table.columns if table.figure(row, column) is not None]
            assert known, f"{name}: {row}"
        for column in table.columns.values():
            assert column.metrics, f"{name}: {column.name}"


def test_the_recipes_of_every_table_exist() -> None:
    named = {recipe for name in table_names() for recipe in paper_table(name).experiments.values()}
    assert len(named) >= 20
    assert [recipe for recipe in named if not (conf_dir() / "experiment" / f"{recipe}.yaml").is_file()] == []


def test_recipes_of_table_6_that_exist_are_its_rows() -> None:
    recipes = {path.stem for path in (conf_dir() / "experiment" / "rag").glob("table6_*.yaml")}
    rows = {recipe.partition("/")[2] for recipe in paper_table("rag/table6").experiments.values()}
    assert len(recipes) == 6
    assert recipes == rows


def test_a_column_says_which_split_its_figures_are_of() -> None:
    """The development sets of MS-MARCO and FEVER are what is published to be tested on."""
    splits = {name: column.split for name, column in paper_table("rag/table6").columns.items()}
    tested = {"msmarco_rouge_l", "msmarco_bleu1", "fever3", "fever2"}
    assert {name for name, split in splits.items() if split == "test"} == tested
    assert set(splits.values()) == {"test", "validation"}
    assert {column.split for column in paper_table("realm/stale").columns.values()} == {"validation"}
    assert {column.split for column in paper_table("rag/table1").columns.values()} == {"test"}


def test_the_ablation_of_pre_training_is_of_no_recipe_of_its_own() -> None:
    """Its figures are those after fine-tuning: runs of realm/fresh and realm/stale measured something else."""
    table = paper_table("realm/stale")
    assert list(table.figures) == ["fresh", "stale_30x"]
    assert table.experiments == {}


def test_an_unknown_table_lists_those_of_the_paper_or_all() -> None:
    with pytest.raises(ConfigError, match="expected one of rag/table1, rag/table2, rag/table5, .*; got 'rag/table7'"):
        paper_table("rag/table7")
    with pytest.raises(ConfigError, match="expected one of rag/table1, .*bert_ner/conll2003; got 'raag'"):
        paper_table("raag")
