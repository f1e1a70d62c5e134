import gzip
import json
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.utils.io import (
    atomic_directory,
    atomic_path,
    existing_file,
    open_text,
    read_json,
    read_json_lines,
    write_json,
    write_json_lines,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def interrupted(path):
    path.write_text("half")
    raise KeyboardInterrupt


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=3), st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_what_is_written_as_json_lines_is_read_back(tmp_path, records, name):
    write_json_lines(tmp_path / name, records)
    found = list(read_json_lines(tmp_path / name))
    assert [record for _, record in found] == records
    assert [number for number, _ in found] == list(range(1, len(records) + 1))
    assert leftovers(tmp_path) == []


def test_the_same_records_give_the_same_compressed_bytes(tmp_path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_json_lines(tmp_path / name, [{"x": 1}])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": "é"}')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (4, {"a": "é"})]
    with open_text(path) as stream:
        assert stream.encoding.lower() == "utf-8"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"x.jsonl, line 2: expected one JSON object on the line, came '\{\"a\":' "),
        (b"[1]\n", r"x.jsonl, line 1: expected a JSON object, came a list"),
        (b'{"a": 1}\n\xff\xfe\n', r"x.jsonl, after line \d: the file is not readable as UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_json_lines(path))


@pytest.mark.parametrize("damage", ["no gzip", "torn"])
def test_a_damaged_gzip_is_named(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    path.write_bytes(b'{"a": 1}\n' if damage == "no gzip" else whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x.jsonl.gz, after line \d+: the file is not readable as UTF-8 JSON lines"):
        list(read_json_lines(path))


def test_json_files(tmp_path):
    path = tmp_path / "folder" / "x.json"
    write_json(path, {"a": ["é", 1.5, None]})
    assert read_json(path) == {"a": ["é", 1.5, None]}
    assert "é" in path.read_text(encoding="utf-8")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.write_text("{")
    with pytest.raises(DataError, match=r"settings: .*x.json is not valid JSON"):
        read_json(path, "settings")
    with pytest.raises(MissingFileError, match=r"settings: no such file: .*nowhere.json \(looked in "):
        read_json(tmp_path / "nowhere.json", "settings")
    assert existing_file(str(path), "it") == path


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as part:
        interrupted(part)
    assert json.loads(path.read_text()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "model"
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as part:
        interrupted(part / "weights")
    assert list(target.parent.iterdir()) == []
    with atomic_directory(target) as part:
        (part / "weights").write_text("whole")
        assert not target.exists()
    assert (target / "weights").read_text() == "whole"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert os.listdir(target.parent) == ["model"]


def test_an_existing_folder_stays_unless_it_is_to_be_replaced(tmp_path):
    target = tmp_path / "model"
    for text, replace, expected in (("1", False, "1"), ("2", False, "1"), ("3", True, "3")):
        with atomic_directory(target, replace=replace) as part:
            (part / "weights").write_text(text)
            (part / f"only-{text}").touch()
        assert (target / "weights").read_text() == expected
        assert os.listdir(tmp_path) == ["model"]
    assert not (target / "only-1").exists()
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, replace=True) as part:
        interrupted(part / "weights")
    assert (target / "weights").read_text() == "3"
    assert os.listdir(tmp_path) == ["model"]
