"""Tables are not folded where the output goes to a file."""

import pytest
from rich.table import Table

from rag_lightning.cli.console import FILE_WIDTH, table_console


def test_a_file_is_wide_enough_for_a_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("row", "config")
    table.add_row("r" * 80, "c" * 80)
    table_console().print(table)
    assert "r" * 80 + " │ " + "c" * 80 in capsys.readouterr().out
    assert table_console().width == FILE_WIDTH


def test_a_given_width_goes_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert table_console().width == 90
