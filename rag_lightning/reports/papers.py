"""Published figures, to set beside ours: ``paper_results.yaml``, by the tables of ``paper_tables.yaml``."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from rag_lightning.errors import ConfigError

RESULTS_FILE = Path(__file__).with_name("paper_results.yaml")
TABLES_FILE = Path(__file__).with_name("paper_tables.yaml")


@dataclass(frozen=True, slots=True)
class Column:
    """What a column of a paper's table measures.

    Attributes:
        name: The column's.
        datasets: The choices of ``dataset`` that a run of this column may have; empty where the table has one data set.
        metrics: Keys of ``metrics.json``; the first that a run measured counts.
        split: Which of a run's files the paper's figures are of: ``test``, or ``validation``.
    """

    name: str
    datasets: tuple[str, ...]
    metrics: tuple[str, ...]
    split: str = "test"


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of a paper.

    Attributes:
        name: As a report is asked for it, such as ``rag/table6``.
        title: Which table of which paper.
        figures: Percent, by row and column; None where the paper has no figure.
        experiments: For each row that has a recipe, the recipe's name.
        columns: By name, in the paper's order.
    """

    name: str
    title: str
    figures: Mapping[str, Mapping[str, float | None]]
    experiments: Mapping[str, str]
    columns: Mapping[str, Column]

    def figure(self, row: str, column: str) -> float | None:
        """Returns the paper's figure, percent; None where it has none."""
        return self.figures.get(row, {}).get(column)

    def row_of(self, experiment: str | None) -> str | None:
        """Returns the row that a recipe reproduces; None where it is of another table."""
        return next((row for row, recipe in self.experiments.items() if recipe == experiment), None)


@lru_cache(maxsize=1)
def paper_results() -> Mapping[str, Any]:
    """Returns every published figure that ships with the package, as its file has them.

    >>> paper_results()["rag_end2end"]["squad_as_knowledge_base_em"]["rag_end2end"]
    40.02
    """
    results: dict[str, Any] = yaml.safe_load(RESULTS_FILE.read_text(encoding="utf-8"))
    return results


def table_names() -> list[str]:
    """Returns the tables that :func:`paper_table` knows."""
    return list(_tables())


def paper_table(name: str) -> PaperTable:
    """Returns a table by its name.

    Raises:
        ConfigError: No such table; the message lists those that there are.

    >>> table = paper_table("rag/table6")
    >>> table.figure("rag_token_frozen", "nq_em"), table.row_of("rag/table6_rag_token_frozen")
    (37.8, 'rag_token_frozen')
    """
    if name not in _tables():
        paper = name.partition("/")[0]
        same = [known for known in table_names() if known.startswith(f"{paper}/")]
        raise ConfigError(f"paper: expected one of {', '.join(same or table_names())}; got {name!r}.")
    told = _tables()[name]
    node = _at(paper_results(), told["source"])
    columns = {
        key: Column(
            key, tuple(one.get("dataset", ())), tuple(one["metric"]), one.get("split", told.get("split", "test"))
        )
        for key, one in told["columns"].items()
    }
    figures = _figures(told, node)
    rows = told["rows"] if "rows" in told else list(told["cells"])
    recipes = {row: f"{name}_{row}" for row in rows} | told.get("experiments", {})
    experiments = {row: recipe for row, recipe in recipes.items() if recipe is not None}
    return PaperTable(name, told["title"], figures, experiments, columns)


def check_known(setting: str, names: Collection[str], known: Collection[str]) -> None:
    """Refuses names that a table does not have.

    Raises:
        ConfigError: Lists those that it has.
    """
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"{setting}: expected some of {', '.join(known)}; got {', '.join(map(repr, unknown))}.")


@lru_cache(maxsize=1)
def _tables() -> Mapping[str, Any]:
    tables: dict[str, Any] = yaml.safe_load(TABLES_FILE.read_text(encoding="utf-8"))
    return tables


def _figures(told: Mapping[str, Any], node: Any) -> dict[str, dict[str, float | None]]:
    if told["layout"] == "matrix":
        rows = {row: values for row, values in node.items() if row != "columns"}
        return {row: dict(zip(node["columns"], values, strict=True)) for row, values in rows.items()}
    if told["layout"] == "nested":
        return {row: {column: node[row].get(column) for column in told["columns"]} for row in told["rows"]}
    return {row: {column: _at(node, path) for column, path in cells.items()} for row, cells in told["cells"].items()}


def _at(node: Any, path: str) -> Any:
    """Returns what lies at a path such as ``rag.index_hot_swap_82_leaders.mismatched.0``."""
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
