"""The rule-based tagger of names and dates, on sentences made by hand and on texts whose names are known."""

import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.salient import salient_spans

WIKIGOLD = Path(__file__).parents[4] / "shared" / "data" / "wikigold"


def found(text, title="", kind=None, **settings):
    spans = salient_spans(text, title, **settings)
    return [text[span.start : span.end] for span in spans if kind is None or span.kind == kind]


DATES = [
    ("He was born on 12 March 1999 in Rome.", ["12 March 1999"]),
    ("It opened March 12, 1999, and closed in March 2001.", ["March 12, 1999", "March 2001"]),
    ("Released 1999-03-12; not 1999-13-12.", ["1999-03-12"]),
    ("the 4th of July 1776, the 1990s, and 2099", ["4th of July 1776", "1990s", "2099"]),
    ("in 1499 or 2100 or 11999 or 1,999 or $1999 or 1999.5 or 1999%", []),
    ("on September 8, at noon on Oct. 3, 1950", ["September 8", "Oct. 3, 1950"]),
    ("She left in May. It may rain. It stars Fredric March.", ["May"]),
    ("the season of 1998/99", []),
]


@pytest.mark.parametrize(("text", "expected"), DATES)
def test_dates_by_pattern(text, expected):
    assert found(text, kind="date") == expected


NAMES = [
    ("It stars John Wayne, Jean Rickert and Sheila Terry.", ["John Wayne", "Jean Rickert", "Sheila Terry"]),
    ("He studied at the University of Oxford in England.", ["University of Oxford", "England"]),
    ("the life of Ludwig van Beethoven and of Alexander the Great", ["Ludwig van Beethoven", "Alexander the Great"]),
    ("It was made by J.J. Abrams and J. Ford.", ["J.J. Abrams", "J. Ford"]),
    ("with Catherine Zeta-Jones and Peter O'Toole", ["Catherine Zeta-Jones", "Peter O'Toole"]),
    ("the Department of Health and Human Services", ["Department of Health and Human Services"]),
    ("a story like Akeelah and the Bee", ["Akeelah and the Bee"]),
    ("by Sammy Davis Jr. It sings in the U.S.", ["Sammy Davis Jr.", "U.S."]),
    ("they saw Apollo 13 and Wayne's horse", ["Apollo 13", "Wayne"]),
    ("There I was. I am here, and so am I.", []),
    ("Films are made here. Nobody knows why.", []),
    ("Kismet is old. Many love Kismet.", ["Kismet", "Kismet"]),
    ("The Netherlands lie low. All of London knows.", ["Netherlands", "London"]),
    ("It was seen by the Émile Zola society", ["Émile Zola"]),
    ("", []),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NAMES)
def test_names_are_runs_of_capitalised_words(text, expected):
    assert found(text, kind="entity") == expected


def test_the_title_tells_what_is_a_name():
    text = "It is older than the Rhine Delta. Crossing by night is a film. 12 and Holding is one."
    assert found(text, "Crossing by night") == ["Rhine Delta", "Crossing by night", "Holding"]
    assert found(text, "12 and Holding (film)")[-1] == "12 and Holding"
    assert found(text, "Rhine")[0] == "Rhine Delta"
    assert found("Amber was made in 1936.", "Amber") == ["Amber", "1936"]
    assert found("Dracula 2000 was made in 2000.", "Dracula 2000") == ["Dracula 2000", "2000"]


def test_other_numbers_only_where_asked():
    text = "About 12.5 million people paid $3 for 40% in 1999."
    assert found(text) == ["1999"]
    assert found(text, numbers=True) == ["12.5 million", "$3", "40%", "1999"]


@given(st.text(alphabet="AaBb' .-&1959\n,/é\"", max_size=60), st.text(alphabet="Aa (1", max_size=6))
def test_spans_are_in_order_apart_and_hold_words(text, title):
    spans = salient_spans(text, title, numbers=True)
    assert all(one.end <= other.start for one, other in pairwise(spans))
    assert all(any(letter.isalnum() for letter in text[span.start : span.end]) for span in spans)


def listed(text, pattern):
    """The places of the names in each "A, B and C" that follows a word of the pattern."""
    for match in re.finditer(rf"(?:{pattern}) (.*?)\.(?= It | Its |$)", text):
        place = match.start(1)
        for part in re.split(r"(, | and )", match[1]):
            if part not in (", ", " and "):
                yield place, place + len(part)
            place += len(part)


def test_the_film_passages_names_are_found():
    """Their sentences follow templates, so that title, makers, actors, years and genres are known."""
    num_known = num_met = num_found = 0
    for passage in PassageCorpus.read("bundled:films/passages.jsonl.gz"):
        body = passage.text.split(" It is described as:")[0]
        known = {*listed(body, "directed by|written by|It stars|Its genre is|Its genres are|released in")}
        known |= {match.span() for match in [re.match(re.escape(passage.title), body)] if match}
        spans = {(span.start, span.end) for span in salient_spans(passage.text, passage.title) if span.end <= len(body)}
        num_known, num_met, num_found = num_known + len(known), num_met + len(known & spans), num_found + len(spans)
    assert num_met / num_known > 0.998
    assert num_met / num_found > 0.96  # most of the others are languages


@pytest.mark.skipif(not WIKIGOLD.is_dir(), reason="wikigold is not here")
def test_wikipedia_names_are_found_as_people_marked_them():
    num_gold = num_found = num_met = num_touched = 0
    with gzip.open(WIKIGOLD / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            text, gold, kind = "", [], "O"
            for token, tag in zip(record["tokens"], record["tags"], strict=True):
                text += "" if not text or token in {*",.;:!?)%", "'s"} or text[-1] == "(" else " "
                if tag != "O" and (tag[0] == "B" or tag[2:] != kind):
                    gold.append((len(text), len(text) + len(token)))
                elif tag != "O":
                    gold[-1] = (gold[-1][0], len(text) + len(token))
                kind, text = tag[2:] if tag != "O" else "O", text + token
            spans = {(span.start, span.end) for span in salient_spans(text) if span.kind == "entity"}
            num_gold, num_found, num_met = num_gold + len(gold), num_found + len(spans), num_met + len(spans & {*gold})
            num_touched += sum(any(span[0] < end and start < span[1] for start, end in gold) for span in spans)
    assert num_met / num_found > 0.75
    assert num_met / num_gold > 0.78
    assert num_touched / num_found > 0.9
