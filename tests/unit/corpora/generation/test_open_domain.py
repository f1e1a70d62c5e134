"""Data sets of papers, as they are published and as samples of them lie at hand: read, cleaned, refused."""

import json
from pathlib import Path

import pytest

from rag_lightning.corpora.generation.long_answers import MsMarco
from rag_lightning.corpora.generation.open_domain import OpenQuestions, Squad, shown
from rag_lightning.corpora.generation.prepared import keep, keep_tokenizer, prepared_name
from rag_lightning.corpora.generation.published import question_file, read_asked
from rag_lightning.corpora.generation.question_generation import Clues
from rag_lightning.corpora.generation.verification import Verification
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.types import Passage


def lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_forms_of_question_files(tmp_path: Path) -> None:
    (tmp_path / "a.qa.csv").write_text("who made it\t['Ann', \"Ann's\"]\n")
    assert read_asked(tmp_path / "a.qa.csv")[0].answers == ("Ann", "Ann's")
    published = lines(
        tmp_path / "b.jsonl", [{"question": "who", "answer": ["Ann"]}, {"question": "when", "answer": "now"}]
    )
    assert [(one.id, one.answers) for one in read_asked(published)] == [("1", ("Ann",)), ("2", ("now",))]
    entry = {"question": "who", "answers": ["Ann"], "positive_ctxs": [{"psg_id": "wiki:7"}, {"title": "no row"}]}
    entry["hard_negative_ctxs"] = [{"passage_id": "7"}, {"passage_id": 9}]
    (tmp_path / "c.json").write_text(json.dumps([entry]))
    (asked,) = read_asked(tmp_path / "c.json")
    assert (asked.positive_passage_ids, asked.negative_passage_ids) == (("7",), ("9",))
    assert question_file(str(tmp_path), "a") == tmp_path / "a.qa.csv"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.qa.csv", "who made it\n", "line 1: expected a question, a tab and a list"),
        ("a.qa.csv", "who\t['a\n", r"line 1: expected a Python list of strings, came .*\['a"),
        ("a.qa.csv", "who\t[1]\n", "expected a Python list of strings"),
        ("a.qa.csv", "who\t__import__('os')\n", "expected a Python list of strings"),
        ("a.qa.csv", "who\t[]\n", "expected at least one answer"),
        ("a.jsonl", '{"question": "who"}\n', "field 'answers' is missing"),
        ("a.jsonl", '{"question": "who", "answers": [1]}\n', "field 'answers': expected a list of strings"),
        ("a.json", "{}", "expected one list in JSON, came a dict"),
        ("a.json", "[", "expected one list in JSON"),
        ("a.json", '[{"question": "q", "answers": ["a"]}]', "entry 1: field 'positive_ctxs' is missing"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_asked(tmp_path / name)


def test_a_missing_file_says_what_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"expected nq/train with one of the endings .*rag-lightning data fetch"):
        question_file(str(tmp_path), "nq/train")


def test_answers_are_made_examples_found_ones_first_and_the_excluded_left_out(tmp_path: Path) -> None:
    rows = [{"question": f"who is {n}", "answers": ["Zoe", "Ann Ash"]} for n in range(20)]
    lines(tmp_path / "t.jsonl", rows)
    lines(tmp_path / "e.jsonl", [{"question": "Who is 3?"}, {"question": "new"}])
    lines(tmp_path / "p.jsonl", [{"id": "p", "title": "Ann Ash", "text": "Ann Ash is a painter."}])
    settings = {"folder": str(tmp_path), "train": "t", "test": "t", "passages": ("p",), "validation_share": 0.3}
    data = OpenQuestions(**settings, each_answer=True, shown_first=True, exclude=("e",))()
    asked = {question.question for question in (*data.questions["train"], *data.questions["validation"])}
    assert asked == {f"who is {n}" for n in range(20)} - {"who is 3"}
    assert [question.answers for question in data.questions["train"][:2]] == [("Ann Ash",), ("Zoe",)]
    assert data.questions["validation"][0].answers == ("Zoe", "Ann Ash"), "all of them are right, in the file's order"
    few = OpenQuestions(**settings, limit_train=4)()
    assert len(few.questions["train"]) == 4
    assert {question.question for question in few.questions["validation"]} == {
        question.question for question in OpenQuestions(**settings)().questions["validation"]
    }
    ids = [question.id for part in data.questions.values() for question in part]
    assert len(ids) == len(set(ids))


def test_settings_that_cannot_be_met_are_refused(tmp_path: Path) -> None:
    settings = {"folder": str(tmp_path), "train": "t", "test": "t"}
    for further, message in (
        ({"shown_first": True}, "shown_first: expected passages"),
        ({"limit_train": 0}, "limit_train: expected 1 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            OpenQuestions(**settings, **further)()
    with pytest.raises(ConfigError, match="words: expected a word for two labels"):
        Verification(**settings, words={"A": "a", "B": None})()
    with pytest.raises(ConfigError, match="shares: expected 2 of them"):
        Clues(**settings)()
    lines(tmp_path / "t.jsonl", [{"claim": "x", "label": "MAYBE"}])
    with pytest.raises(DataError, match="line 1: field 'label': expected one of A, B, came 'MAYBE'"):
        Verification(**settings, words={"A": "a", "B": "b"})()
    (tmp_path / "train_v2.1.json").write_text(
        '{"query": {"0": "q"}, "query_id": {"0": 1}, "wellFormedAnswers": {"0": "[]"}}'
    )
    with pytest.raises(DataError, match="expected questions with wellFormedAnswers, came none"):
        MsMarco(folder=str(tmp_path))()
    (tmp_path / "train-v1.1.json").write_text("[]")
    with pytest.raises(DataError, match="expected a mapping with the field 'data', came a list"):
        Squad(folder=str(tmp_path))()


def test_how_often_passages_show_an_answer() -> None:
    passages = [Passage("1", "Oz", "The Wizard of Oz."), Passage("2", "", "a wizard; the wizards of Oz")]
    assert shown(passages, ["wizard of Oz", "Oz!", "none of it", ""]) == {"wizard of Oz": 1, "Oz!": 3}


def test_a_data_set_that_was_moved_is_the_same_and_one_that_changed_is_not(tmp_path: Path) -> None:
    names = []
    for folder, answer in (("a", "x"), ("b", "x"), ("c", "y")):
        lines(tmp_path / folder / "d" / "t.jsonl", [{"question": f"q{n}", "answers": [answer]} for n in range(20)])
        names.append(prepared_name(OpenQuestions(folder=str(tmp_path / folder), train="d/t", test="d/t")))
    assert names[0] == names[1] != names[2]


def test_without_passages_there_is_no_vocabulary_to_learn(tmp_path: Path) -> None:
    lines(tmp_path / "t.jsonl", [{"question": f"q{n}", "answers": ["x"]} for n in range(20)])
    folder = keep(OpenQuestions(folder=str(tmp_path), train="t", test="t"), tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl"}
    with pytest.raises(ConfigError, match="task.vocabulary: expected passages among the prepared files"):
        keep_tokenizer(folder, vocab_size=100, lowercase=True)
