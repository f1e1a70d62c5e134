"""``rag-lightning data``: what is fetched lies where a recipe looks for it; what cannot be fetched is named."""

from pathlib import Path
from typing import Any

import pytest

from rag_lightning.corpora.fetch.lock import LOCK_NAME
from rag_lightning.utils.io import read_json
from tests.recipe_files import NUMBER, write_published


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for a server, named by the environment."""
    write_published(tmp_path / "published")
    (tmp_path / "published" / "nq_open").rename(tmp_path / "mirror")
    monkeypatch.setenv(
        "RAG_LIGHTNING_MIRROR", f"https://dl.fbaipublicfiles.com/dpr/data/retriever/={tmp_path / 'mirror'}/"
    )
    return tmp_path / "mirror"


def test_what_was_fetched_is_what_a_recipe_prepares(
    mirror: Path, cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("data", tmp_path / "out", "fetch", "nq_open", f"output={tmp_path / 'DATA'}")
    assert capsys.readouterr().out.count(": fetched") == 3
    assert len(read_json(tmp_path / "DATA" / LOCK_NAME)) == 3
    cli("data", tmp_path / "out", "fetch", "nq_open", f"output={tmp_path / 'DATA'}")
    assert capsys.readouterr().out.count(": already there") == 3
    from rag_lightning.corpora.generation.open_domain import OpenQuestions

    names = {"train": "nq_open/nq-train", "validation": "nq_open/nq-dev", "test": "nq_open/nq-test"}
    data = OpenQuestions(folder=str(tmp_path / "DATA"), **names)()
    assert {len(part) for part in data.questions.values()} == {NUMBER}


def test_a_file_that_is_not_there_ends_with_its_name(mirror: Path, cli: Any, tmp_path: Path) -> None:
    (mirror / "nq-dev.qa.csv").unlink()
    with pytest.raises(SystemExit, match=r"error: .*nq-dev\.qa\.csv: expected the file there, found none"):
        cli("data", tmp_path / "out", "fetch", "nq_open", f"output={tmp_path / 'DATA'}")
    assert (tmp_path / "DATA" / "nq_open" / "nq-train.qa.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "nothing", "output=D"], "expected names among wikipedia, nq_open, .*, or all, got nothing"),
        (["fetch", "output=D"], "expected names of what to fetch, or all, got none"),
        (["fetch", "nq_open"], "output: expected a folder, came none"),
        (["action=sell"], "expected the action fetch or list, got 'sell'"),
        (["fetch", "x", "output=D", "+sources.x.files=[{url: 'ftp://a/b'}]"], "expected a url that begins with"),
    ],
)
def test_what_cannot_be_asked_is_named(arguments: list[str], message: str, cli: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        cli("data", tmp_path / "out", *arguments)


def test_what_there_is_is_listed(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli("data", tmp_path / "out", "list")
    told = capsys.readouterr().out
    assert "wikipedia" in told
    assert "4.69" in told
