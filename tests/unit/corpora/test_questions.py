import gzip
import json
from pathlib import Path

import pytest

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions, write_predictions
from rag_lightning.errors import DataError, MissingFileError
from rag_lightning.text.normalise import contains_answer
from rag_lightning.types import Alternative, Passage, Prediction, Question, RetrievedPassage, TokenPosteriors

SHARED = Path(__file__).parents[4] / "shared" / "data"
with_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")
GOOD = {"id": "q1", "question": "who made Kismet?", "answers": ["V. Minnelli", "Minnelli"]}


@pytest.fixture
def corpus():
    return PassageCorpus.from_passages(
        [Passage("7", "Kismet", "A film."), Passage("8", "K", "B")], source="films.jsonl"
    )


def write(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz"])
def test_questions_are_read_in_order(tmp_path, corpus, name):
    rows = [
        GOOD | {"positive_passage_ids": ["7", "8"], "extra": {"ignored": 1}},
        {"id": "q2", "question": "when?", "answer_regex": r"19\d\d"},
        {"id": "q3", "question": "both", "answers": ["1955"], "answer_regex": "1955", "positive_passage_ids": []},
        {"id": "q4", "question": "nulls", "answers": ["x"], "answer_regex": None, "positive_passage_ids": None},
        GOOD | {"id": "q5", "positive_passage_ids": ["7"], "negative_passage_ids": ["8"], "negative_scores": [2]},
        GOOD | {"id": "q6", "negative_passage_ids": ["8", "7"]},
        GOOD | {"id": "q7", "negative_passage_ids": None, "negative_scores": None},
        GOOD | {"id": "q8", "positive_passage_ids": ["7"], "excluded_passage_ids": ["8"]},
    ]
    assert read_questions(write(tmp_path / name, rows), corpus=corpus) == [
        Question("q1", "who made Kismet?", ("V. Minnelli", "Minnelli"), ("7", "8")),
        Question("q2", "when?", (), (), r"19\d\d"),
        Question("q3", "both", ("1955",), (), "1955"),
        Question("q4", "nulls", ("x",)),
        Question("q5", "who made Kismet?", ("V. Minnelli", "Minnelli"), ("7",), None, ("8",)),
        Question("q6", "who made Kismet?", ("V. Minnelli", "Minnelli"), (), None, ("8", "7")),
        Question("q7", "who made Kismet?", ("V. Minnelli", "Minnelli")),
        Question("q8", "who made Kismet?", ("V. Minnelli", "Minnelli"), ("7",), excluded_passage_ids=("8",)),
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"expected at least one question, came none"),
        (
            [GOOD | {"excluded_passage_ids": ["9"]}],
            r"line 1: field 'excluded_passage_ids': expected ids of passages in",
        ),
        ([GOOD | {"excluded_passage_ids": "7"}], r"field 'excluded_passage_ids': expected a list of strings, came str"),
        (
            [GOOD | {"positive_passage_ids": ["7"], "excluded_passage_ids": ["8", "7"]}],
            r"'excluded_passage_ids': expected passages that are not among the positive_passage_ids, came '7'",
        ),
        ([GOOD, "{"], r"line 2: expected one JSON object on the line"),
        ([GOOD, "", GOOD], r"each question id once, came id 'q1' on line 1 and again on line 3"),
        ([{"id": "q", "question": "x"}], r"line 1: field 'answers' is missing; expected a list of strings"),
        ([GOOD | {"answers": []}], r"line 1: field 'answers': expected at least one answer, came \[\]"),
        ([GOOD | {"answers": "x"}], r"line 1: field 'answers': expected a list of strings, came str 'x'"),
        ([GOOD | {"answers": ["x", " "]}], r"line 1: field 'answers': .*non-empty strings, came ' ' at position 1"),
        ([GOOD | {"answers": [3]}], r"line 1: field 'answers': .*non-empty strings, came 3 at position 0"),
        ([GOOD | {"question": ""}], r"line 1: field 'question': expected a text, came an empty one"),
        ([GOOD | {"id": 1}], r"line 1: field 'id': expected a string, came int '1'"),
        ([{"answers": ["x"], "question": "y"}], r"line 1: field 'id' is missing"),
        ([GOOD | {"answer_regex": "(a"}], r"line 1: field 'answer_regex': expected a regular expression, came '\(a'"),
        ([GOOD | {"answer_regex": 3}], r"line 1: field 'answer_regex': expected a string, came int"),
        ([GOOD | {"positive_passage_ids": "7"}], r"line 1: field 'positive_passage_ids': expected a list of strings"),
        (
            [GOOD, GOOD | {"id": "q2", "positive_passage_ids": ["7", "9"]}],
            r"line 2: field 'positive_passage_ids': expected ids of passages in films\.jsonl, came '9', which is not",
        ),
        (
            [GOOD | {"negative_passage_ids": ["7", "9"]}],
            r"line 1: field 'negative_passage_ids': expected ids of passages in films\.jsonl, came '9', which is not",
        ),
        (
            [GOOD | {"negative_passage_ids": [7]}],
            r"field 'negative_passage_ids': .*non-empty strings, came 7 at position",
        ),
        (
            [GOOD | {"positive_passage_ids": ["7"], "negative_passage_ids": ["8", "7"]}],
            r"line 1: field 'negative_passage_ids': expected passages that are not among the .*, came '7'\. Remove it",
        ),
        (
            [GOOD | {"negative_passage_ids": ["8", "7", "8"]}],
            r"line 1: field 'negative_passage_ids': expected each passage once, came '8'\. Remove it, or mine again",
        ),
        (
            [GOOD | {"negative_passage_ids": ["8", "7"], "negative_scores": [1.0]}],
            r"line 1: field 'negative_scores': expected one finite number for each of the 2 .*, came \[1\.0\]",
        ),
        ([GOOD | {"negative_passage_ids": ["8"], "negative_scores": ["1"]}], r"one finite number .*, came \['1'\]"),
        (
            [GOOD | {"negative_passage_ids": ["8"], "negative_scores": [float("nan")]}],
            r"finite number .*, came \[nan\]",
        ),
        ([GOOD | {"negative_passage_ids": ["8"], "negative_scores": [True]}], r"finite number .*, came \[True\]"),
        ([GOOD | {"negative_passage_ids": ["8"], "negative_scores": 3}], r"finite number .*, came 3\."),
        ([GOOD | {"negative_scores": [3.0]}], r"one finite number for each of the 0 negative_passage_ids"),
    ],
)
def test_bad_questions_name_file_line_and_field(tmp_path, corpus, rows, message):
    path = write(tmp_path / "q.jsonl", rows)
    with pytest.raises(DataError, match=message) as error:
        read_questions(path, corpus=corpus)
    assert str(path) in str(error.value)


def test_gold_passages_are_only_checked_against_a_corpus(tmp_path):
    path = write(tmp_path / "q.jsonl", [GOOD | {"positive_passage_ids": ["anything"]}])
    assert read_questions(path)[0].positive_passage_ids == ("anything",)


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(MissingFileError, match=r"questions: no such file: .*gone\.jsonl"):
        read_questions(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"questions: expected a file ending in \.jsonl or \.jsonl\.gz, came"):
        read_questions(tmp_path)


def test_predictions_are_written_as_designed(tmp_path):
    passages = (
        RetrievedPassage("7", "Kismet", "A film é.", 75.5, 0.75, 0.5),
        RetrievedPassage("8", "K", "B", 74.0, 0.25, 0.5),
    )
    prediction = Prediction("q1", "who?", "Minnelli é", -1.25, passages)
    write_predictions(tmp_path / "deep" / "predictions.jsonl", iter([prediction, prediction]))
    lines = (tmp_path / "deep" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == 2 * [
        {
            "id": "q1",
            "question": "who?",
            "answer": "Minnelli é",
            "log_likelihood": -1.25,
            "passages": [
                {"id": "7", "title": "Kismet", "score": 75.5, "probability": 0.75, "posterior": 0.5},
                {"id": "8", "title": "K", "score": 74.0, "probability": 0.25, "posterior": 0.5},
            ],
        }
    ]


def test_what_was_asked_for_is_written_too(tmp_path):
    best = (Alternative("a", -1.0), Alternative("b", -2.0))
    by_token = TokenPosteriors(("a", "</s>"), ((0.25, 1.0), (0.75, 0.0)))
    write_predictions(tmp_path / "p.jsonl", [Prediction("q", "?", "a", -1.0, (), best, by_token)])
    written = json.loads((tmp_path / "p.jsonl").read_text())
    assert written["alternatives"] == [
        {"answer": "a", "log_likelihood": -1.0},
        {"answer": "b", "log_likelihood": -2.0},
    ]
    assert written["token_posteriors"] == {"tokens": ["a", "</s>"], "probabilities": [[0.25, 1.0], [0.75, 0.0]]}


def test_a_failure_keeps_the_old_predictions(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [Prediction("old", "q", "a", 0.0, ())])

    def failing():
        yield Prediction("new", "q", "a", 0.0, ())
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_predictions(path, failing())
    assert json.loads(path.read_text())["id"] == "old"
    assert list(tmp_path.iterdir()) == [path]


@with_shared_data
@pytest.mark.parametrize(("split", "number"), [("train", 5730), ("dev", 1338)])
def test_squad_open_belongs_together(split, number):
    corpus = PassageCorpus.read(SHARED / "squad_open" / "passages.jsonl.gz")
    questions = read_questions(SHARED / "squad_open" / f"{split}.jsonl.gz", corpus=corpus)
    assert len(questions) == number
    sample = questions[:300]
    gold = [corpus[corpus.row_of(question.positive_passage_ids[0])].text for question in sample]
    assert all(contains_answer(text, question.answers) for text, question in zip(gold, sample, strict=True))


@with_shared_data
@pytest.mark.parametrize(("split", "number"), [("train", 1693), ("test", 536)])
def test_curated_trec_has_regex_answers(split, number):
    questions = read_questions(SHARED / "curatedtrec" / f"{split}.jsonl.gz")
    assert len(questions) == number
    assert all(question.answer_regex and not question.answers for question in questions)
