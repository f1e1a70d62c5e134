"""The eleven real data sets of classification, tagging and relations: each is read whole, with the counts it states."""

import gzip
import json
import logging
import re
from pathlib import Path

import pytest

from rag_lightning.corpora.labelled import LabelSet, divided, read_labelled
from rag_lightning.corpora.relations import read_relations
from rag_lightning.corpora.tagged import read_spans, read_tagged
from rag_lightning.text.tagging import bio_spans, repaired

SHARED = Path(__file__).parents[4] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")

# reader, its settings, and how many classes (or tags) the training part has
SETS = {
    "sst2": (read_labelled, {}, 2),
    "chnsenticorp": (read_labelled, {}, 2),
    "ag_news": (read_labelled, {"title": "title"}, 4),
    "fever": (read_labelled, {"text": "claim"}, 3),
    "boolq": (read_labelled, {"text": "question", "context": "passage"}, 2),
    "pubmedqa": (read_labelled, {"text": "question", "context": "contexts"}, 3),
    "wikigold": (read_tagged, {}, 1 + 2 * 4),
    "wnut17": (read_tagged, {}, 1 + 2 * 6),
    "cluener2020": (read_spans, {"nested": "outermost"}, 1 + 2 * 10),
    "semeval2010_task8": (read_relations, {}, 19),
    "fewrel": (read_relations, {}, 16),
}


def stated_rows(name):
    """Returns the rows of each file by the table in the data set's README."""
    table = re.findall(r"^\| (\w+)\.jsonl\.gz \| ([\d,]+) \|", (SHARED / name / "README.md").read_text(), re.MULTILINE)
    return {part: int(rows.replace(",", "")) for part, rows in table if part != "relations"}


def raw(name, part):
    with gzip.open(SHARED / name / f"{part}.jsonl.gz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("name", SETS)
def test_every_file_is_read_whole(name):
    reader, settings, num_classes = SETS[name]
    rows = stated_rows(name)
    parts = {part: reader(SHARED / name / f"{part}.jsonl.gz", **settings) for part in rows}
    assert {part: len(records) for part, records in parts.items()} == rows
    train = next(iter(parts.values()))
    tagged = reader is not read_labelled and reader is not read_relations
    labels = LabelSet.from_sentences(train) if tagged else LabelSet.from_records(train)
    assert len(labels) == num_classes
    for record in (record for records in parts.values() for record in records):
        for label in record.tags if tagged else (record.label,):
            labels.number(label, name)  # no file has a class that the training file lacks


def test_what_is_read_is_what_the_lines_say():
    boolq, pubmed = raw("boolq", "validation"), raw("pubmedqa", "test")
    read = read_labelled(SHARED / "boolq/validation.jsonl.gz", text="question", context="passage")
    assert [(r.id, r.text, r.context, r.label) for r in read] == [
        (row["id"], row["question"], row["passage"], row["label"]) for row in boolq
    ]
    read = read_labelled(SHARED / "pubmedqa/test.jsonl.gz", text="question", context="contexts")
    assert [(r.id, r.context, r.label) for r in read] == [
        (row["id"], " ".join(row["contexts"]), row["label"]) for row in pubmed
    ]


def test_fever_with_two_classes_says_what_it_drops(caplog):
    with caplog.at_level(logging.INFO):
        read = read_labelled(SHARED / "fever/dev.jsonl.gz", text="claim", label_names={"NOT ENOUGH INFO": None})
    num_dropped = sum(row["label"] == "NOT ENOUGH INFO" for row in raw("fever", "dev"))
    assert LabelSet.from_records(read).names == ("REFUTES", "SUPPORTS")
    assert len(read) == 1999 - num_dropped
    assert f"{num_dropped} lines dropped, labelled NOT ENOUGH INFO" in caplog.text


def test_boolq_is_divided_about_as_asked():
    records = read_labelled(SHARED / "boolq/validation.jsonl.gz", text="question", context="passage")
    train, dev, test = divided(records)
    assert len(train) + len(dev) + len(test) == 3270
    assert abs(len(train) - 2616) < 92  # four standard deviations
    assert {"yes", "no"} == {record.label for record in dev} == {record.label for record in test}


def test_wikigold_is_known_as_iob1_and_wnut_needs_few_repairs(caplog):
    with caplog.at_level(logging.INFO):
        read = read_tagged(SHARED / "wikigold/train.jsonl.gz")
    assert "the tags are IOB1; they are read as BIO" in caplog.text
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)
    for sentence, row in zip(read, raw("wikigold", "train"), strict=True):
        assert sentence.words == tuple(row["tokens"])
        assert repaired(sentence.tags) == (sentence.tags, 0)
        assert [tag[2:] for tag in sentence.tags] == [tag[2:] for tag in row["tags"]]
        assert bio_spans(sentence.tags) == bio_spans(row["tags"])


def test_cluener_characters_carry_the_entities():
    for sentence, row in zip(read_spans(SHARED / "cluener2020/dev.jsonl.gz"), raw("cluener2020", "dev"), strict=True):
        assert "".join(sentence.words) == row["text"]
        found = [[start, end, kind, row["text"][start:end]] for start, end, kind in bio_spans(sentence.tags)]
        assert found == sorted(row["entities"])


def test_relations_mark_the_words_of_the_data():
    for mention, row in zip(
        read_relations(SHARED / "semeval2010_task8/test.jsonl.gz"), raw("semeval2010_task8", "test"), strict=True
    ):
        for number, (start, end) in (("1", mention.head), ("2", mention.tail)):
            marked = row["text"].split(f"<e{number}>")[1].split(f"</e{number}>")[0]
            assert mention.text[start:end] == marked.strip()
        assert mention.text.split() == re.sub(r"</?e[12]>", " ", row["text"]).split()
    for mention, row in zip(read_relations(SHARED / "fewrel/test.jsonl.gz"), raw("fewrel", "test"), strict=True):
        for field, (start, end) in (("head", mention.head), ("tail", mention.tail)):
            words = [row["tokens"][place] for place in row[field]["spans"][0]]
            assert mention.text[start:end] == " ".join(words)
