"""Lexicons: a file, or WordNet's words as WN18RR holds them."""

import gzip
import json

import pytest

from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.methods.augmentation.lexicon import covered, read_lexicon


def write(folder, entities, triples):
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / "entities.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(
            json.dumps(dict(zip(("id", "name", "definition"), one, strict=True))) + "\n" for one in entities
        )
    with gzip.open(folder / "train.tsv.gz", "wt", encoding="utf-8") as stream:
        stream.writelines("\t".join(one) + "\n" for one in triples)
    return folder


ENTITIES = [
    ("1", "Compass", "accomplish; get the meaning of"),
    ("2", "huge", "very large"),
    ("3", "immense", "very great"),
    ("4", "run up", "raise"),
]


def test_words_of_like_meaning_are_synonyms_both_ways(tmp_path):
    triples = [("2", "_similar_to", "3"), ("1", "_hypernym", "2")]
    lexicon = read_lexicon(write(tmp_path / "wordnet", ENTITIES, triples))
    assert lexicon == {
        "compass": ["accomplish"], "accomplish": ["compass"], "huge": ["immense"], "immense": ["huge"],
    }  # fmt: skip
    assert covered(lexicon, ["a Huge film"]) == pytest.approx(1 / 3)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="came no pair of synonyms"):
        read_lexicon(write(tmp_path / "none", [("1", "run up", "to raise")], []))
    with pytest.raises(DataError, match="line 1: expected head, relation and tail, came 2 fields"):
        read_lexicon(write(tmp_path / "bad", ENTITIES, [("1", "_hypernym")]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingFileError):
        read_lexicon(tmp_path / "empty")
