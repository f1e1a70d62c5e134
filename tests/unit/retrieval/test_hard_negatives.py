"""Mining: what is gold or answers is left out, the rest is kept in rank order, and no question is lost."""

import json
from dataclasses import replace

import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.exact import ExactIndex
from rag_lightning.retrieval.encode import PassageTokens, encode_passages
from rag_lightning.retrieval.hard_negatives import dense_search, holds_answer, mine_hard_negatives, write_mined
from rag_lightning.types import Passage, Question

PASSAGES = [
    Passage("p0", "Kismet", "A film by Vincente Minnelli of 1955."),
    Passage("p1", "Gigi", "A film by Vincente Minnelli of 1958."),
    Passage("p2", "Minnelli", "A family of artists."),
    Passage("p3", "Kismet", "A play of 1911."),
    Passage("p4", "Fate", "Kismet means fate."),
    Passage("p5", "Opera", "Music and a stage."),
]
QUESTION = Question("q", "who made Kismet?", ("minnelli",), ("p0",))


@pytest.fixture
def corpus():
    return PassageCorpus.from_passages(PASSAGES, source="films")


def ranking(*rows):
    """A search that always finds these rows, scored 9, 8, …"""
    calls = []

    def search(questions, num_passages):
        calls.append((list(questions), num_passages))
        ids = [*rows, *[-1] * num_passages][:num_passages]
        scores = [9.0 - place if row >= 0 else -torch.inf for place, row in enumerate(ids)]
        return torch.tensor([scores] * len(questions)), torch.tensor([ids] * len(questions))

    search.calls = calls
    return search


def mined(question, search, corpus, **settings):
    (one,) = mine_hard_negatives([question], search, corpus, **{"num_negatives": 3, "depth": 6, **settings})
    return list(zip(one.question.negative_passage_ids, one.scores, strict=True))


def test_gold_passages_and_answers_are_left_out_in_title_and_text(corpus):
    search = ranking(1, 4, 0, 2, 3, 5)  # p0 is gold, p1's text and p2's title hold the answer
    assert mined(QUESTION, search, corpus) == [("p4", 8.0), ("p3", 5.0), ("p5", 4.0)]
    assert mined(QUESTION, search, corpus, num_negatives=1) == [("p4", 8.0)]
    assert search.calls[0] == (["who made Kismet?"], 6)


def test_a_questions_own_passage_and_excluded_ones_are_left_out(corpus):
    question = replace(QUESTION, source_passage_id="p4", excluded_passage_ids=("p3",))
    assert mined(question, ranking(1, 4, 0, 2, 3, 5), corpus) == [("p5", 4.0)]


def test_a_regular_expression_is_an_answer_too(corpus):
    by_regex = Question("q", "when?", (), (), r"19\d\d")
    assert mined(by_regex, ranking(0, 1, 2, 3, 4, 5), corpus) == [("p2", 7.0), ("p4", 5.0), ("p5", 4.0)]
    either = Question("q", "what?", ("fate",), (), r"19\d\d")
    assert mined(either, ranking(0, 1, 2, 3, 4, 5), corpus) == [("p2", 7.0), ("p5", 4.0)]
    assert holds_answer(PASSAGES[4], either)
    assert holds_answer(PASSAGES[3], either)


def test_the_first_ranks_can_be_left_out(corpus):
    search = ranking(4, 0, 3, 5, 1, 2)
    assert mined(QUESTION, search, corpus, skip_top=1) == [("p3", 7.0), ("p5", 6.0)]
    assert mined(QUESTION, search, corpus, skip_top=3, num_negatives=2) == [("p5", 6.0)]


def test_every_question_is_kept_in_order_whatever_is_found(corpus):
    questions = [Question(f"q{number}", "?", ("minnelli",), ("p0",), None, ("p5",)) for number in range(5)]
    search = ranking(0, 1, 3)  # then nothing
    found = mine_hard_negatives(questions, search, corpus, num_negatives=2, depth=5, batch_size=2)
    assert [one.question.id for one in found] == [f"q{number}" for number in range(5)]
    assert {one.question.negative_passage_ids for one in found} == {("p3",)}  # in place of those that came
    assert [len(questions) for questions, _ in search.calls] == [2, 2, 1]
    nothing = mine_hard_negatives(questions[:1], ranking(), corpus, num_negatives=2, depth=5)
    assert (nothing[0].question.negative_passage_ids, nothing[0].scores) == ((), ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": 0}, "num_negatives of at least 1 and skip_top of at least 0, got 0 and 0"),
        ({"skip_top": -1}, "num_negatives of at least 1 and skip_top of at least 0, got 3 and -1"),
        ({"depth": 4, "skip_top": 2}, r"depth: expected at least skip_top \+ num_negatives = 5 and .*, got 4"),
        ({"depth": 7}, "at most the 6 passages of films, got 7"),
    ],
)
def test_settings_that_cannot_give_negatives_are_refused(settings, message, corpus):
    with pytest.raises(ConfigError, match=message):
        mined(QUESTION, ranking(1), corpus, **settings)


def test_dense_search_finds_the_encoders_nearest(tiny_encoder, tiny_world):
    torch.manual_seed(0)
    encoder = tiny_encoder(dropout=0.3).train()
    corpus = PassageCorpus.read(tiny_world.passages)
    tokens = PassageTokens(encoder=encoder, corpus=corpus)
    vectors_ND = torch.cat(list(encode_passages(encoder, tokens, range(24), progress=False)))
    questions = [question.question for question in read_questions(tiny_world.train)]
    scores_BK, ids_BK = dense_search(encoder, ExactIndex(vectors_ND))(questions, 4)
    assert encoder.query.training  # as it came
    encoder.eval()
    for row, text in enumerate(questions):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            one = vectors_ND @ encoder.query.backbone(ids).last_hidden_state.mean(dim=1)[0]
        one = one / float(one[ids_BK[row, 0]] / scores_BK[row, 0])  # the tower scales its vectors to length 1
        best = one.topk(4)
        assert ids_BK[row].tolist() == best.indices.tolist()
        torch.testing.assert_close(scores_BK[row], best.values)


def test_dense_search_needs_a_tokenizer(tiny_encoder):
    encoder = tiny_encoder()
    encoder.tokenizer = None
    with pytest.raises(ConfigError, match="this encoder has no tokenizer: give one when loading it"):
        dense_search(encoder, ExactIndex(torch.eye(16)))


def test_a_mined_file_is_read_back_with_its_other_fields(tmp_path, corpus):
    path = tmp_path / "deep" / "mined.jsonl.gz"
    record = {"id": "q", "question": "who made Kismet?", "answers": ["minnelli"], "positive_passage_ids": ["p0"]}
    record |= {"title": "Kismet", "negative_passage_ids": ["p5"]}
    found = mine_hard_negatives([QUESTION], ranking(4, 3), corpus, num_negatives=2, depth=6)
    write_mined(path, [record], found)
    assert read_questions(path, corpus=corpus) == [found[0].question]
    plain = tmp_path / "mined.jsonl"
    write_mined(plain, [record], found)
    assert json.loads(plain.read_text()) == record | {
        "negative_passage_ids": ["p4", "p3"],
        "negative_scores": [9.0, 8.0],
    }
    with pytest.raises(DataError, match="expected the 1 records that the questions were read from, in order, came 1"):
        write_mined(plain, [record | {"id": "other"}], found)
    assert json.loads(plain.read_text())["id"] == "q"
