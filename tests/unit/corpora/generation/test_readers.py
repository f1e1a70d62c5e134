"""Each reader's questions and passages on small files: what is asked, written, gold, and a question's own."""

import gzip
from pathlib import Path

import pytest

from rag_lightning.corpora.generation.dialogue import CmuDog, DailyDialog, Dialogue, KdConv, Turn, questions_of
from rag_lightning.corpora.generation.parts import divided_by
from rag_lightning.corpora.generation.prepared import Preparation
from rag_lightning.corpora.generation.question_generation import Jeopardy
from rag_lightning.corpora.generation.reading import CrossLingualReading, ReadingComprehension
from rag_lightning.corpora.generation.summaries import Summaries
from rag_lightning.corpora.generation.translation import Translation
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from tests.generation_files import SAID, write, write_generation


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_generation(tmp_path_factory.mktemp("generation"))


def of(data: Path, name: str) -> str:
    return str(data / name)


def test_every_training_pair_is_a_passage_that_its_own_question_never_finds(data):
    prepared = Translation(folder=of(data, "multi30k_en_de"))()
    passages = {passage.id: passage for passage in prepared.passages}
    train = prepared.questions["train"]
    assert len(passages) == len(train) == 12
    for question in train:
        own = passages[question.source_passage_id]
        assert (own.text, own.title) == (question.question, question.answers[0])
    assert train[1].question == "two dogs run on grass 1"
    assert train[1].answers == ("zwei Hunde rennen im Gras 1",)
    held_out = [*prepared.questions["validation"], *prepared.questions["test"]]
    assert {question.source_passage_id for question in held_out} == {None}
    assert len({question.id for questions in prepared.questions.values() for question in questions}) == 36


def test_the_other_direction_is_a_setting(data):
    prepared = Translation(folder=of(data, "multi30k_en_de"), source="de", target="en")()
    assert prepared.questions["test"][0].question == "ein Mann mit rotem Hut 0"


def test_passages_of_a_file_stand_in_for_examples(data):
    file = data / "cmrc2018" / "passages.jsonl.gz"
    prepared = Translation(folder=of(data, "multi30k_en_de"), passages=str(file))()
    assert len(prepared.passages) == 36
    assert {question.source_passage_id for question in prepared.questions["train"]} == {None}


def test_a_document_of_sentences_keeps_all_its_summaries(data):
    prepared = Summaries(folder=of(data, "scitldr"))()
    question = prepared.questions["train"][1]
    assert question.question == "two dogs run on grass. a girl reads a book."
    assert question.answers == ("two dogs run on grass", "of 1")
    assert prepared.passages[1].title == "two dogs run on grass"


def test_without_a_validation_file_a_share_is_held_out(data):
    settings = {"document": "dialogue", "train": "dev", "validation": None, "validation_share": 0.25}
    prepared = Summaries(folder=of(data, "dialogsum"), **settings)()
    sizes = {split: len(questions) for split, questions in prepared.questions.items()}
    assert sizes["train"] + sizes["validation"] == 40
    assert 2 <= sizes["validation"] <= 18
    assert sizes["test"] == 40
    assert len(prepared.passages) == sizes["train"]
    assert len(prepared.questions["test"][0].answers) == 3
    assert "\n" not in prepared.questions["test"][0].question


def test_a_turn_is_asked_for_by_the_last_turns_before_it():
    turns = tuple(Turn("AB"[n % 2], str(n), wanted=n != 2) for n in range(5))
    questions = questions_of([Dialogue("d", turns)], max_turns=2)
    assert [question.question for question in questions] == ["A: 0", "B: 1 A: 2", "A: 2 B: 3"]
    assert [question.answers for question in questions] == [("1",), ("3",), ("4",)]
    with pytest.raises(ConfigError, match="max_turns: expected 1 or more, came 0"):
        questions_of([], 0)


def test_no_turn_finds_its_own_dialogue_and_no_held_out_dialogue_is_searched(data):
    prepared = DailyDialog(folder=of(data, "dailydialog"))()
    passages = {passage.id: passage.text for passage in prepared.passages}
    for question in prepared.questions["train"]:
        assert question.answers[0] in passages[question.source_passage_id]
        assert question.id.startswith(f"{question.source_passage_id}-")
    for split in ("validation", "test"):
        for question in prepared.questions[split]:
            assert question.source_passage_id is None
            assert question.answers[0] not in " ".join(passages.values()) or split == "test"
    assert {question.id.rsplit("-", 1)[0] for question in prepared.questions["train"]} == set(passages)


def test_turns_of_who_saw_the_document_are_grounded_in_the_section_shown(data):
    prepared = CmuDog(folder=of(data, "cmu_dog"))()
    assert [passage.id for passage in prepared.passages] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    first = prepared.passages[0]
    assert first.title == "Snow"
    assert first.text.startswith("2004. Comedy. Anna Ash. Ben Birch as Bo.")
    asked = prepared.questions["test"][:2]
    assert [question.answers for question in asked] == [(SAID[1],), (SAID[3],)]
    assert [question.positive_passage_ids for question in asked] == [("0-1",), ("0-0",)]
    assert asked[1].question == f"user1: {SAID[0]} user2: {SAID[1]} user1: {SAID[2]}"
    everyone = CmuDog(folder=of(data, "cmu_dog"), speakers="all")()
    assert len(everyone.questions["test"]) == 2 * len(prepared.questions["test"])


def test_a_section_that_is_not_there_is_named(data, tmp_path):
    for name in ("documents", "train", "dev", "test"):
        target = tmp_path / f"{name}.jsonl.gz"
        target.write_bytes((data / "cmu_dog" / f"{name}.jsonl.gz").read_bytes())
    turn = {"uid": "u", "section": 9, "text": "hi"}
    write(tmp_path / "train.jsonl.gz", [{"id": "1", "wiki_idx": 0, "who_saw_doc": ["u"], "history": [turn]}])
    with pytest.raises(
        DataError, match=r"train.jsonl.gz, line 1: expected sections of the documents, came section 0-9"
    ):
        CmuDog(folder=str(tmp_path))()


def test_triples_are_passages_once_and_gold_for_their_turns(data):
    prepared = KdConv(folder=of(data, "kdconv"))()
    texts = [f"{passage.title} {passage.text}" for passage in prepared.passages]
    assert len(texts) == len(set(texts)) == 7  # of the knowledge base two, of the messages five more
    assert "雪 导演：安娜" in texts
    by_id = {passage.id: passage for passage in prepared.passages}
    question = prepared.questions["test"][0]
    assert question.answers == ("知道，是安娜导演的。",)
    assert [by_id[one].text for one in question.positive_passage_ids] == ["导演：安娜", "年：1"]


def test_a_bad_triple_is_named(data, tmp_path):
    for file in (data / "kdconv").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write(tmp_path / "kb_travel.jsonl.gz", [["故宫", "城市"]])
    with pytest.raises(DataError, match=r"kb_travel.jsonl.gz, line 1: expected \[head, relation, tail\]"):
        KdConv(folder=str(tmp_path))()
    with gzip.open(tmp_path / "kb_travel.jsonl.gz", "wt") as stream:
        stream.write("no json\n")
    with pytest.raises(DataError, match=r"expected \[head, relation, tail\], came 'no json"):
        KdConv(folder=str(tmp_path))()


def test_a_clue_is_asked_for_by_category_and_answer_and_no_answer_is_in_two_splits(data):
    prepared = Jeopardy(folder=of(data, "jeopardy"))()
    assert prepared.questions["train"][0].question.startswith("FILMS: Snow ")
    asked = {split: {one.question for one in questions} for split, questions in prepared.questions.items()}
    assert sum(map(len, asked.values())) == len(set().union(*asked.values())) == 60
    alone = Jeopardy(folder=of(data, "jeopardy"), with_category=False)()
    assert alone.questions["train"][0].question.startswith("Snow ")


def test_questions_on_one_paragraph_stay_together(data):
    prepared = ReadingComprehension(folder=of(data, "drcd"), validation_share=0.3)()
    gold = {split: {one.positive_passage_ids for one in asked} for split, asked in prepared.questions.items()}
    assert not gold["train"] & gold["validation"]
    assert len(prepared.passages) == 36


def test_paragraphs_are_cut_into_passages_and_gold_are_those_that_show_an_answer(tmp_path: Path) -> None:
    text = "alpha beta gamma delta epsilon zeta beta"
    write(tmp_path / "passages.jsonl.gz", [{"id": "p0", "title": "Letters", "text": text}])
    asked = {"train": [("q0", "beta"), ("q1", "gamma delta"), ("q2", "delta epsilon")], "test": [("q3", "zeta")]}
    for name, questions in asked.items():
        write(
            tmp_path / f"{name}.jsonl.gz",
            [
                {"id": key, "question": f"what {key}", "answers": [answer], "positive_passage_ids": ["p0"]}
                for key, answer in questions
            ],
        )
    prepared = ReadingComprehension(folder=str(tmp_path), validation_share=0.01, passage_words=4)()
    assert [(one.id, one.title, one.text) for one in prepared.passages] == [
        ("p0-0", "Letters", "alpha beta gamma delta"),
        ("p0-1", "Letters", "epsilon zeta beta"),
    ]
    kept = {one.id: one.positive_passage_ids for one in prepared.questions["train"]}
    assert kept == {"q0": ("p0-0", "p0-1"), "q1": ("p0-0",)}, "an answer across a border is in no passage"
    assert [one.positive_passage_ids for one in prepared.questions["test"]] == [("p0-1",)]
    with pytest.raises(ConfigError, match="passage_words: expected 1 or more, or null, came 0"):
        ReadingComprehension(folder=str(tmp_path), passage_words=0)()


def test_a_question_in_one_language_has_the_answer_and_passage_of_the_other(data):
    prepared = CrossLingualReading(folder=of(data, "xquad"), question_language="de", passage_language="zh")()
    question = prepared.questions["train"][0]
    number = question.answers[0]
    assert question.positive_passage_ids == (f"zh{number}",)
    assert question.question.endswith(f" {number}?")
    assert question.question.split()[0] in ("ein", "zwei", "Kinder")


def test_a_question_that_one_language_lacks_is_named(data, tmp_path):
    for file in (data / "xquad").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write(tmp_path / "questions.de.jsonl.gz", [{"id": "x0", "question": "wer?", "answers": ["0"]}])
    with pytest.raises(DataError, match="expected the questions of both languages, came none of id 'x1'"):
        CrossLingualReading(folder=str(tmp_path))()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("source", [], "field 'source': expected at least one string"),
        ("source", ["  "], "field 'source': expected a text, came an empty one"),
        ("source", "", "field 'source': expected a text, came an empty one"),
        ("summaries", [" "], "field 'summaries': expected a text, came an empty one"),
    ],
)
def test_an_empty_document_or_summary_is_refused(field, value, said, tmp_path):
    good = {"id": "1", "source": ["a text"], "summaries": ["short"]}
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.jsonl.gz", [good, {**good, "id": "2", field: value}])
    with pytest.raises(DataError, match=f"train.jsonl.gz, line 2: {said}"):
        Summaries(folder=str(tmp_path))()


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(MissingFileError, match=r"expected train.jsonl.gz or train.jsonl in .*task.folder"):
        Translation(folder=str(tmp_path))()


def test_shares_must_sum_to_one():
    with pytest.raises(ConfigError, match=r"shares: expected positive numbers that sum to 1.*came \[0.5, 0.6\]"):
        divided_by(["a"], str, (0.5, 0.6))


def test_every_reader_is_a_preparation(data):
    for reader in (
        Translation,
        Summaries,
        DailyDialog,
        CmuDog,
        KdConv,
        Jeopardy,
        ReadingComprehension,
        CrossLingualReading,
    ):
        assert isinstance(reader(folder="f"), Preparation)
