"""Labelled texts: reading them, naming their classes, dividing one file."""

import gzip
import json
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.labelled import LabelSet, divided, read_labelled
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.types import LabelledText, RelationMention, TaggedSentence

GOOD = {"id": 1, "text": "a funny film", "label": 1}


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_texts_are_read_in_order(tmp_path, name):
    rows = [GOOD, {"id": "b", "text": "x ", "label": "pos", "more": 1}, "", {"text": "y", "label": 0}]
    assert read_labelled(write(tmp_path / name, rows)) == [
        LabelledText("1", "a funny film", "1"),
        LabelledText("b", "x ", "pos"),
        LabelledText("4", "y", "0"),
    ]


def test_fields_are_named(tmp_path):
    rows = [
        {"question": "is it?", "contexts": ["One.", "Two."], "gold": "yes"},
        {"question": "and so?", "contexts": "Three.", "gold": "no", "heading": "Doubts"},
        {"question": "and so?", "contexts": "Three.", "gold": "no", "heading": None},
    ]
    path = write(tmp_path / "t.jsonl", rows)
    assert read_labelled(path, text="question", label="gold", context="contexts", title="heading") == [
        LabelledText("1", "is it?", "yes", "One. Two."),
        LabelledText("2", "Doubts and so?", "no", "Three."),
        LabelledText("3", "and so?", "no", "Three."),
    ]


def test_labels_get_names_merge_and_are_dropped_with_a_word_about_it(tmp_path, caplog):
    rows = [{"text": "x", "label": label} for label in (0, "0", 1, 2, 3, 2)]
    names = {"0": "bad", "1": "bad", "2": None, "9": "typo"}
    with caplog.at_level(logging.INFO):
        records = read_labelled(write(tmp_path / "t.jsonl", rows), label_names=names)
    assert [record.label for record in records] == ["bad", "bad", "bad", "3"]
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
        "2 lines dropped, labelled 2",
        "label_names names 9, which no line has",
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"t\.jsonl: expected at least one labelled text, came none\. Check the file and label_names"),
        ([GOOD, "[1]"], r"t\.jsonl, line 2: expected a JSON object, came a list"),
        ([GOOD, GOOD], r"t\.jsonl: expected each id once, came id '1' on line 1 and again on line 2"),
        ([GOOD | {"id": 2}, {"text": "x", "label": 1}], r"each id once, came id '2' on line 1 and again on line 2"),
        ([GOOD | {"id": [1]}], r"line 1: field 'id': expected a string or a whole number, came list '\[1\]'"),
        ([GOOD | {"id": ""}], r"line 1: field 'id': expected a string or a whole number, came ''\. Fill it in"),
        ([{"label": 1}], r"line 1: field 'text' is missing; expected a string\. Found fields: \['label'\]"),
        ([GOOD | {"text": 7}], r"line 1: field 'text': expected a string, came int '7'"),
        ([GOOD | {"text": " "}], r"line 1: field 'text': expected a text, came an empty one"),
        ([{"text": "x"}], r"line 1: field 'label' is missing; expected a label\. Found fields: \['text'\]"),
        ([GOOD | {"label": 1.0}], r"line 1: field 'label': expected a string or a whole number, came float '1\.0'"),
        ([GOOD | {"label": True}], r"field 'label': .*, came bool 'True'\. Write it as a string"),
        ([GOOD | {"label": None}], r"field 'label': expected a string or a whole number, came NoneType"),
        ([GOOD | {"label": " "}], r"line 1: field 'label': expected a string or a whole number, came ' '"),
    ],
)
def test_bad_lines_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path / "t.jsonl", rows))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (..., r"line 1: field 'c' is missing; expected a string"),
        (3, r"field 'c': expected a string, came int '3'"),
        ("", r"field 'c': expected a text, came an empty one"),
        ([], r"field 'c': expected at least one string, came \[\]"),
        ([" ", "\n"], r"field 'c': expected a text, came an empty one"),
        (["x", 3], r"field 'c': expected a list of non-empty strings, came 3 at position 1"),
        (["", "x"], r"field 'c': expected a list of non-empty strings, came '' at position 0"),
    ],
)
def test_bad_contexts_are_refused(tmp_path, context, message):
    rows = [GOOD if context is ... else GOOD | {"c": context}]
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path / "t.jsonl", rows), context="c")


def test_bad_files_and_names_are_refused(tmp_path):
    path = write(tmp_path / "t.jsonl", [GOOD])
    with pytest.raises(MissingFileError, match="labelled texts: no such file"):
        read_labelled(tmp_path / "none.jsonl")
    with pytest.raises(
        DataError, match=r"labelled texts: expected a file ending in \.jsonl or \.jsonl\.gz, came .*csv"
    ):
        read_labelled(write(tmp_path / "t.csv", []))
    with pytest.raises(ConfigError, match=r"label_names: expected a name for '1', or null to drop it, came ' '"):
        read_labelled(path, label_names={"1": " "})
    with pytest.raises(DataError, match="expected at least one labelled text"):
        read_labelled(path, label_names={"1": None})


def test_a_bad_line_is_told_of_even_if_its_label_is_dropped(tmp_path):
    with pytest.raises(DataError, match="field 'text': expected a text"):
        read_labelled(
            write(tmp_path / "t.jsonl", [GOOD, GOOD | {"id": 2, "text": "", "label": 0}]), label_names={"0": None}
        )


def texts(ids):
    return [LabelledText(one, "text", "yes") for one in ids]


@given(st.sets(st.text(max_size=5), max_size=30), st.randoms(), st.integers(0, 5))
def test_a_division_is_one_and_depends_on_ids_alone(ids, random, seed):
    records = texts(sorted(ids))
    shuffled = random.sample(records, len(records))
    parts = divided(records, (0.5, 0.2, 0.3), seed=seed)
    again = divided(shuffled, (0.5, 0.2, 0.3), seed=seed)
    half = divided(records[::2], (0.5, 0.2, 0.3), seed=seed)
    assert sorted(record.id for part in parts for record in part) == sorted(ids)
    for part, other, fewer in zip(parts, again, half, strict=True):
        assert set(part) == set(other)
        assert set(fewer) == set(part) & set(records[::2])
        assert part == [record for record in records if record in part]  # order is kept


def test_parts_are_about_as_large_as_their_shares():
    records = texts(str(number) for number in range(10_000))
    sizes = [len(part) for part in divided(records, (0.7, 0.2, 0.1))]
    for size, expected in zip(sizes, (7000, 2000, 1000), strict=True):
        assert abs(size - expected) < 4 * (expected * (1 - expected / 10_000)) ** 0.5  # four standard deviations
    assert divided(records, (0.7, 0.3), seed=0) != divided(records, (0.7, 0.3), seed=1)
    assert divided(records, (1,)) == (records,)


@pytest.mark.parametrize("shares", [(), (0.5, 0.6), (0.5, 0.4), (1.0, 0.0), (1.5, -0.5), (float("nan"), 1)])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ConfigError, match=re.escape("shares: expected positive numbers that sum to 1, such as (0.8,")):
        divided(texts("ab"), shares)


def test_labels_are_numbered_in_alphabetical_order():
    mentions = [RelationMention("1", "a b", (0, 1), (2, 3), label) for label in ("P9", "P1", "P9")]
    labels = LabelSet.from_records(mentions)
    assert labels == LabelSet.from_records(mentions[::-1]) == LabelSet(("P1", "P9"))
    assert len(labels) == 2
    assert [labels.number(name, "here") for name in labels.names] == [0, 1]
    assert LabelSet.from_list(json.loads(json.dumps(labels.to_list()))) == labels
    with pytest.raises(
        DataError, match=r"t, line 3: expected one of the labels seen in training \(P1, P9\), came 'P2'"
    ):
        labels.number("P2", "t, line 3")


def test_tags_have_both_prefixes_of_each_type_and_outside_first():
    sentences = [TaggedSentence("1", ("x", "y"), ("B-PER", "I-PER")), TaggedSentence("2", ("z",), ("B-LOC",))]
    labels = LabelSet.from_sentences(sentences)
    assert labels.names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert LabelSet.from_sentences(sentences[::-1]) == labels


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("ab", r"label set: expected a list of strings, came str 'ab'"),
        (["a"], r"label set: expected at least two names, each once, came \['a'\]"),
        (["a", "b", "a"], r"at least two names, each once, came \['a', 'b', 'a'\]"),
        (["a", 1], r"label set: expected a list of strings, came list"),
        (["a", ""], r"label set: expected names that are not blank, came \['a', ''\]"),
    ],
)
def test_bad_label_sets_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        LabelSet.from_list(names)


def test_one_class_is_nothing_to_learn():
    with pytest.raises(DataError, match=r"expected at least two names, each once, came \['yes'\]"):
        LabelSet.from_records(texts("ab"))
    with pytest.raises(DataError, match=r"expected at least two names, each once, came \['O'\]"):
        LabelSet.from_sentences([TaggedSentence("1", ("x",), ("O",))])
