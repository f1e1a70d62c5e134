"""Predictions read back from the JSON lines that :func:`~rag_lightning.corpora.questions.write_predictions` writes.

A line: ``{"id": "q1", "question": "who made Kismet?", "answer": "Minnelli", "log_likelihood": -0.7, "passages":
[{"id": "7", "title": "Kismet", "score": 12.5, "probability": 0.8, "posterior": 0.9}], "token_posteriors": {"tokens":
["Minnelli"], "probabilities": [[0.9]]}}``, where ``posterior`` and ``token_posteriors`` are optional.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rag_lightning.corpora.passages import resolve, string_field
from rag_lightning.errors import DataError
from rag_lightning.types import Prediction, RetrievedPassage, TokenPosteriors
from rag_lightning.utils.io import existing_file, read_json_lines


def read_predictions(path: str | Path) -> list[Prediction]:
    """Returns the predictions of a file, in order; passages have no texts, which stay in the corpus.

    A posterior that a line does not tell is NaN. Alternatives are not read.

    Raises:
        MissingFileError: No such file.
        DataError: No line, a repeated id, or a bad field; names file, line, field, what was expected and what came.
    """
    file = existing_file(resolve(path), "predictions")
    predictions: dict[str, Prediction] = {}
    for number, record in read_json_lines(file):
        place = f"{file}, line {number}"
        prediction = _prediction(record, place)
        if prediction.id in predictions:
            raise DataError(f"{place}: expected each question id once, came {prediction.id!r} again. Remove one.")
        predictions[prediction.id] = prediction
    if not predictions:
        raise DataError(f"{file}: expected at least one prediction, came none.")
    return list(predictions.values())


def _prediction(record: Mapping[str, Any], place: str) -> Prediction:
    rows = record.get("passages")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{place}: field 'passages': expected a list of objects with id, title, score and probability, came "
            f"{str(rows)[:80]}. Write the file by rag-lightning evaluate or predict."
        )
    passages = tuple(_passage(row, f"{place}, passage {rank}") for rank, row in enumerate(rows, start=1))
    return Prediction(
        id=string_field(record, "id", place),
        question=string_field(record, "question", place),
        answer=string_field(record, "answer", place, blank=True),
        log_likelihood=_number(record, "log_likelihood", place),
        passages=passages,
        token_posteriors=_by_token(record.get("token_posteriors"), len(passages), place),
    )


def _passage(row: Mapping[str, Any], place: str) -> RetrievedPassage:
    return RetrievedPassage(
        id=string_field(row, "id", place, blank=True),
        title=string_field(row, "title", place, blank=True),
        text="",
        score=_number(row, "score", place),
        probability=_number(row, "probability", place),
        posterior=_number(row, "posterior", place) if "posterior" in row else math.nan,
    )


def _number(record: Mapping[str, Any], field: str, place: str) -> float:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{place}: field {field!r}: expected a number, came {str(value)[:80]!r}.")
    return float(value)


def _by_token(node: Any, num_passages: int, place: str) -> TokenPosteriors | None:
    if node is None:
        return None
    tokens, rows = (node.get(name) for name in ("tokens", "probabilities")) if isinstance(node, dict) else (None, None)
    fits = isinstance(tokens, list) and isinstance(rows, list) and len(rows) == num_passages
    if not fits or not all(isinstance(row, list) and len(row) == len(tokens or ()) for row in rows or ()):
        raise DataError(
            f"{place}: field 'token_posteriors': expected tokens, and a row of as many probabilities for each of the "
            f"{num_passages} passages, came {str(node)[:80]}."
        )
    return TokenPosteriors(
        tuple(str(token) for token in tokens or ()), tuple(tuple(float(one) for one in row) for row in rows or ())
    )
