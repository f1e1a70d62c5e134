"""Lexicons of synonyms: a file of one's own, or WordNet as it comes with the WN18RR graph."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rag_lightning.corpora.passages import string_field
from rag_lightning.errors import DataError
from rag_lightning.utils.io import existing_file, open_text, read_json, read_json_lines

SAME_MEANING = ("_verb_group", "_similar_to", "_also_see")
"""Relations of WN18RR between synsets of like meaning."""
MOST_SYNONYMS = 6


def read_lexicon(path: str | Path) -> dict[str, list[str]]:
    """Returns the synonyms in a JSON file, ``{"film": ["picture", "movie"]}``, or in a folder of WN18RR.

    Raises:
        MissingFileError: No such file.
        DataError: Something else in it.
    """
    if Path(path).is_dir():
        return read_wordnet(path)
    file = existing_file(path, "augmentation.lexicon")
    lexicon = read_json(file, "lexicon")
    bad = not isinstance(lexicon, dict) or not all(
        isinstance(words, list) and words and all(isinstance(word, str) and word for word in words)
        for words in lexicon.values()
    )
    if bad:
        raise DataError(
            f'{file}: expected an object such as {{"film": ["picture"]}}, lists of words, came something else'
        )
    return {word.lower(): list(words) for word, words in lexicon.items()}


def read_wordnet(folder: str | Path) -> dict[str, list[str]]:
    """Returns the synonyms that WordNet's definitions and relations give, as WN18RR holds them.

    Two words are synonyms where one stands alone in the other's definition (``stool``: "feces; excreta"), or where
    their synsets are of like meaning (:data:`SAME_MEANING`). Words of several synsets have the synonyms of all, at most
    :data:`MOST_SYNONYMS`, in the order of the files; a meaning is not chosen by what stands around a word.

    Args:
        folder: With ``entities.jsonl.gz`` (``id``, ``name``, ``definition``) and ``train.tsv.gz`` (head, relation,
            tail).

    Raises:
        MissingFileError: A file is missing.
        DataError: A bad line, or no synonym at all.
    """
    names: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    entities = existing_file(Path(folder) / "entities.jsonl.gz", "augmentation.lexicon")
    for number, record in read_json_lines(entities):
        place = f"{entities}, line {number}"
        name = string_field(record, "name", place).lower()
        names[string_field(record, "id", place)] = name
        parts = string_field(record, "definition", place, blank=True).lower().split(";")
        pairs += [(name, part.strip()) for part in parts]
    triples = existing_file(Path(folder) / "train.tsv.gz", "augmentation.lexicon")
    with open_text(triples) as stream:
        for number, line in enumerate(stream, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 3:
                raise DataError(
                    f"{triples}, line {number}: expected head, relation and tail, came {len(fields)} fields"
                )
            head, relation, tail = fields
            if relation in SAME_MEANING and head in names and tail in names:
                pairs.append((names[head], names[tail]))
    lexicon = _both_ways(pair for pair in pairs if all(word.isalpha() for word in pair))
    if not lexicon:
        raise DataError(
            f"{folder}: expected WordNet's words and relations, came no pair of synonyms. Check the folder."
        )
    return lexicon


def _both_ways(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for one, other in pairs:
        if one != other:
            found.setdefault(one, {})[other] = None
            found.setdefault(other, {})[one] = None
    return {word: list(others)[:MOST_SYNONYMS] for word, others in found.items()}


def covered(lexicon: Mapping[str, Iterable[str]], texts: Iterable[str]) -> float:
    """Returns the share of words that a lexicon has.

    >>> covered({"film": ["picture"]}, ["a film", "a song"])
    0.25
    """
    words = [word.lower() for text in texts for word in text.split()]
    return sum(word in lexicon for word in words) / len(words) if words else 0.0
