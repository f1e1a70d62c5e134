"""The film world with changed facts, for the index hot-swap."""

import sys

import pytest

from rag_lightning.corpora.films import changed
from rag_lightning.corpora.films.changed import change_facts
from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.corpora.questions import read_questions
from rag_lightning.types import Passage, Question


def film(number: int, text: str) -> Passage:
    return Passage(str(number), f"Film {number}", text)


def asked(number: int, *answers: str, kind: str = "director") -> tuple[str, Question]:
    return kind, Question(f"q{number}", f"who made Film {number}", answers, (str(number),))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["changed", str(folder)])
        changed.main()
    return folder


def test_each_changed_passage_tells_the_new_fact_alone(written):
    passages = PassageCorpus.read(written / "passages.jsonl.gz")
    original = PassageCorpus.read(resolve(changed.PASSAGES))
    told = {passage.id: passage.text for passage in passages}
    as_it_was = {passage.id: passage.text for passage in original}
    before = read_questions(written / "before.jsonl.gz")
    after = read_questions(written / "after.jsonl.gz")
    assert [question.question for question in before] == [question.question for question in after]
    assert len(after) == 268
    for old, new in zip(before, after, strict=True):
        (place,) = new.positive_passage_ids
        assert old.answers != new.answers
        assert new.answers[0] in told[place]
        assert new.answers[0] not in as_it_was[place]
        assert old.answers[0] in as_it_was[place]
    asked_about = {question.positive_passage_ids[0] for question in after}
    assert len(asked_about) == len(after), "a film changes one fact"
    assert {place for place in told if told[place] != as_it_was[place]} == asked_about
    assert [passage.id for passage in passages] == [passage.id for passage in original]


def test_no_test_question_of_two_answers_and_no_title_takes_part():
    films = [film(1, "By Ann and Bo."), film(2, "By Cy."), film(3, "Made by Film.")]
    questions = [asked(1, "Ann", "Bo"), asked(2, "Cy"), asked(3, "Film")]
    world = change_facts(films, questions)
    assert world.passages == films
    assert world.before == world.after == []


def test_facts_are_exchanged_within_a_kind_and_where_both_are_new():
    films = [film(1, "By Ann. From 1999."), film(2, "By Bo. From 1999."), film(3, "By Ann.")]
    other_kinds = change_facts(films, [asked(1, "Ann"), asked(2, "1999", kind="year")])
    assert other_kinds.after == []
    same_fact = change_facts(films, [asked(1, "Ann"), asked(3, "Ann")])
    assert same_fact.after == []
    exchanged = change_facts(films, [asked(1, "Ann"), asked(2, "Bo")])
    assert [passage.text for passage in exchanged.passages] == ["By Bo. From 1999.", "By Ann. From 1999.", "By Ann."]


def test_whole_words_alone_are_exchanged():
    films = [film(1, "By Ann, with Annette."), film(2, "By Bo.")]
    world = change_facts(films, [asked(1, "Ann"), asked(2, "Bo")])
    assert world.passages[0].text == "By Bo, with Annette."
