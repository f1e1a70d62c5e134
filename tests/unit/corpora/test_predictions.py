"""Predictions are read back as they were written; a bad line is named."""

import math
from pathlib import Path

import pytest

from rag_lightning.corpora.predictions import read_predictions
from rag_lightning.corpora.questions import write_predictions
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.types import Prediction, RetrievedPassage, TokenPosteriors

GOOD = {"id": "q", "question": "who", "answer": "", "log_likelihood": -1.0, "passages": []}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    passages = (RetrievedPassage("p", "T", "", 1.5, 0.75, 0.5), RetrievedPassage("", "", "", -math.inf, 0.0, 0.0))
    posteriors = TokenPosteriors(("a", "</s>"), ((0.5, 1.0), (0.5, 0.0)))
    told = [Prediction("q", "who", "a", -0.5, passages, token_posteriors=posteriors), Prediction("r", "w", "", 0.0, ())]
    write_predictions(tmp_path / "predictions.jsonl", told)
    assert read_predictions(tmp_path / "predictions.jsonl") == told


def test_a_posterior_may_be_untold(tmp_path: Path, json_lines) -> None:
    line = {**GOOD, "passages": [{"id": "p", "title": "T", "score": 1, "probability": 0.5}]}
    (read,) = read_predictions(json_lines(tmp_path / "p.jsonl", [line]))
    assert math.isnan(read.passages[0].posterior)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"passages": None}, r"p\.jsonl, line 1: field 'passages': expected a list of objects"),
        (
            {"passages": [{"id": "p", "title": "T", "score": "x"}]},
            "passage 1: field 'score': expected a number, came 'x'",
        ),
        ({"log_likelihood": None}, "field 'log_likelihood': expected a number, came 'None'"),
        ({"id": 3}, "line 1: field 'id'"),
        (
            {"token_posteriors": {"tokens": ["a"], "probabilities": [[1]]}},
            "as many probabilities for each of the 0 pass",
        ),
    ],
)
def test_a_bad_line_is_named(change: dict[str, object], expected: str, tmp_path: Path, json_lines) -> None:
    with pytest.raises(DataError, match=expected):
        read_predictions(json_lines(tmp_path / "p.jsonl", [{**GOOD, **change}]))


def test_files_without_predictions_are_refused(tmp_path: Path, json_lines) -> None:
    with pytest.raises(MissingFileError, match="predictions: no such file"):
        read_predictions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="expected at least one prediction, came none"):
        read_predictions(json_lines(tmp_path / "p.jsonl", []))
    with pytest.raises(DataError, match="line 2: expected each question id once, came 'q' again"):
        read_predictions(json_lines(tmp_path / "p.jsonl", [GOOD, GOOD]))
