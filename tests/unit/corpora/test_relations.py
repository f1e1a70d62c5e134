"""Relation mentions from texts with markers and from words with spans."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.relations import marked_text, read_relations
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.types import RelationMention

MARKED = {"id": 0, "text": "an <e1> array </e1> of <e2> antenna elements </e2>", "relation": "Component-Whole(e2,e1)"}
WORDS = {
    "tokens": ["The", "city", "of", "Madras", "in", "South", "India", "."],
    "head": {"name": "madras", "id": "Q1", "spans": [[3], [0]]},
    "tail": {"spans": [[5, 6]]},
    "relation": "P17",
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_forms_are_read(tmp_path):
    marked, words = read_relations(write(tmp_path / "t.jsonl", [MARKED, WORDS]), label_names={"P17": "country"})
    assert marked == RelationMention("0", "an array of antenna elements", (3, 8), (12, 28), "Component-Whole(e2,e1)")
    assert words == RelationMention("2", "The city of Madras in South India .", (12, 18), (22, 33), "country")
    assert (marked.text[3:8], marked.text[12:28]) == ("array", "antenna elements")
    assert (words.text[12:18], words.text[22:33]) == ("Madras", "South India")


@pytest.mark.parametrize(
    ("marked", "text", "head", "tail"),
    [
        ("<e1>a</e1>-<e2>b</e2>.", "a-b.", "a", "b"),
        ("<e2>b b</e2><e1>a</e1>", "b ba", "a", "b b"),
        (" <e1> a </e1> <e2> b </e2> ", "a b", "a", "b"),
        ("the <e2>b</e2> of  <e1>a</e1> , x", "the b of a , x", "a", "b"),
        ("x\n<e1>a</e1>\ty <e2>b</e2>", "x a y b", "a", "b"),
    ],
)
def test_markers_leave_the_text_as_it_reads(marked, text, head, tail):
    plain, first, second = marked_text(marked, "here")
    assert plain == text
    assert (plain[slice(*first)], plain[slice(*second)]) == (head, tail)


words = st.lists(st.sampled_from(["a", "bc", "é", "叶", "<", "e1", "."]), max_size=3)
some_words = words.filter(len)


@given(words, some_words, words, some_words, words, st.booleans(), st.sampled_from(["", " "]))
def test_markers_are_undone(before, first, between, second, after, swapped, inner):
    """Marking words and reading the markers gives the words back, and the same places as counting words does."""
    one, two = ("e2", "e1") if swapped else ("e1", "e2")
    marks = [f"<{name}>{inner}{' '.join(part)}{inner}</{name}>" for name, part in ((one, first), (two, second))]
    plain, head, tail = marked_text(" ".join([*before, marks[0], *between, marks[1], *after]), "here")
    assert plain == " ".join([*before, *first, *between, *second, *after])
    start = len(" ".join([*before, ""])) if before else 0
    later = len(" ".join([*before, *first, *between, ""]))
    spans = [(start, start + len(" ".join(first))), (later, later + len(" ".join(second)))]
    assert [head, tail] == (spans[::-1] if swapped else spans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text": "no marker"},
            r"line 1: field 'text': expected <e1> </e1> and <e2> </e2> once each, .*came no marker",
        ),
        ({"text": "<e1>a</e1> <e2>b"}, r"neither within the other, came <e1> </e1> <e2>\. Mend or remove the line"),
        ({"text": "<e1>a <e2>b</e2></e1>"}, r"neither within the other, came <e1> <e2> </e2> </e1>"),
        (
            {"text": "<e1>a</e1> <e1>b</e1> <e2>c</e2>"},
            r"once each, neither within the other, came <e1> </e1> <e1> </e1>",
        ),
        ({"text": "<e1> </e1> <e2>b</e2>"}, r"expected words between <e1> and </e1>, came none"),
        ({"text": "x <e1>a</e1><e2></e2> y"}, r"expected words between <e2> and </e2>, came none"),
        ({"text": ""}, r"line 1: field 'text': expected a text, came an empty one"),
        ({"relation": None}, r"line 1: field 'relation': expected a string or a whole number, came NoneType"),
    ],
)
def test_bad_markers_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_relations(write(tmp_path / "t.jsonl", [MARKED | change]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, r"line 1: field 'tokens': expected at least one string, came \[\]"),
        ({"tokens": "a b"}, r"line 1: field 'tokens': expected a list of strings, came str 'a b'"),
        ({"head": [3]}, r"line 1: field 'head': expected 'spans', a list of lists of word places .*came \[3\]"),
        ({"head": {"spans": []}}, r"line 1: field 'head': expected 'spans', a list of lists"),
        ({"head": {"spans": [3]}}, r"line 1: field 'head': expected 'spans', a list of lists"),
        ({"tail": {"spans": [[]]}}, r"line 1: field 'tail': expected 'spans', a list of lists"),
        ({"tail": {"spans": [["5"]]}}, r"line 1: field 'tail': expected adjacent word places in order, .*came \['5'\]"),
        (
            {"tail": {"spans": [[5, 7]]}},
            r"line 1: field 'tail': expected adjacent word places in order, .*came \[5, 7\]",
        ),
        ({"tail": {"spans": [[7, 8]]}}, r"line 1: field 'tail': expected word places from 0 to 7, came \[7, 8\]"),
        ({"tail": {"spans": [[-1]]}}, r"line 1: field 'tail': expected word places from 0 to 7, came \[-1\]"),
        (
            {"tail": {"spans": [[3]]}},
            r"fields 'head' and 'tail': expected entities that do not overlap, came the words 3 to 3",
        ),
        (
            {"tokens": ["a", "b", "c", " ", "d", "e", "f"]},
            r"field 'head': expected words at the places \[3\], came white",
        ),
    ],
)
def test_bad_words_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_relations(write(tmp_path / "t.jsonl", [WORDS | change]))


def test_missing_fields_and_files_are_refused(tmp_path):
    def without(field):
        return {name: value for name, value in WORDS.items() if name != field}

    with pytest.raises(DataError, match=r"line 1: field 'head' is missing; expected an entity with the field 'spans'"):
        read_relations(write(tmp_path / "t.jsonl", [without("head")]))
    with pytest.raises(DataError, match=r"line 1: field 'relation' is missing; expected a label"):
        read_relations(write(tmp_path / "t.jsonl", [without("relation")]))
    with pytest.raises(DataError, match=r"line 1: field 'text' is missing; expected a string"):
        read_relations(write(tmp_path / "t.jsonl", [without("tokens")]))
    with pytest.raises(MissingFileError, match="relations: no such file"):
        read_relations(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="expected at least one relation mention, came none"):
        read_relations(write(tmp_path / "t.jsonl", [WORDS]), label_names={"P17": None})
