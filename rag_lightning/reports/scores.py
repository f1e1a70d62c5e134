"""What a run scored on each question: what a bootstrap over questions draws from."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Float

from rag_lightning.corpora.passages import resolve
from rag_lightning.corpora.predictions import read_predictions
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import DataError
from rag_lightning.metrics.answers import exact_match, token_f1
from rag_lightning.reports.error_analysis import question_of
from rag_lightning.reports.runs import PREDICTIONS_FILE, Run
from rag_lightning.text.normalise import Language
from rag_lightning.types import Question
from rag_lightning.utils.hashing import fingerprint
from rag_lightning.utils.io import read_json_lines

Locate: TypeAlias = Callable[[str], Path]
"""Turns a file's name, as a run's configuration has it, into a path."""
BY_QUESTION = ("exact_match", "f1", "accuracy")
"""Metrics that are means over questions; recall of gold passages is one, too."""
RECALL = re.compile(r"recall@(\d+)")
OUT_OF_100 = ("bleu", "bleu1", "chrf")
"""Metrics that sacreBLEU gives in percent; all others are fractions of 1."""
TOLERANCE = 2e-3
"""How far the mean of the scores may lie from the run's own metric: beyond, the files are not of one run."""


def percent(metric: str, value: float) -> float:
    """Returns a metric as a percentage.

    >>> percent("exact_match", 0.25), percent("bleu1", 25.0)
    (25.0, 25.0)
    """
    return value if metric in OUT_OF_100 else 100 * value


def language_of(run: Run) -> Language:
    """Returns whose normalisation judged a run's answers."""
    return "zh" if run.language == "zh" else "en"


def questions_of(run: Run, locate: Locate = resolve) -> dict[str, Question] | None:
    """Returns the questions that a run was tested on, by id; None where their file is not at hand.

    Raises:
        DataError: The file has changed since the run.
    """
    told = run.data_file("test")
    path = locate(told) if told is not None else None
    if path is None or not path.is_file():
        return None
    recorded = ((run.record.get("data") or {}).get("test") or {}).get("sha256")
    if recorded is not None and fingerprint(path)["sha256"] != recorded:
        raise DataError(
            f"{path}: expected the questions that {run.folder} was tested on, came a file that has changed since. "
            f"Give the one it was (questions=FILE), or test again: rag-lightning evaluate checkpoint={run.folder}"
        )
    return {question.id: question for question in read_questions(path)}


def question_scores(run: Run, metric: str, locate: Locate = resolve) -> dict[str, float] | None:
    """Returns a run's score on each question, by the question's id.

    None where the metric is of a whole test set, where the run left no predictions, or where its questions are not at
    hand.

    Raises:
        DataError: A bad line, or predictions that are not those that the run's metrics were measured on.
    """
    path = run.folder / PREDICTIONS_FILE
    recall = RECALL.fullmatch(metric)
    if metric not in BY_QUESTION and recall is None:
        return None
    if not path.is_file() or run.metrics is None or metric not in run.metrics:
        return None
    labels = is_of_heads(path)
    if labels != (metric == "accuracy"):  # F1 of heads is of all mentions together
        return None
    if recall is not None:
        scores = _gold_scores(run, int(recall[1]), locate)
    else:
        scores = _label_scores(path) if labels else _answer_scores(run, metric, locate)
    if not scores:
        return None
    mean, told = sum(scores.values()) / len(scores), float(run.metrics[metric])
    if abs(mean - told) > TOLERANCE:
        raise DataError(
            f"{path}: expected a mean {metric} of {told:.4f}, as in metrics.json, came {mean:.4f}: the two files are "
            f"not of one test. Test again: rag-lightning evaluate checkpoint={run.folder}"
        )
    return scores


def score_matrix(runs: Sequence[Run], metric: str, locate: Locate = resolve) -> Float[np.ndarray, "S Q"] | None:
    """Returns the scores of some runs, a row for each, questions in one order; None where not all have them."""
    rows = [question_scores(run, metric, locate) for run in runs]
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows) or any(row.keys() != known[0].keys() for row in known):
        return None
    return np.array([[row[question_id] for question_id in sorted(known[0])] for row in known])


def shared_matrices(
    first: Sequence[Run], second: Sequence[Run], metric: str, locate: Locate = resolve
) -> tuple[Float[np.ndarray, "S Q"], Float[np.ndarray, "S2 Q"]] | None:
    """Returns the scores of two groups of runs on the same questions; None where they are not on the same."""
    both = score_matrix([*first, *second], metric, locate)
    return (both[: len(first)], both[len(first) :]) if both is not None else None


def is_of_heads(path: Path) -> bool:
    """Whether a file of predictions holds labels or tags that heads gave, not answers."""
    return "expected" in next((record for _, record in read_json_lines(path)), {})


def _label_scores(path: Path) -> dict[str, float] | None:
    records = [record for _, record in read_json_lines(path)]
    if any(not isinstance(record.get("expected"), str) for record in records):
        return None  # tags: no metric is the mean over sentences
    return {f"{record['task']}/{record['id']}": float(record["expected"] == record["predicted"]) for record in records}


def _gold_scores(run: Run, k: int, locate: Locate) -> dict[str, float] | None:
    """Returns whether one of the first k passages is gold, for each question whose data set names gold passages."""
    questions = questions_of(run, locate)
    if questions is None:
        return None
    scores: dict[str, float] = {}
    for prediction in read_predictions(run.folder / PREDICTIONS_FILE):
        gold = question_of(prediction, questions).positive_passage_ids
        if gold:
            scores[prediction.id] = float(any(passage.id in gold for passage in prediction.passages[:k]))
    return scores


def _answer_scores(run: Run, metric: str, locate: Locate) -> dict[str, float] | None:
    questions = questions_of(run, locate)
    if questions is None:
        return None
    scores: dict[str, float] = {}
    language = language_of(run)
    for prediction in read_predictions(run.folder / PREDICTIONS_FILE):
        question = question_of(prediction, questions)
        if metric == "f1" and question.answer_regex is not None:
            continue
        if metric == "f1":
            scores[prediction.id] = token_f1(prediction.answer, question.answers, language)
        else:
            right = exact_match(prediction.answer, question.answers, question.answer_regex, language)
            scores[prediction.id] = float(right)
    return scores
