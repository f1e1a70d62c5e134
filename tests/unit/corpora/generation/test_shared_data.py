"""The ten real data sets are read whole, with the counts they state, and divided without leaks."""

import gzip
import json
from pathlib import Path

import pytest

from rag_lightning.corpora.generation.dialogue import CmuDog, DailyDialog, KdConv
from rag_lightning.corpora.generation.question_generation import Jeopardy
from rag_lightning.corpora.generation.reading import CrossLingualReading, ReadingComprehension
from rag_lightning.corpora.generation.summaries import Summaries
from rag_lightning.corpora.generation.translation import Translation
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.text.normalise import contains_answer

SHARED = Path(__file__).parents[5] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not there")

# reader, folder, settings, passages, questions in all
SETS = {
    "multi30k": (Translation, "multi30k_en_de", {}, 20_000, 20_000 + 1014 + 1000),
    "scitldr": (Summaries, "scitldr", {}, 1992, 1992 + 619 + 618),
    "dialogsum": (Summaries, "dialogsum", {"document": "dialogue", "train": "dev", "validation": None}, 447, 1000),
    "dailydialog": (DailyDialog, "dailydialog", {}, 908, 13_809),
    "cmu_dog": (CmuDog, "cmu_dog", {}, 120, 95_140),
    "kdconv": (KdConv, "kdconv", {}, 17_504, 18_158),
    "jeopardy": (Jeopardy, "jeopardy", {}, 1679, 2117),
    "cmrc2018": (ReadingComprehension, "cmrc2018", {"test": "dev"}, 1104, 2348 + 901),
    "drcd": (ReadingComprehension, "drcd", {}, 2000, 3524 + 3493),
    "xquad": (CrossLingualReading, "xquad", {}, 240, 824),
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_read_whole(name):
    reader, folder, settings, num_passages, num_questions = SETS[name]
    data = reader(folder=str(SHARED / folder), **settings)()
    corpus = PassageCorpus.from_passages(data.passages)
    assert len(corpus) == num_passages
    questions = [question for part in data.questions.values() for question in part]
    assert len(questions) == len({question.id for question in questions}) == num_questions
    assert all(question.question.strip() and question.answers[0].strip() for question in questions)
    for question in questions:
        named = [*question.positive_passage_ids, *filter(None, [question.source_passage_id])]
        assert all(corpus.has_id(one) for one in named)
    sources = {question.source_passage_id for question in data.questions["test"]}
    assert sources == {None}
    trained = {question.positive_passage_ids[:1] for question in data.questions["train"]}
    if reader in (ReadingComprehension, CrossLingualReading):
        assert not trained & {question.positive_passage_ids[:1] for question in data.questions["validation"]}


def test_every_dialogue_turn_but_the_first_is_asked_for():
    data = DailyDialog(folder=str(SHARED / "dailydialog"))()
    with gzip.open(SHARED / "dailydialog" / "test.jsonl.gz", "rt", encoding="utf-8") as stream:
        turns = [text.strip() for line in stream for text in json.loads(line)["utterances"][1:]]
    assert [question.answers[0] for question in data.questions["test"]] == turns


def test_gold_paragraphs_hold_the_chinese_answers():
    data = ReadingComprehension(folder=str(SHARED / "cmrc2018"), test="dev")()
    corpus = PassageCorpus.from_passages(data.passages)
    held = [
        contains_answer(corpus[corpus.row_of(question.positive_passage_ids[0])].text, question.answers, "zh")
        for question in data.questions["test"]
    ]
    assert sum(held) / len(held) > 0.99
