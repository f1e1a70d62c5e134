import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.errors import DataError, MissingExtraError, MissingFileError
from rag_lightning.types import Passage

PASSAGES = [
    Passage("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet,\tand "more"'),
    Passage("2", '"Heroes"', "A song.\nOf two lines."),
    Passage("x-3", "", "No title here."),
]
SHARED = Path(__file__).parents[4] / "shared" / "data"


def write_jsonl(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def record(passage):
    return {"id": passage.id, "title": passage.title, "text": passage.text}


def write_tsv(path, passages=PASSAGES):
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["id", "text", "title"])
    writer.writerows([p.id, p.text, p.title] for p in passages)
    data = stream.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, columns=("title", "id", "text"), **changes):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = {name: [getattr(p, name) for p in PASSAGES] for name in columns} | changes
    pq.write_table(pa.table(table), path, row_group_size=2)
    return path


def write_dataset(path, split=None):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_list([record(p) | {"embeddings": 0} for p in PASSAGES])
    (datasets.DatasetDict({split: dataset}) if split else dataset).save_to_disk(str(path))
    return path


FORMATS = {
    "a.jsonl": lambda path: write_jsonl(path, map(record, PASSAGES)),
    "a.jsonl.gz": lambda path: write_jsonl(path, map(record, PASSAGES)),
    "psgs_w100.tsv": write_tsv,
    "psgs_w100.tsv.gz": write_tsv,
    "a.parquet": write_parquet,
    "dataset": write_dataset,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_corpus(tmp_path, name):
    path = FORMATS[name](tmp_path / name)
    corpus = PassageCorpus.read(str(path))
    assert list(corpus) == PASSAGES
    assert corpus.hash == PassageCorpus.from_passages(PASSAGES).hash
    assert corpus.source == str(path)


def test_a_corpus_is_a_sequence_with_rows_by_id():
    corpus = PassageCorpus.from_passages(PASSAGES)
    assert len(corpus) == 3
    assert [corpus[corpus.row_of(p.id)] for p in PASSAGES] == PASSAGES
    assert corpus[-1] == PASSAGES[-1]
    assert corpus[1:] == PASSAGES[1:]
    assert PASSAGES[0] in corpus
    assert Passage("1", "other", "text") not in corpus
    assert (corpus.has_id("2"), corpus.has_id("two")) == (True, False)


def test_row_of_names_an_unknown_id():
    with pytest.raises(DataError, match="passage id 'two' is not among the 3 passages of films"):
        PassageCorpus.from_passages(PASSAGES, source="films").row_of("two")


def test_psgs_w100_as_dpr_writes_it(tmp_path):
    path = tmp_path / "psgs_w100.tsv"
    path.write_text('id\ttext\ttitle\n1\t"Aaron ( or ; ""Ahärôn"") is a prophet"\tAaron\n2\tplain\t"""Heroes"""\n')
    assert list(PassageCorpus.read(path)) == [
        Passage("1", "Aaron", 'Aaron ( or ; "Ahärôn") is a prophet'),
        Passage("2", '"Heroes"', "plain"),
    ]


def test_blank_lines_are_no_passages(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["", json.dumps(record(PASSAGES[0])), "  "])
    assert len(PassageCorpus.read(path)) == 1


@settings(deadline=None)
@given(st.permutations(PASSAGES), st.sampled_from(["id", "title", "text"]))
def test_the_hash_follows_order_and_every_field(order, field):
    whole = PassageCorpus.from_passages(PASSAGES).hash
    assert (PassageCorpus.from_passages(order).hash == whole) == (order == PASSAGES)
    changed = [Passage(**(record(PASSAGES[0]) | {field: "new"})), *PASSAGES[1:]]
    assert PassageCorpus.from_passages(changed).hash != whole


GOOD = {"id": "a", "title": "T", "text": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"a\.jsonl: expected at least one passage, came none"),
        ([GOOD, "", '{"id": '], r"a\.jsonl, line 3: expected one JSON object on the line, came '\{\"id\":'"),
        ([GOOD, "[1]"], r"a\.jsonl, line 2: expected a JSON object, came a list"),
        ([GOOD, "", GOOD], r"each passage id once, came id 'a' on line 1 and again on line 3"),
        (
            [{"id": "a", "title": "T"}],
            r"line 1: field 'text' is missing; expected a string. Found fields: \['id', 'title'\]",
        ),
        ([{"id": "a", "text": "x"}], r"line 1: field 'title' is missing"),
        ([GOOD | {"id": 7}], r"line 1: field 'id': expected a string, came int '7'"),
        ([GOOD | {"text": None}], r"line 1: field 'text': expected a string, came NoneType"),
        ([GOOD | {"title": ["T"]}], r"line 1: field 'title': expected a string, came list"),
        ([GOOD, GOOD | {"id": "b", "text": " \n"}], r"line 2: field 'text': expected a text, came an empty one"),
        ([GOOD | {"id": ""}], r"line 1: field 'id': expected a text, came an empty one"),
    ],
)
def test_bad_json_lines_name_file_line_and_field(tmp_path, rows, message):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message) as error:
        PassageCorpus.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: expected the header .* came \[\]"),
        ("1\tsome text\ttitle\n", r"line 1: expected the header .* came \['1', 'some text', 'title'\]"),
        ("id\ttext\ttitle\n", "expected at least one passage, came none"),
        ("id\ttext\ttitle\n1\ta\tA\n2\tb\n", r"line 3: expected the 3 tab-separated fields .*came 2"),
        ('id\ttext\ttitle\n1\ta\tA\n2\t"Weird" song\tB\n', r"line 3: expected fields quoted as DPR writes them"),
        (
            'id\ttext\ttitle\n1\ta\tA\n2\t"never closed\tB\n3\tc\tC\n',
            r"line 3: expected fields quoted as DPR writes them",
        ),
        ('id\ttext\ttitle\n1\t"two\nlines"\tA\n1\tb\tB\n', r"came id '1' on line 2 and again on line 4"),
        ("id\ttext\ttitle\n1\t\tA\n", r"line 2: field 'text': expected a text, came an empty one"),
    ],
)
def test_bad_tsv_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "a.tsv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as error:
        PassageCorpus.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.tsv.gz"])
@pytest.mark.parametrize("damage", [lambda data: b"plain text", lambda data: data[:-12]])
def test_torn_gzip_files_are_data_errors(tmp_path, name, damage):
    path = FORMATS["a.jsonl.gz"](tmp_path / name) if "jsonl" in name else write_tsv(tmp_path / name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match="not readable as UTF-8"):
        PassageCorpus.read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.tsv"])
def test_other_encodings_are_data_errors(tmp_path, name):
    path = tmp_path / name
    path.write_bytes("id\ttext\ttitle\n1\tcafé\tA\n".encode("latin-1"))
    with pytest.raises(DataError, match="not readable as UTF-8"):
        PassageCorpus.read(path)


def test_parquet_errors(tmp_path):
    with pytest.raises(DataError, match=r"expected the columns .* came \['id', 'title'\]: \['text'\] missing"):
        PassageCorpus.read(write_parquet(tmp_path / "columns.parquet", columns=("id", "title")))
    with pytest.raises(DataError, match=r"row 1: field 'id': expected a string, came int '5'"):
        PassageCorpus.read(write_parquet(tmp_path / "ints.parquet", id=[5, 6, 7]))
    with pytest.raises(DataError, match="'1' on row 1 and again on row 3"):
        PassageCorpus.read(write_parquet(tmp_path / "twice.parquet", id=["1", "2", "1"]))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"torn\.parquet: not readable as parquet"):
        PassageCorpus.read(tmp_path / "torn.parquet")


def test_dataset_directory_errors(tmp_path):
    with pytest.raises(DataError, match=r"came a dictionary of the splits \['train'\]. Name one, such as .*train"):
        PassageCorpus.read(write_dataset(tmp_path / "splits", split="train"))
    assert len(PassageCorpus.read(tmp_path / "splits" / "train")) == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="expected a directory written by datasets' save_to_disk"):
        PassageCorpus.read(tmp_path / "empty")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("folder", "datasets")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"needs the package '{package}'.*rag_lightning\[parquet\]"):
        PassageCorpus.read(tmp_path / name)


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(MissingFileError, match=r"passages: no such file: .*gone\.jsonl"):
        PassageCorpus.read(tmp_path / "gone.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"expected a file ending in \.jsonl.* came .*a\.csv"):
        PassageCorpus.read(tmp_path / "a.csv")


def test_from_passages_checks_too():
    with pytest.raises(DataError, match="'1' on passage 1 and again on passage 2"):
        PassageCorpus.from_passages([PASSAGES[0], PASSAGES[0]])
    with pytest.raises(DataError, match="memory: expected at least one passage"):
        PassageCorpus.from_passages([])


def test_resolve():
    assert resolve("some/file.jsonl") == Path("some/file.jsonl")
    assert resolve(Path("/a/b.tsv")) == Path("/a/b.tsv")
    for name in ("bundled:films/nothing.jsonl.gz", "bundled:../errors.py", "bundled:nothing"):
        with pytest.raises(MissingFileError, match=f"no bundled file '{name}'; there are: "):
            resolve(name)
    assert resolve("bundled:films/tokenizer").is_dir(), "models are folders"


def test_bundled_files_are_found_and_read():
    path = resolve("bundled:films/passages.jsonl.gz")
    assert path.parts[-3:] == ("corpora", "films", "passages.jsonl.gz")
    assert len(PassageCorpus.read("bundled:films/passages.jsonl.gz")) > 1000


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")
def test_squad_open_is_read_whole():
    corpus = PassageCorpus.read(SHARED / "squad_open" / "passages.jsonl.gz")
    assert len(corpus) == 2067
    assert corpus[0].title == "1973 oil crisis"
