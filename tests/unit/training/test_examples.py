"""Training examples: drawn by seed, epoch and position alone, in the shares that were asked for."""

import random
from dataclasses import replace

import pytest
import torch

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.training.examples import Collator, DenoisingExamples, InverseClozeExamples, QuestionExamples
from rag_lightning.training.loader import BatchLoader
from rag_lightning.types import Question


@pytest.fixture
def corpus(tiny_world):
    return PassageCorpus.read(tiny_world.passages)


@pytest.fixture
def questions(tiny_world, corpus):
    return read_questions(tiny_world.train, corpus=corpus)


def drawn(examples, count, seed=0):
    return [examples.draw(place % len(examples), random.Random(seed * 10_000 + place)) for place in range(count)]


def test_the_first_answer_is_the_target_unless_answers_are_sampled(questions, corpus):
    plain = drawn(QuestionExamples(questions, corpus), len(questions))
    assert [example.answer for example in plain] == [question.answers[0] for question in questions]
    assert [example.positive_row for example in plain] == list(range(13))
    assert all(example.passage is None for example in plain)
    sampled = drawn(QuestionExamples(questions, corpus, sample_answers=True), 400)
    seconds = sum(example.answer == example.question.answers[1] for example in sampled)
    assert 150 < seconds < 250  # half of 400, 5 standard deviations
    assert all(example.answer in example.question.answers for example in sampled)


def test_the_passage_made_of_a_question_is_forbidden_to_it(questions, corpus, tiny_model):
    made = [replace(question, source_passage_id=f"film-{20 - place}") for place, question in enumerate(questions[:3])]
    examples = QuestionExamples([*made, questions[3]], corpus)
    assert [example.forbidden_row for example in drawn(examples, 4)] == [20, 19, 18, -1]
    batch = Collator(tiny_model())(drawn(examples, 4), [1.0] * 4)
    assert batch.forbidden_ids.tolist() == [20, 19, 18, -1]
    assert Collator(tiny_model())(drawn(QuestionExamples(questions, corpus), 4), [1.0] * 4).forbidden_ids is None
    closed_book = QuestionExamples(made, None)
    assert [example.forbidden_row for example in drawn(closed_book, 3)] == [-1] * 3


def test_the_passage_made_of_a_question_is_no_negative_of_it(corpus):
    question = Question("q", "?", ("a",), ("film-0",), negative_passage_ids=("film-1",), source_passage_id="film-2")
    examples = QuestionExamples([question], corpus, num_negatives=20)
    assert all(2 not in example.negative_rows for example in drawn(examples, 20))


def test_gold_passages_are_attached_and_drawn_where_there_are_several(questions, corpus):
    both = [Question("q", "?", ("a",), ("film-3", "film-8"))]
    rows = {example.positive_row for example in drawn(QuestionExamples(both, corpus, with_passage=True), 40)}
    assert rows == {3, 8}
    for example in drawn(QuestionExamples(questions, corpus, with_passage=True), 13):
        assert example.passage == corpus[example.positive_row]


def test_a_question_without_gold_passage_is_refused_by_name(corpus):
    bare = [Question("fine", "?", ("a",), ("film-3",)), Question("bare", "?", ("a",))]
    for make in (
        lambda: QuestionExamples(bare, corpus, with_passage=True),
        lambda: DenoisingExamples(bare, corpus),
    ):
        with pytest.raises(DataError, match="question 'bare' has no positive_passage_ids.*inverse_cloze"):
            make()


def test_regex_questions_have_no_target_text(corpus):
    (example,) = drawn(QuestionExamples([Question("q", "?", (), (), "A|B")], corpus), 1)
    assert example.answer == ""
    assert example.positive_row == -1


def with_negatives(questions, *ids):
    """Hard negatives for the first questions, one list for each."""
    first = [replace(question, negative_passage_ids=tuple(own)) for question, own in zip(questions, ids, strict=False)]
    return [*first, *questions[len(ids) :]]


def test_hard_negatives_are_drawn_anew_at_each_visit(questions, corpus):
    asked = with_negatives(questions, ["film-5", "film-6", "film-7"])[:1]
    examples = QuestionExamples(asked, corpus, with_passage=True, num_negatives=2)
    visits = [example.negative_rows for example in drawn(examples, 60)]
    assert {frozenset(rows) for rows in visits} == {frozenset(pair) for pair in ([5, 6], [5, 7], [6, 7])}
    assert visits == [example.negative_rows for example in drawn(examples, 60)]  # by the generator alone
    assert all(example.negative_rows == () for example in drawn(QuestionExamples(asked, corpus, with_passage=True), 3))


def test_missing_hard_negatives_are_filled_with_passages_that_are_not_gold(questions, corpus):
    asked = [replace(questions[0], positive_passage_ids=("film-0", "film-3")), questions[1]]
    asked = with_negatives(asked, ["film-5"])
    examples = QuestionExamples(asked, corpus, with_passage=True, num_negatives=3)
    seen = {0: set(), 1: set()}
    for place, example in enumerate(drawn(examples, 400)):
        rows = example.negative_rows
        assert len(set(rows)) == 3
        assert (rows[0] == 5) or place % 2 == 1
        seen[place % 2].update(rows)
    assert seen[0] == set(range(24)) - {0, 3}
    assert seen[1] == set(range(24)) - {1}
    whole = QuestionExamples(asked[:1], corpus, with_passage=True, num_negatives=22)
    assert set(whole.draw(0, random.Random(0)).negative_rows) == seen[0]  # ends where all but the gold ones are drawn


def test_hard_negatives_leave_the_other_draws_as_they_are(questions, corpus):
    asked = with_negatives(questions, ["film-20"])
    plain = drawn(QuestionExamples(asked, corpus, sample_answers=True, with_passage=True), 13)
    mined = drawn(QuestionExamples(asked, corpus, sample_answers=True, with_passage=True, num_negatives=2), 13)
    assert [replace(example, negative_rows=()) for example in mined] == plain


def test_hard_negatives_that_cannot_be_drawn_are_refused(questions, corpus):
    with pytest.raises(DataError, match=r"questions with negative_passage_ids, since 2 hard .*rag-lightning mine"):
        QuestionExamples(questions, corpus, with_passage=True, num_negatives=2)
    asked = with_negatives(questions, ["film-5"])
    with pytest.raises(
        DataError, match=r"at least 25 passages to draw 24 hard negatives beside up to 1 gold .* came 24"
    ):
        QuestionExamples(asked, corpus, with_passage=True, num_negatives=24)


def test_inverse_cloze_asks_for_the_passage_that_a_sentence_was_taken_from(corpus):
    for example in drawn(InverseClozeExamples(corpus, keep_probability=0.0), 200):
        original = corpus[example.positive_row]
        assert example.question.question in original.text
        assert example.question.question not in example.passage.text
        assert example.passage.title == original.title
    kept = drawn(InverseClozeExamples(corpus, keep_probability=0.5), 400)
    assert 150 < sum(example.question.question in example.passage.text for example in kept) < 250


def kind_of(example, by_id):
    if example.question.id.startswith("span-"):
        return "copied"
    return "plain" if example.question.question == by_id[example.question.id].question else "renamed"


@pytest.mark.parametrize(("rename", "copy"), [(0.5, 0.3), (0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.6)])
def test_denoising_shares_are_respected(rename, copy, questions, corpus):
    examples = DenoisingExamples(questions, corpus, rename_share=rename, copy_share=copy)
    by_id = {question.id: question for question in questions}
    count = 600
    kinds = [kind_of(example, by_id) for example in drawn(examples, count)]
    for kind, share in (("copied", copy), ("renamed", (1 - copy) * rename), ("plain", (1 - copy) * (1 - rename))):
        margin = 5 * (share * (1 - share) / count) ** 0.5
        assert abs(kinds.count(kind) / count - share) <= margin, kind


def test_renamed_examples_can_still_be_read_and_no_longer_remembered(questions, corpus):
    by_id = {question.id: question for question in questions}
    examples = DenoisingExamples(questions, corpus, rename_share=1.0, copy_share=0.0)
    for example in drawn(examples, 100):
        record = by_id[example.question.id]
        assert example.answer in example.passage.text
        assert example.passage.title in example.question.question
        assert example.answer not in record.answers
        assert example.question.answers == (example.answer,)
        assert "<mask>" not in example.question.question


def test_span_examples_repeat_or_restore_words_of_their_passage(questions, corpus):
    for example in drawn(DenoisingExamples(questions, corpus, copy_share=1.0, infill_share=1.0, mask="[HOLE]"), 100):
        assert "[HOLE]" in example.question.question
        assert example.question.question.replace("[HOLE]", example.answer) in example.passage.text
        assert example.passage.id == corpus[example.positive_row].id
    for example in drawn(DenoisingExamples(questions, corpus, copy_share=1.0), 100):
        assert example.answer == example.question.question
        assert example.answer in f"{example.passage.title} {example.passage.text}"
    both = drawn(DenoisingExamples(questions, corpus, copy_share=1.0, infill_share=0.5), 400)
    assert 150 < sum("<mask>" in example.question.question for example in both) < 250


def test_the_first_answer_is_trained_on_unless_answers_are_sampled(corpus):
    question = Question("q", "who?", tuple(corpus[0].text.split()[:2]), (corpus[0].id,))
    for sample, expected in ((False, {question.answers[0]}), (True, set(question.answers))):
        examples = DenoisingExamples([question], corpus, sample_answers=sample, copy_share=0.0, rename_share=0.0)
        assert {example.answer for example in drawn(examples, 50)} == expected


def test_new_names_come_from_a_small_set_that_is_always_the_same(questions, corpus):
    few, again = (DenoisingExamples(questions, corpus, num_names=8).pool for _ in range(2))
    assert few == again
    assert len(few) == 8
    assert set(few) < set(DenoisingExamples(questions, corpus).pool)


@pytest.mark.parametrize("name", ["rename_share", "copy_share", "infill_share"])
def test_shares_are_shares(name, questions, corpus):
    with pytest.raises(ConfigError, match=f"{name}: expected a share from 0 to 1, got 1.5"):
        DenoisingExamples(questions, corpus, **{name: 1.5})


def test_draws_depend_on_seed_epoch_and_position_alone(questions, corpus):
    def batches(**settings):
        examples = DenoisingExamples(questions, corpus)
        loader = BatchLoader(examples, lambda drawn, weights: list(drawn), batch_size=4, shuffle=True, **settings)
        return [example for batch in loader for example in batch]

    once = batches(seed=1)
    assert once == batches(seed=1)
    assert once != batches(seed=2)
    assert once != batches(seed=1, current_epoch=lambda: 1)


def test_a_batch_holds_what_the_examples_say(questions, corpus, tiny_model):
    model = tiny_model()
    assembler = ContextAssembler(corpus=corpus, tokenizer=model.generator.tokenizer, prompt=model.prompt)
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    examples = drawn(QuestionExamples(questions, corpus, with_passage=True), 3)
    batch = Collator(model, assembler=assembler, passage_tokens=tokens)(examples, [1.0, 1.0, 0.0])
    assert batch.positive_ids.tolist() == [0, 1, 2]
    assert batch.weights_B.tolist() == [1.0, 1.0, 0.0]
    decode = model.generator.tokenizer.batch_decode
    assert decode(batch.labels, skip_special_tokens=True) == [example.answer.lower() for example in examples]
    assert decode(batch.contexts.input_ids, skip_special_tokens=True) == [
        f"{e.passage.title} / {e.passage.text} // {e.question.question}".lower() for e in examples
    ]
    assert model.encoder.tokenizer.batch_decode(batch.passages.input_ids, skip_special_tokens=True) == [
        f"{e.passage.title} {e.passage.text}".lower() for e in examples
    ]
    assert batch.negatives is None
    assert batch.negative_ids_BM is None
    bare = Collator(model, assembler=assembler)(drawn(QuestionExamples(questions, corpus), 2), [1.0, 1.0])
    assert bare.contexts is None
    assert bare.passages is None
    assert torch.equal(bare.query.input_ids, model.query_tokens([q.question for q in questions[:2]]).input_ids)


def test_a_batch_holds_the_hard_negatives_of_each_question_side_by_side(questions, corpus, tiny_model):
    model = tiny_model()
    tokens = PassageTokens(encoder=model.encoder, corpus=corpus)
    asked = with_negatives(questions, ["film-20", "film-21"], ["film-22", "film-23"])[:2]
    examples = drawn(QuestionExamples(asked, corpus, with_passage=True, num_negatives=2), 2)
    batch = Collator(model, passage_tokens=tokens)(examples, [1.0, 1.0])
    assert batch.negative_ids_BM.tolist() == [list(example.negative_rows) for example in examples]
    assert set(batch.negative_ids_BM[0].tolist()) == {20, 21}
    texts = model.encoder.tokenizer.batch_decode(batch.negatives.input_ids, skip_special_tokens=True)
    rows = [row for example in examples for row in example.negative_rows]
    assert texts == [f"{corpus[row].title} {corpus[row].text}".lower() for row in rows]
    assert batch.to("cpu").negatives.input_ids.equal(batch.negatives.input_ids)
