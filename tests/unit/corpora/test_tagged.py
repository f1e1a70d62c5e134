"""Tagged sentences from JSON lines, columns and spans, in BIO whatever they came in."""

import gzip
import json
import logging

import pytest

from rag_lightning.corpora.tagged import read_spans, read_tagged
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.text.tagging import bio_spans
from rag_lightning.types import TaggedSentence

GOOD = {"id": 7, "tokens": ["New", "York", "ist"], "tags": ["B-LOC", "I-LOC", "O"]}
SPANS = {"id": 1, "text": "叶老桂认为SOS", "entities": [[5, 8, "game", "SOS"], [0, 3, "name", "叶老桂"]]}


def write(path, content):
    if not isinstance(content, str):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def rows(*tags):
    return [{"tokens": ["w"] * len(sentence.split()), "tags": sentence.split()} for sentence in tags]


def read_tags(path):
    return [" ".join(sentence.tags) for sentence in read_tagged(path)]


def test_json_lines_are_read_in_order(tmp_path):
    path = write(tmp_path / "t.jsonl.gz", [GOOD, {"tokens": ["\u200b", " "], "tags": ["O", "O"]}])
    assert read_tagged(path) == [
        TaggedSentence("7", ("New", "York", "ist"), ("B-LOC", "I-LOC", "O")),
        TaggedSentence("2", ("\u200b", " "), ("O", "O")),
    ]
    other = write(tmp_path / "o.jsonl", [{"words": ["x"], "ner": ["O"]}])
    assert read_tagged(other, tokens="words", tags="ner") == [TaggedSentence("1", ("x",), ("O",))]


@pytest.mark.parametrize("name", ["t.txt", "t.conll", "t.conll.gz"])
def test_columns_are_read_with_the_line_of_the_first_word_as_id(tmp_path, name):
    text = (
        "-DOCSTART- -X- -X- O\n\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n-DOCSTART- -X- O O\n"
        "a\u00a0b\tNN\tB-LOC\r\n\u2028 x I-LOC\n \t\nlast O"
    )
    assert read_tagged(write(tmp_path / name, text)) == [
        TaggedSentence("4", ("EU", "rejects"), ("B-ORG", "O")),
        TaggedSentence("7", ("a\u00a0b", "\u2028"), ("B-LOC", "I-LOC")),
        TaggedSentence("10", ("last",), ("O",)),
    ]


def test_every_scheme_becomes_bio(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    bio = ["B-LOC I-LOC B-LOC O", "O B-PER B-LOC"]
    forms = {
        "BIO": bio,
        "IOB1": ["I-LOC I-LOC B-LOC O", "O I-PER I-LOC"],
        "BIOES": ["B-LOC E-LOC S-LOC O", "O S-PER S-LOC"],
    }
    for scheme, tags in forms.items():
        caplog.clear()
        assert read_tags(write(tmp_path / "t.jsonl", rows(*tags))) == bio
        said = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
        assert said == ([] if scheme == "BIO" else [f"the tags are {scheme}; they are read as BIO"])


@pytest.mark.parametrize(
    ("tags", "mended", "count"),
    [
        (["B-LOC O I-LOC", "I-PER I-LOC"], ["B-LOC O B-LOC", "B-PER B-LOC"], "3 of 5 tags break BIO"),
        (["S-LOC E-LOC", "B-PER I-PER"], ["B-LOC B-LOC", "B-PER I-PER"], "2 of 4 tags break BIOES"),
    ],
)
def test_broken_tags_are_mended_and_counted_once(tmp_path, caplog, tags, mended, count):
    assert read_tags(write(tmp_path / "t.jsonl", rows(*tags))) == mended
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"t.jsonl: {count}" in warnings[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tags": ["O"]}, r"line 1: field 'tokens' is missing; expected a list of strings\. Found fields: \['tags'\]"),
        ({"tokens": ["x"]}, r"line 1: field 'tags' is missing; expected a list of strings"),
        ({"tokens": "x", "tags": ["O"]}, r"line 1: field 'tokens': expected a list of strings, came str 'x'"),
        ({"tokens": [], "tags": []}, r"line 1: field 'tokens': expected at least one string, came \[\]"),
        ({"tokens": ["x", ""], "tags": ["O", "O"]}, r"field 'tokens': .*non-empty strings, came '' at position 1"),
        ({"tokens": ["x"], "tags": [3]}, r"field 'tags': .*non-empty strings, came 3 at position 0"),
        (GOOD | {"tags": ["O", "O"]}, r"line 1: field 'tags': expected one tag for each of the 3 tokens, came 2"),
        (GOOD | {"tags": ["O", "O", "LOC"]}, r"line 1: field 'tags', position 2: expected O, or B-, .*came 'LOC'"),
        (GOOD | {"tags": ["O", "B-", "O"]}, r"position 1: expected O, or B-, I-, E- or S- and an entity type.*'B-'"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_tagged(write(tmp_path / "t.jsonl", [row]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t\.txt: expected at least one sentence, came none"),
        ("-DOCSTART- O\n\n", r"t\.txt: expected at least one sentence, came none"),
        ("a O\nb\n", r"t\.txt, line 2: expected a word first and its tag last, .*came \['b'\]"),
        ("a O\n\nb X-LOC\n", r"t\.txt, line 3: last column: expected O, or B-, I-, .*came 'X-LOC'"),
    ],
)
def test_bad_columns_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_tagged(write(tmp_path / "t.txt", text))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="tagged sentences: no such file"):
        read_tagged(tmp_path / "none.txt")
    with pytest.raises(
        DataError, match=r"tagged sentences: expected a file ending in \.jsonl, \.txt or \.conll .*t\.csv"
    ):
        read_tagged(write(tmp_path / "t.csv", "x"))
    with pytest.raises(DataError, match=r"t\.jsonl: expected each id once, came id '7'"):
        read_tagged(write(tmp_path / "t.jsonl", [GOOD, GOOD]))
    (tmp_path / "t.txt").write_bytes(b"a O\n\xff\xfe O\n")
    with pytest.raises(DataError, match=r"t\.txt, after line \d: the file is not readable as UTF-8 text"):
        read_tagged(tmp_path / "t.txt")
    with pytest.raises(DataError, match=r"entity spans: expected a file ending in \.jsonl"):
        read_spans(tmp_path / "t.txt")
    with pytest.raises(DataError, match=r"expected at least one text, came none"):
        read_spans(write(tmp_path / "t.jsonl", []))


def test_spans_become_a_tag_for_each_character(tmp_path):
    plain = {"content": "无", "marks": []}
    assert read_spans(write(tmp_path / "t.jsonl", [SPANS])) == [
        TaggedSentence(
            "1",
            tuple("叶老桂认为SOS"),
            ("B-name", "I-name", "I-name", "O", "O", "B-game", "I-game", "I-game"),
        )
    ]
    path = write(tmp_path / "o.jsonl", [plain])
    assert read_spans(path, text="content", entities="marks") == [TaggedSentence("1", ("无",), ("O",))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, r"line 1: field 'text': expected a text, came an empty one"),
        ({"entities": {}}, r"line 1: field 'entities': expected a list of \[start, end, type, string\], came '\{\}'"),
        (
            {"entities": [[0, 3, "name"]]},
            r"field 'entities': expected \[start, end, type, string\], came \[0, 3, 'name'\]",
        ),
        ({"entities": [[0, True, "name", "叶"]]}, r"field 'entities': expected \[start, end, type, string\], came"),
        ({"entities": [[0, 3, " ", "叶老桂"]]}, r"field 'entities': expected \[start, end, type, string\], came"),
        (
            {"entities": [[6, 9, "game", "OS"]]},
            r"expected 0 <= start < end <= 8, the characters of the text, came \[6, 9",
        ),
        ({"entities": [[-1, 2, "game", "x"]]}, r"expected 0 <= start < end <= 8"),
        ({"entities": [[2, 2, "game", ""]]}, r"expected 0 <= start < end <= 8"),
        ({"entities": [[0, 2, "name", "叶老桂"]]}, r"expected the string of characters 0 to 2, '叶老', came '叶老桂'"),
        (
            {"entities": [[1, 4, "name", "老桂认"], [0, 3, "name", "叶老桂"]]},
            r"spans that do not overlap, came \[0, 3, 'name'\] and \[1, 4, 'name'\]\. Remove one",
        ),
        (
            {"entities": [[1, 3, "name", "老桂"], [0, 3, "name", "叶老桂"]]},
            r"came \[0, 3, 'name'\] and \[1, 3, 'name'\]\. .*nested='outermost' if one lies within the other",
        ),
    ],
)
def test_bad_spans_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_spans(write(tmp_path / "t.jsonl", [SPANS | change]))


def test_outermost_entities_are_kept_if_asked_and_the_others_counted(tmp_path, caplog):
    inner = [[1, 3, "name", "老桂"], [0, 3, "game", "叶老桂"], [2, 3, "book", "桂"], [3, 5, "name", "认为"]]
    (read,) = read_spans(write(tmp_path / "t.jsonl", [SPANS | {"entities": inner}]), nested="outermost")
    assert bio_spans(read.tags) == [(0, 3, "game"), (3, 5, "name")]
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "2 entities lie within others and were left out"
    ]
    crossing = [[1, 4, "name", "老桂认"], [0, 3, "name", "叶老桂"]]
    with pytest.raises(DataError, match="expected spans that do not overlap"):
        read_spans(write(tmp_path / "t.jsonl", [SPANS | {"entities": crossing}]), nested="outermost")


def test_a_missing_list_of_entities_is_no_empty_one(tmp_path):
    with pytest.raises(DataError, match=r"line 1: field 'entities' is missing; expected a list of \[start, end"):
        read_spans(write(tmp_path / "t.jsonl", [{"text": "x"}]))
