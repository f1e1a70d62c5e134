"""The real MovieLens release: read whole, with the counts it states."""

import csv
import gzip
from pathlib import Path

import pytest

from rag_lightning.corpora.generation.recommendation import MovieLens
from rag_lightning.corpora.passages import PassageCorpus

FOLDER = Path(__file__).parents[5] / "shared" / "data" / "movielens_latest_small"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the shared data sets are not there")


def test_the_release_is_read_whole():
    prepared = MovieLens(folder=str(FOLDER), targets_per_user=10, answer="explanation")()
    corpus = PassageCorpus.from_passages(prepared.passages)
    assert len(corpus) == 9125
    with gzip.open(FOLDER / "ratings.csv.gz", "rt", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 100_004
    liked = dict.fromkeys((row["userId"] for row in rows), 0)
    assert len(liked) == 671
    for row in rows:
        liked[row["userId"]] += float(row["rating"]) >= 4
    kept = [count for count in liked.values() if count >= 5]
    questions = prepared.questions
    assert len(questions["test"]) == len(questions["validation"]) == len(kept)
    assert len(questions["train"]) == sum(min(10, count - 5) for count in kept)
    for question in (q for asked in questions.values() for q in asked):
        assert not set(question.positive_passage_ids) & set(question.excluded_passage_ids)
        assert all(corpus.has_id(one) for one in (*question.positive_passage_ids, *question.excluded_passage_ids))
    explained = sum(", because you liked " in question.answers[0] for question in questions["train"])
    assert explained > 0.8 * len(questions["train"])
    godfather = corpus[corpus.row_of("858")]
    assert godfather.title == "The Godfather"
    assert godfather.text.startswith("Film of 1972. Crime, Drama.")
