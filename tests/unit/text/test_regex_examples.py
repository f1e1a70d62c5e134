"""Texts written out from regular expressions of answers: right by construction, and few are left without one."""

import gzip
import json
import re
from pathlib import Path

import pytest

from rag_lightning.errors import DataError
from rag_lightning.text.regex_examples import regex_examples

SHARED = Path(__file__).parents[4] / "shared" / "data" / "curatedtrec" / "train.jsonl.gz"


@pytest.mark.parametrize(
    ("pattern", "first"),
    [
        ("Sweden", ["Sweden"]),
        ("After the Fall|Finishing", ["After the Fall", "Finishing"]),
        (r"20\s?,?\s?(32|40)0", ["20 , 320", "20 , 400", "20 ,320"]),
        (r"St\. Louis", ["St. Louis"]),
        ("St. Louis", ["St. Louis"]),
        (r"(?:Mr|Dr)\.? Who", ["Mr. Who", "Mr Who", "Dr. Who"]),
        ("[0-9]{4} m", ["0000 m"]),
        (r"\b19[4-6]0s?\b", ["1940s", "1940"]),
        ("Roberto Bola\\ño", ["Roberto Bolaño"]),
        ("(?=x)y", []),
        ("", []),
    ],
)
def test_a_pattern_is_written_out(pattern: str, first: list[str]) -> None:
    assert regex_examples(pattern)[: len(first) or None] == first


def test_many_forms_are_cut() -> None:
    assert len(regex_examples("(a|b|c|d)" * 6, limit=10)) == 10


def test_what_is_no_pattern_is_named() -> None:
    with pytest.raises(DataError, match="expected a regular expression"):
        regex_examples("(a")


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared data sets are not there")
def test_nearly_all_of_curatedtrec_has_a_form() -> None:
    with gzip.open(SHARED, "rt", encoding="utf-8") as stream:
        patterns = [json.loads(line)["answer_regex"] for line in stream]
    found = [regex_examples(pattern) for pattern in patterns]
    assert len(found) == 1693
    assert sum(not forms for forms in found) < 10
    plain = [(p, forms) for p, forms in zip(patterns, found, strict=True) if re.fullmatch(r"[A-Za-z ]+", p)]
    assert all(forms == [" ".join(pattern.split())] for pattern, forms in plain)
