import re
import string
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.errors import DataError
from rag_lightning.text.normalise import (
    answer_tokens,
    compile_answer_regex,
    contains_answer,
    matches_regex,
    mixed_segments,
    normalise_answer,
    normalise_chinese,
    words_of,
)

TEXTS = st.text(alphabet="abthe ANs.,'-éÉ\u0301ß1½_$中\t\u00a0\x00", max_size=30)


def squad_v1(text):
    """The steps of the official SQuAD v1.1 evaluation, one by one."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def naive_tokens(text):
    """Words and signs by scanning characters and their Unicode categories."""
    tokens, inside = [], False
    for character in unicodedata.normalize("NFD", text):
        category = unicodedata.category(character)[0]
        if category in "LNM":
            tokens.append(tokens.pop() + character if inside else character)
        elif category in "PS":
            tokens.append(character)
        inside = category in "LNM"
    return [token.lower() for token in tokens]


def naive_contains(text, answer):
    words, wanted = naive_tokens(text), naive_tokens(answer)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


@settings(deadline=None)
@given(TEXTS)
def test_normalise_answer_follows_squad(text):
    assert normalise_answer(text) == squad_v1(text)
    assert answer_tokens(text) == squad_v1(text).split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The Beatles", "beatles"), ("U.S.", "us"), ("an apple, a day", "apple day"), ("Theatre", "theatre"), ("the", "")],
)
def test_normalise_answer_examples(text, expected):
    assert normalise_answer(text) == expected


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_contains_answer_equals_the_naive_scan(text, answer):
    assert contains_answer(text, [answer]) == naive_contains(text, answer)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_an_answer_put_between_spaces_is_found(before, answer, after):
    assert contains_answer(f"{before} {answer} {after}", [answer]) == bool(naive_tokens(answer))


@pytest.mark.parametrize(
    ("text", "answers", "found"),
    [
        ("Directed by J.J. Abrams.", ["J.J. Abrams"], True),
        ("the Cafe\u0301 closed", ["CAFÉ"], True),
        ("the Café closed", ["cafe"], False),
        ("concatenate", ["cat"], False),
        ("It cost $12.", ["$12"], True),
        ("It cost 12.", ["$12"], False),
        ("nothing here", ["dog", "here"], True),
        ("nothing here", [], False),
        ("nothing here", ["", "  "], False),
        ("New  York", ["new york"], True),
    ],
)
def test_contains_answer_examples(text, answers, found):
    assert contains_answer(text, answers) is found


@pytest.mark.parametrize(
    ("text", "pattern", "found"),
    [
        ("in september", "Sept?(ember)?|Feb(ruary)?", True),
        ("line one\nNew York", r"^new\s+york$", True),
        ("1,600 feet", r"20\s?,?\s?(32|40)0", False),
        ("Jesús Gil", "Jes\\ús Gil", True),  # CuratedTREC escapes this letter; decomposed, it would be the escape \u
        ("a\\ú", "\\\\ú", True),
    ],
)
def test_matches_regex(text, pattern, found):
    assert matches_regex(text, pattern) is found


def test_invalid_regex_is_named():
    with pytest.raises(DataError, match=r"expected a regular expression, came '\(a\|'.*Mend the pattern"):
        compile_answer_regex("(a|")


def test_chinese_is_found_as_a_run_of_characters():
    text = "安娜·雪在 2004 年导演了《雪》。"
    assert contains_answer(text, ["安娜雪"], "zh")
    assert contains_answer(text, ["2004年导演"], "zh")
    assert not contains_answer(text, ["安娜导演", "", "，"], "zh")
    assert not contains_answer(text, ["导演"])  # no space parts it from its neighbours


def test_words_of_each_language():
    assert words_of("The cat, a cat", "en") == ["cat", "cat"]
    assert words_of("猫，NBA_2k!", "zh") == ["猫", "nba", "2k", "!"]
    assert mixed_segments("Ünlü 雪") == ["ünlü", "雪"]
    assert normalise_chinese(" A 、 b\n（雪） ") == "ab雪"
