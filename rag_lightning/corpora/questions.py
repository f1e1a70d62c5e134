"""Questions and predictions: what is asked, and what was answered, as JSON lines.

A question line:
``{"id": "q1", "question": "who made Kismet?", "answers": ["V. Minnelli"], "positive_passage_ids": ["7"]}``
where ``positive_passage_ids`` is optional, ``answer_regex`` (CuratedTREC) may stand instead of ``answers`` or beside
them, and other fields are ignored. ``rag-lightning mine`` adds hard negatives, hardest first:
``"negative_passage_ids": ["3", "12"], "negative_scores": [11.5, 9.25]``
where the scores (the miner's, larger is more similar) are optional and only checked: training with hard negatives draws
passages, not scores, which are kept for distilling the miner. Where passages were made of the questions themselves
(training examples to retrieve), ``"source_passage_id": "train-7"`` names the one that is never retrieved for this.
``"excluded_passage_ids": ["4"]`` names passages that are no answer: they are not retrieved, and a ranking leaves them
out.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rag_lightning.corpora.passages import PassageCorpus, resolve, string_field
from rag_lightning.errors import DataError
from rag_lightning.text.normalise import compile_answer_regex
from rag_lightning.types import Prediction, Question
from rag_lightning.utils.io import existing_file, read_json_lines, write_json_lines


def read_questions(path: str | Path, *, corpus: PassageCorpus | None = None) -> list[Question]:
    """Returns the questions of a ``.jsonl`` or ``.jsonl.gz`` file, in order.

    Args:
        path: As :func:`~rag_lightning.corpora.passages.resolve` takes it.
        corpus: Where given, every gold passage's, hard negative's and source passage's id must be in it.

    Raises:
        MissingFileError: No such file.
        DataError: No question, a repeated id, or a bad field; names file, line, field, what was expected and what came.
    """
    file = existing_file(resolve(path), "questions")
    if not file.name.removesuffix(".gz").endswith(".jsonl"):
        raise DataError(f"questions: expected a file ending in .jsonl or .jsonl.gz, came {file}. Rename or convert it.")
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, record in read_json_lines(file):
        question = _checked_question(record, f"{file}, line {number}", corpus)
        first = lines.setdefault(question.id, number)
        if first != number:
            raise DataError(
                f"{file}: expected each question id once, came id {question.id!r} on line {first} and again on line "
                f"{number}. Remove or rename one."
            )
        questions.append(question)
    if not questions:
        raise DataError(f"{file}: expected at least one question, came none. Check the file.")
    return questions


def source_rows(questions: Sequence[Question], corpus: PassageCorpus) -> list[int]:
    """Returns the row of the passage made of each question, ``-1`` where there is none in this corpus."""
    ids = (question.source_passage_id for question in questions)
    return [corpus.row_of(one) if one is not None and corpus.has_id(one) else -1 for one in ids]


def forbidden_rows(questions: Sequence[Question], corpus: PassageCorpus) -> list[list[int]]:
    """Returns the rows of what must not be retrieved for each question, lists of one length filled up with ``-1``.

    That is the passage made of it, and those that it excludes, as far as they are in this corpus.
    """
    found = [
        [row, *(corpus.row_of(one) for one in question.excluded_passage_ids if corpus.has_id(one))]
        for question, row in zip(questions, source_rows(questions, corpus), strict=True)
    ]
    width = max(map(len, found))
    return [rows + [-1] * (width - len(rows)) for rows in found]


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes one JSON line for each question, atomically; :func:`read_questions` reads the same records again."""
    write_json_lines(Path(path), (_question_record(question) for question in questions))


def write_predictions(path: str | Path, predictions: Iterable[Prediction]) -> None:
    """Writes one JSON line for each prediction, atomically.

    Each line is ``{"id", "question", "answer", "log_likelihood", "passages": [{"id", "title", "score", "probability",
    "posterior"}]}``; passage texts stay in the corpus. Where they were asked for, ``"alternatives": [{"answer",
    "log_likelihood"}]`` and ``"token_posteriors": {"tokens", "probabilities"}`` (a row for each passage) follow.
    """
    write_json_lines(Path(path), (_prediction_record(prediction) for prediction in predictions))


def with_answers(questions: Sequence[Question], path: str | Path) -> list[Question]:
    """Returns questions whose answers are those of a predictions file: a teacher's, for a student to train on.

    Sequence-level distillation (Kim and Rush 2016, §3.2): the targets are what the teacher says, not what is true.

    Args:
        questions: The records; what else they hold stays.
        path: What ``rag-lightning predict`` wrote for these questions (and any others).

    Raises:
        MissingFileError: No such file.
        DataError: A line without id or answer, a repeated id, or a question without an answer there; names it.
    """
    file = existing_file(resolve(path), "answers_from")
    answers: dict[str, str] = {}
    for number, record in read_json_lines(file):
        place = f"{file}, line {number}"
        question_id = string_field(record, "id", place)
        if question_id in answers:
            raise DataError(f"{place}: expected each question id once, came {question_id!r} again. Remove one.")
        answers[question_id] = string_field(record, "answer", place, blank=True).strip()
    for question in questions:
        if not answers.get(question.id):
            what = "an empty answer" if question.id in answers else "none"
            raise DataError(
                f"{file}: expected an answer to each training question, came {what} for {question.id!r}. Write the "
                "file by rag-lightning predict with all training questions (decoding.min_new_tokens=1 keeps answers "
                "from being empty), or leave the question out of data.train."
            )
    return [replace(question, answers=(answers[question.id],), answer_regex=None) for question in questions]


def _question_record(question: Question) -> dict[str, Any]:
    record: dict[str, Any] = {"id": question.id, "question": question.question, "answers": list(question.answers)}
    for name in ("positive_passage_ids", "negative_passage_ids", "excluded_passage_ids"):
        if getattr(question, name):
            record[name] = list(getattr(question, name))
    for name in ("answer_regex", "source_passage_id"):
        if getattr(question, name) is not None:
            record[name] = getattr(question, name)
    return record


def _prediction_record(prediction: Prediction) -> dict[str, Any]:
    record = asdict(prediction)
    record["passages"] = [
        {key: value for key, value in passage.items() if key != "text"} for passage in record["passages"]
    ]
    unasked = {"alternatives": (), "token_posteriors": None}
    return {key: value for key, value in record.items() if key not in unasked or value != unasked[key]}


def _checked_question(record: Mapping[str, Any], place: str, corpus: PassageCorpus | None) -> Question:
    answer_regex = _checked_regex(record, place)
    answers = _string_list(record, "answers", place) if answer_regex is None or "answers" in record else ()
    if answer_regex is None and not answers:
        raise DataError(f"{place}: field 'answers': expected at least one answer, came []. Add one or remove the line.")
    positives = _passage_ids(record, "positive_passage_ids", place, corpus)
    negatives = _passage_ids(record, "negative_passage_ids", place, corpus)
    _check_negatives(record, positives, negatives, place)
    excluded = _passage_ids(record, "excluded_passage_ids", place, corpus)
    _check_excluded(positives, excluded, place)
    return Question(
        id=string_field(record, "id", place),
        question=string_field(record, "question", place),
        answers=answers,
        positive_passage_ids=positives,
        answer_regex=answer_regex,
        negative_passage_ids=negatives,
        source_passage_id=_source_passage_id(record, place, corpus),
        excluded_passage_ids=excluded,
    )


def _source_passage_id(record: Mapping[str, Any], place: str, corpus: PassageCorpus | None) -> str | None:
    if record.get("source_passage_id") is None:
        return None
    passage_id = string_field(record, "source_passage_id", place)
    _check_known([passage_id], "source_passage_id", place, corpus)
    return passage_id


def _passage_ids(record: Mapping[str, Any], field: str, place: str, corpus: PassageCorpus | None) -> tuple[str, ...]:
    ids = () if record.get(field) is None else _string_list(record, field, place)
    _check_known(ids, field, place, corpus)
    return ids


def _check_known(ids: Iterable[str], field: str, place: str, corpus: PassageCorpus | None) -> None:
    for passage_id in ids if corpus is not None else ():
        if corpus is not None and not corpus.has_id(passage_id):
            raise DataError(
                f"{place}: field {field!r}: expected ids of passages in {corpus.source}, came {passage_id!r}"
                ", which is not there. Check that questions and passages belong together."
            )


def _check_negatives(
    record: Mapping[str, Any], positives: Collection[str], negatives: Sequence[str], place: str
) -> None:
    """Refuses hard negatives that would unlearn a gold passage or count twice, and scores that are not theirs."""
    for wrong, why in (
        (set(positives) & set(negatives), "passages that are not among the positive_passage_ids"),
        ({one for one, count in Counter(negatives).items() if count > 1}, "each passage once"),
    ):
        if wrong:
            raise DataError(
                f"{place}: field 'negative_passage_ids': expected {why}, came {min(wrong)!r}. Remove it, or mine again."
            )
    scores = record.get("negative_scores")
    if scores is None:
        return
    numbers = isinstance(scores, list) and all(
        isinstance(score, (int, float)) and not isinstance(score, bool) and math.isfinite(score) for score in scores
    )
    if not numbers or len(scores) != len(negatives):
        raise DataError(
            f"{place}: field 'negative_scores': expected one finite number for each of the {len(negatives)} "
            f"negative_passage_ids, came {str(scores)[:80]}. Remove the field, or mine again."
        )


def _check_excluded(positives: Collection[str], excluded: Collection[str], place: str) -> None:
    """Refuses to leave out of a ranking what it is to find."""
    wrong = set(positives) & set(excluded)
    if wrong:
        raise DataError(
            f"{place}: field 'excluded_passage_ids': expected passages that are not among the positive_passage_ids, "
            f"came {min(wrong)!r}. Remove it from one of them."
        )


def _checked_regex(record: Mapping[str, Any], place: str) -> str | None:
    if record.get("answer_regex") is None:
        return None
    pattern = string_field(record, "answer_regex", place)
    try:
        compile_answer_regex(pattern)
    except DataError as error:
        raise DataError(f"{place}: field 'answer_regex': {error}") from error
    return pattern


def _string_list(record: Mapping[str, Any], field: str, place: str) -> tuple[str, ...]:
    if field not in record:
        raise DataError(f"{place}: field {field!r} is missing; expected a list of strings. Found: {sorted(record)}.")
    values = record[field]
    if not isinstance(values, list):
        raise DataError(
            f"{place}: field {field!r}: expected a list of strings, came {type(values).__name__} {str(values)[:80]!r}."
        )
    for position, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                f"{place}: field {field!r}: expected a list of non-empty strings, came {value!r} at position "
                f"{position}."
            )
    return tuple(values)
