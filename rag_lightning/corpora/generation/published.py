"""Question files as data sets publish them, told by their names.

- JSON lines, ``.jsonl[.gz]``: ``{"question", "answers" or "answer": str or [str, …]}``, perhaps with ``id``,
  ``answer_regex`` and ``positive_passage_ids``
- DPR's lists, ``.qa.csv[.gz]``: a question, a tab, and the answers as a Python list of strings
- DPR's training files, ``.json[.gz]``: one list of ``{"question", "answers", "positive_ctxs", "hard_negative_ctxs"}``,
  whose passages name rows of ``psgs_w100.tsv`` (Karpukhin et al. 2020, §4.1); held in memory while it is read
- MRQA's, ``.jsonl[.gz]`` with ``{"qas": [{"question", "answers", "qid"}]}`` on a line, under a line with a header
"""

import ast
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import identified_lines, present
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.types import Question
from rag_lightning.utils.io import open_text, read_json_lines

SUFFIXES = (".jsonl.gz", ".jsonl", ".qa.csv", ".qa.csv.gz", ".json.gz", ".json")
MAX_NEGATIVES = 30
"""Hard negatives kept of a question; training draws some of them at each visit."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of a file, before it is known what its answers mean.

    Attributes:
        place: Where it stands, for messages.
        id: Unique in the file.
        question: The text.
        answers: Accepted answers, or one regular expression that accepts them.
        positive_passage_ids: Gold passages.
        negative_passage_ids: Hard negatives.
        is_regex: The file says that ``answers`` is a regular expression.
    """

    place: str
    id: str
    question: str
    answers: tuple[str, ...]
    positive_passage_ids: tuple[str, ...] = ()
    negative_passage_ids: tuple[str, ...] = ()
    is_regex: bool = False

    def record(self, question_id: str, answers: Sequence[str]) -> Question:
        """Returns it as a question with these answers."""
        negatives = self.negative_passage_ids
        return Question(question_id, self.question, tuple(answers), self.positive_passage_ids, None, negatives)


def question_file(folder: str, name: str) -> Path:
    """Returns the file of a name without its ending, such as ``nq_open/train``, or with it.

    Raises:
        MissingFileError: There is none.
    """
    base = Path(folder).expanduser()
    for suffix in ("", *SUFFIXES):
        path = base / f"{name}{suffix}"
        if path.is_file():
            return path
    raise MissingFileError(
        f"expected {name} with one of the endings {', '.join(SUFFIXES)} in {base}, found none. Check task.folder, "
        "which holds a folder for each data set (rag-lightning data fetch output=DIR fills one)."
    )


def read_asked(file: Path) -> list[Asked]:
    """Returns the questions of a file; see the module's description for the forms.

    Raises:
        DataError: A line, or an entry, of another form; names it, what was expected and what came.
    """
    name = file.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        return [asked for place, number, record in _lines(file) for asked in _of_line(place, number, record)]
    if name.endswith(".csv"):
        return list(_of_csv(file))
    return list(_of_training_file(file))


def _lines(file: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if "header" not in next(read_json_lines(file), (0, {}))[1]:
        yield from identified_lines(file)
        return
    lines = read_json_lines(file)
    next(lines)
    yield from ((f"{file}, line {number}", str(number), record) for number, record in lines)


def _of_line(place: str, number: str, record: dict[str, Any]) -> Iterator[Asked]:
    if "qas" in record:
        for asked in present(record, "qas", place, "a list of questions"):
            yield Asked(place, string_field(asked, "qid", place), string_field(asked, "question", place),
                        _answers(asked, place))  # fmt: skip
        return
    regex = record.get("answer_regex")
    answers = (string_field(record, "answer_regex", place),) if regex is not None else _answers(record, place)
    question = string_field(record, "question", place)
    gold = tuple(str(one) for one in record.get("positive_passage_ids") or ())
    yield Asked(place, number, question, answers, gold, is_regex=regex is not None)


def _answers(record: Mapping[str, Any], place: str) -> tuple[str, ...]:
    field = "answer" if "answer" in record and "answers" not in record else "answers"
    values = present(record, field, place, "a list of strings")
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{place}: field {field!r}: expected a list of strings, came {str(values)[:80]!r}.")
    return checked_answers(values, place)


def checked_answers(values: Sequence[str], place: str) -> tuple[str, ...]:
    """Returns answers without blanks; a list that was taken apart into its characters is put together again.

    Some published copies of TriviaQA hold such lists: ``["[", "'", "a", "'", "]"]`` for ``["a"]``.

    Raises:
        DataError: No answer is left.

    >>> checked_answers(["[", "'", "a", "b", "'", ",", " ", "'", "c", "'", "]"], "line 1")
    ('ab', 'c')
    """
    if len(values) > 2 and all(len(value) <= 1 for value in values) and (values[0], values[-1]) == ("[", "]"):
        values = _put_together("".join(values))
    answers = tuple(value.strip() for value in values if value.strip())
    if not answers:
        raise DataError(f"{place}: field 'answers': expected at least one answer, came {list(values)}. Remove it.")
    return answers


def _put_together(text: str) -> list[str]:
    """Returns the strings of a written list, also where some have lost their quotation marks.

    >>> _put_together("['the Museum', Château d'Amboise, 'the Louvre']")
    ['the Museum', "Château d'Amboise", 'the Louvre']
    """
    try:
        return _python_list(text, "")
    except DataError:
        parts = re.split(r"""['"],\s*|,\s*['"]""", text.strip("[]"))
        return [part.strip().strip("'\"") for part in parts]


def _python_list(text: str, place: str) -> list[str]:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise DataError(f"{place}: expected a Python list of strings, came {text[:80]!r} ({error}). Mend it.") from None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{place}: expected a Python list of strings, came {text[:80]!r}. Mend it.")
    return values


def _of_csv(file: Path) -> Iterator[Asked]:
    with open_text(file) as stream:
        for number, row in enumerate(csv.reader(stream, delimiter="\t"), start=1):
            place = f"{file}, line {number}"
            if len(row) != 2 or not row[0].strip():
                raise DataError(f"{place}: expected a question, a tab and a list of answers, came {str(row)[:80]}.")
            yield Asked(place, str(number), row[0].strip(), checked_answers(_python_list(row[1], place), place))


def _of_training_file(file: Path) -> Iterator[Asked]:
    try:
        with open_text(file) as stream:
            records = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, OSError) as error:
        raise DataError(f"{file}: expected one list in JSON, came {error}. Fetch the file again.") from error
    if not isinstance(records, list):
        raise DataError(f"{file}: expected one list in JSON, came a {type(records).__name__}.")
    for number, record in enumerate(records, start=1):
        place = f"{file}, entry {number}"
        gold = _passages(record, "positive_ctxs", place)
        negatives = [one for one in _passages(record, "hard_negative_ctxs", place) if one not in gold]
        question = string_field(record, "question", place)
        yield Asked(place, str(number), question, _answers(record, place), gold, tuple(negatives[:MAX_NEGATIVES]))


def _passages(record: Mapping[str, Any], field: str, place: str) -> tuple[str, ...]:
    """Returns the rows of ``psgs_w100.tsv`` that contexts name; in some files texts have no row."""
    contexts = present(record, field, place, "a list of passages")
    ids = (str(context.get("passage_id", context.get("psg_id", ""))).removeprefix("wiki:") for context in contexts)
    return tuple(dict.fromkeys(one for one in ids if one))
