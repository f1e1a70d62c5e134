"""Comparing answers: what counts as the same string, and what counts as an answer found in a text.

Three conventions, each the field's own. ``normalise_answer`` is SQuAD v1.1's (Rajpurkar et al. 2016), for exact match
and F1 of generated answers. ``contains_answer`` and ``matches_regex`` are open-domain QA's (Chen et al. 2017;
Karpukhin et al. 2020), for whether a retrieved passage holds an answer: canonical decomposition (NFD), split into
words and single signs, lower-cased, searched as a run of tokens. ``normalise_chinese`` and ``mixed_segments`` are CMRC
2018's (Cui et al. 2019) for Chinese, which sets no space between words: punctuation removed, each character a token.
"""

import re
import string
import sys
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

from rag_lightning.errors import DataError

Language = Literal["en", "zh"]
"""Whose conventions compare two texts: words (``en``, and any language that sets spaces), or Chinese characters."""
_CHINESE_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")  # noqa: RUF001
_SEGMENT = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+|[^\w\s]|_")
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation, articles and extra white space.

    >>> normalise_answer("The  U.S. Army!")
    'us army'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_tokens(text: str) -> list[str]:
    """Returns the words of :func:`normalise_answer`, for F1.

    >>> answer_tokens("a cat, the dog")
    ['cat', 'dog']
    """
    return normalise_answer(text).split()


def normalise_chinese(text: str) -> str:
    """Returns the text in lower case, without the punctuation of CMRC 2018's script and without white space.

    That script leaves white space within an answer; a tokenizer that decodes a space between characters would then
    never be right.

    >>> normalise_chinese("《跑跑 卡丁车》，2018 NBA")
    '跑跑卡丁车2018nba'
    """
    return "".join(character for character in "".join(text.lower().split()) if character not in _CHINESE_PUNCTUATION)


def mixed_segments(text: str) -> list[str]:
    """Returns each Chinese character, each other word and each other sign, in lower case, without that punctuation.

    CMRC 2018's script parts words of other scripts by NLTK; here they are runs of letters and numbers.

    >>> mixed_segments("由Nexon公司，开发")
    ['由', 'nexon', '公', '司', '开', '发']
    """
    return [segment for segment in _SEGMENT.findall(text.lower()) if segment not in _CHINESE_PUNCTUATION]


def words_of(text: str, language: Language) -> list[str]:
    """Returns what counts as the words of a text: :func:`answer_tokens`, or :func:`mixed_segments` of Chinese."""
    return mixed_segments(text) if language == "zh" else answer_tokens(text)


def contains_answer(text: str, answers: Sequence[str], language: Language = "en") -> bool:
    """Whether any answer occurs in the text as a run of whole tokens, whatever the case.

    In Chinese, whose tokens no space parts, as a run of characters (:func:`normalise_chinese`). An answer without a
    single token (blank) occurs nowhere.

    >>> contains_answer("It starred J.J. Abrams.", ["j.j. abrams"])
    True
    >>> contains_answer("concatenate", ["cat"])
    False
    """
    if language == "zh":
        whole = normalise_chinese(text)
        return any(needle in whole for needle in map(normalise_chinese, answers) if needle)
    haystack = _token_run(text)
    needles = (_token_run(answer) for answer in answers)
    return any(needle in haystack for needle in needles if len(needle) > 1)


def matches_regex(text: str, pattern: str) -> bool:
    r"""Whether the pattern matches anywhere in the text: case ignored, ``^`` and ``$`` at every line.

    Raises:
        DataError: The pattern is no regular expression.

    >>> matches_regex("It opened in New  York.", r"new\s+york")
    True
    """
    return compile_answer_regex(pattern).search(unicodedata.normalize("NFD", text)) is not None


@lru_cache(maxsize=4096)
def compile_answer_regex(pattern: str) -> re.Pattern[str]:
    """Returns the compiled pattern, as :func:`matches_regex` uses it.

    Raises:
        DataError: The pattern is no regular expression; names the pattern and the reason.
    """
    # decomposition would turn an escaped letter such as \ú (CuratedTREC has one) into the escape \u
    plain = _ESCAPE.sub(lambda match: match[0] if match[1].isascii() else match[1], pattern)
    try:
        return re.compile(unicodedata.normalize("NFD", plain), re.IGNORECASE | re.MULTILINE)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(f"expected a regular expression, came {pattern!r}: {error}. Mend the pattern.") from error


def _token_run(text: str) -> str:
    """Returns the tokens, each between NUL characters, so that a substring is a run of whole tokens."""
    tokens = _token_pattern().findall(unicodedata.normalize("NFD", text))
    return "\0" + "".join(token.lower() + "\0" for token in tokens)


@lru_cache(maxsize=1)
def _token_pattern() -> re.Pattern[str]:
    r"""Returns words (Unicode letters, numbers and marks) or single signs (punctuation and symbols).

    Python's ``\w`` leaves out combining marks, which canonical decomposition makes; so the classes are spelt out once.
    """
    ranges: dict[str, list[list[int]]] = {"word": [], "sign": []}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))[0]
        kind = "word" if category in "LNM" else "sign" if category in "PS" else None
        if kind is None:
            continue
        if ranges[kind] and ranges[kind][-1][1] == code - 1:
            ranges[kind][-1][1] = code
        else:
            ranges[kind].append([code, code])
    word, sign = ("".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in ranges[kind]) for kind in ("word", "sign"))
    return re.compile(f"[{word}]+|[{sign}]")
