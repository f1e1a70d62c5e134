"""What a training example is, for each kind of objective, and how examples become a batch.

An example is drawn at (epoch, position) from a generator seeded by that place alone, so a resumed run meets the same
examples as an uninterrupted one.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.warmup import inverse_cloze, rare_words, span_copy, span_repeat, substitute_entities
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.text.normalise import contains_answer
from rag_lightning.types import Passage, Question, QuestionBatch, TokenBatch
from rag_lightning.utils.seeding import rng_at

ExampleKind = Literal["questions", "gold_passages", "inverse_cloze", "denoising", "salient_spans", "random_spans"]
# of these, questions are asked of the corpus: passages are retrieved for them, and a loss on those teaches
RETRIEVED_FOR: tuple[ExampleKind, ...] = ("questions", "salient_spans", "random_spans")


@dataclass(frozen=True)
class Example:
    """A question, the answer to train on, and, for warm-up objectives, the passage that holds it.

    Attributes:
        question: The record.
        answer: Target text; empty where none is known.
        positive_row: Number of a gold passage, ``-1`` where none is known.
        passage: The passage to read or to contrast, possibly altered; None where retrieval will find passages.
        negative_rows: Numbers of the hard negatives to contrast it with.
        forbidden_row: Number of the passage that must not be retrieved, the question being made of it; ``-1`` for none.
        excluded_rows: Numbers of the others that must not be retrieved: they are no answer.
    """

    question: Question
    answer: str
    positive_row: int = -1
    passage: Passage | None = None
    negative_rows: tuple[int, ...] = ()
    forbidden_row: int = -1
    excluded_rows: tuple[int, ...] = ()


@runtime_checkable
class Examples(Protocol):
    """A sequence of examples, some of them drawn anew at each visit."""

    def __len__(self) -> int:
        """How many there are in an epoch."""
        ...

    def draw(self, position: int, rng: random.Random) -> Example:
        """Returns the example at a position; ``rng`` decides what is random in it."""
        ...


class QuestionExamples:
    """Questions as they are; passages are retrieved, or none are read.

    A passage that was made of a question (its ``source_passage_id``) is forbidden to it, and so are those that it
    excludes.

    Args:
        questions: The records.
        corpus: To number gold passages; None without retrieval.
        sample_answers: Draw one of the accepted answers at each visit, instead of the first.
        with_passage: Attach a gold passage (drawn where there are several); every question must have one.
        num_negatives: Attach so many of the question's hard negatives, drawn anew at each visit. A question that has
            fewer is filled up with random passages of the corpus that are not gold for it; such a passage may hold the
            answer by chance, which a mined one does not.

    Raises:
        DataError: ``with_passage`` and a question without a gold passage; hard negatives asked for and no question has
            any, or the corpus is too small to fill them up.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        corpus: PassageCorpus | None,
        *,
        sample_answers: bool = False,
        with_passage: bool = False,
        num_negatives: int = 0,
    ) -> None:
        self.questions = questions
        self.corpus = corpus
        self.sample_answers = sample_answers
        self.with_passage = with_passage
        self.num_negatives = num_negatives
        if with_passage:
            bare = next((question.id for question in questions if not question.positive_passage_ids), None)
            if bare is not None:
                raise DataError(
                    f"question {bare!r} has no positive_passage_ids, but this objective reads gold passages: add them, "
                    "or use examples=inverse_cloze, which needs no questions"
                )
        if num_negatives > 0:
            _check_negatives(questions, corpus, num_negatives)

    def __len__(self) -> int:
        return len(self.questions)

    def draw(self, position: int, rng: random.Random) -> Example:
        """Returns the question with an answer and, if asked, a gold passage."""
        question = self.questions[position]
        answers: Sequence[str] = question.answers
        row, passage = -1, None
        if self.corpus is not None and question.positive_passage_ids:
            row = self.corpus.row_of(rng.choice(question.positive_passage_ids))
        if self.with_passage and self.corpus is not None:
            passage = self.corpus[row]
            # with several gold passages, each may hold another of the answers: train on one that can be read there
            held = [answer for answer in answers if contains_answer(f"{passage.title} {passage.text}", [answer])]
            answers = held if held else answers
        answer = (rng.choice(answers) if self.sample_answers else answers[0]) if answers else ""
        forbidden = -1
        if self.corpus is not None and question.source_passage_id is not None:
            forbidden = self.corpus.row_of(question.source_passage_id)
        negatives = self._negatives(question, rng)
        return Example(question, answer, row, passage, negatives, forbidden, self._excluded(question))

    def _excluded(self, question: Question) -> tuple[int, ...]:
        if self.corpus is None:
            return ()
        return tuple(self.corpus.row_of(passage_id) for passage_id in question.excluded_passage_ids)

    def _negatives(self, question: Question, rng: random.Random) -> tuple[int, ...]:
        if self.num_negatives == 0 or self.corpus is None:
            return ()
        known = question.negative_passage_ids
        chosen = rng.sample(known, min(self.num_negatives, len(known)))
        rows = [self.corpus.row_of(passage_id) for passage_id in chosen]
        taken = {*rows, *(self.corpus.row_of(passage_id) for passage_id in question.positive_passage_ids)}
        taken |= set() if question.source_passage_id is None else {self.corpus.row_of(question.source_passage_id)}
        while len(rows) < self.num_negatives:
            row = rng.randrange(len(self.corpus))
            if row not in taken:
                rows.append(row)
                taken.add(row)
        return tuple(rows)


def _check_negatives(questions: Sequence[Question], corpus: PassageCorpus | None, num_negatives: int) -> None:
    if not any(question.negative_passage_ids for question in questions):
        raise DataError(
            f"expected questions with negative_passage_ids, since {num_negatives} hard negatives are asked for, came "
            "none: mine them (rag-lightning mine), or set objective.hard_negatives=0"
        )
    most_gold = max(len(question.positive_passage_ids) for question in questions)
    if corpus is None or len(corpus) < most_gold + num_negatives:
        raise DataError(
            f"expected at least {most_gold + num_negatives} passages to draw {num_negatives} hard negatives beside up "
            f"to {most_gold} gold passages, came {len(corpus) if corpus is not None else 0}: lower "
            "objective.hard_negatives"
        )


class InverseClozeExamples:
    """A sentence of each passage as question, the passage without it as gold passage (Lee et al. 2019).

    Args:
        corpus: The passages; no questions are needed.
        rows: Which of them to read; all by default.
        keep_probability: How often the sentence stays in its passage, so that matching words is learned too.
    """

    def __init__(
        self, corpus: PassageCorpus, *, rows: Sequence[int] | None = None, keep_probability: float = 0.1
    ) -> None:
        self.corpus = corpus
        self.rows: Sequence[int] = rows if rows is not None else range(len(corpus))
        self.keep_probability = keep_probability

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, position: int, rng: random.Random) -> Example:
        """Returns a fresh sentence of the passage."""
        row = self.rows[position]
        passage = self.corpus[row]
        sentence, rest = inverse_cloze(passage, rng, self.keep_probability)
        question = Question(f"cloze-{passage.id}", sentence, ())
        return Example(question, "", row, Passage(passage.id, passage.title, rest))


class DenoisingExamples:
    """Reading practice on gold passages: copy, do not remember.

    Most questions have their rare words renamed alike in passage, question and answer (entity substitution, Longpre
    et al. 2021). Among them are examples that repeat a span of the passage, or restore a masked one (span infilling,
    Lewis et al. 2019). A reader trained without renaming memorises answers and fails on unseen passages.

    Args:
        questions: Questions with gold passages.
        corpus: The passages.
        rows: Which of them to take spans from; all by default. New names are drawn from the words of all passages: of
            the others no sentence is read, only the list of their words, which the tokenizer holds too.
        sample_answers: Draw one of the accepted answers at each visit, instead of the first. The first is the easier
            lesson by far: a reader that is to name any of five actors learns a mixture of five names.
        rename_share: Share of renamed examples.
        copy_share: Share of span examples among all.
        infill_share: Share of masked spans among the span examples; the others repeat a span.
        rare_count: A word is rare when it occurs at most this often in passages and questions together, so that the
            words that ask (who, when) keep their meaning.
        num_names: How many words serve as new names; all by default.
        mask: The hole's sign.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        corpus: PassageCorpus,
        *,
        rows: Sequence[int] | None = None,
        sample_answers: bool = False,
        rename_share: float = 0.9,
        copy_share: float = 0.3,
        infill_share: float = 0.0,
        rare_count: int = 20,
        num_names: int | None = None,
        mask: str = "<mask>",
    ) -> None:
        shares = {"rename_share": rename_share, "copy_share": copy_share, "infill_share": infill_share}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}: expected a share from 0 to 1, got {share}")
        self.golden = QuestionExamples(questions, corpus, sample_answers=sample_answers, with_passage=True)
        self.corpus = corpus
        self.rows: Sequence[int] = rows if rows is not None else range(len(corpus))
        self.rename_share = rename_share
        self.copy_share = copy_share
        self.infill_share = infill_share
        self.mask = mask
        asked = [question.question for question in questions]
        self._rare = frozenset(rare_words([*_texts(corpus[row] for row in self.rows), *asked], rare_count))
        names = rare_words([*_texts(corpus), *asked], rare_count)
        self.pool = names if num_names is None else rng_at(0, "names").sample(names, min(num_names, len(names)))

    def __len__(self) -> int:
        return len(self.golden)

    def draw(self, position: int, rng: random.Random) -> Example:
        """Returns a question as it is, a renamed one, or a span of a random passage."""
        if rng.random() < self.copy_share:
            return self._copied(rng)
        example = self.golden.draw(position, rng)
        return self._renamed(example, rng) if rng.random() < self.rename_share else example

    def _copied(self, rng: random.Random) -> Example:
        row = rng.choice(self.rows)
        passage = self.corpus[row]
        if rng.random() < self.rename_share:
            passage, _, _ = self._rename(passage, "", "", rng)  # before a hole is cut: its sign is no word
        if rng.random() < self.infill_share:
            question, answer = span_copy(passage, rng, mask=self.mask)
        else:
            question, answer = span_repeat(passage, rng)
        return Example(Question(f"span-{passage.id}", question, (answer,)), answer, row, passage)

    def _renamed(self, example: Example, rng: random.Random) -> Example:
        assert example.passage is not None
        record = example.question
        passage, question, answer = self._rename(example.passage, record.question, example.answer, rng)
        renamed = Question(record.id, question, (answer,), record.positive_passage_ids)
        return Example(renamed, answer, example.positive_row, passage)

    def _rename(self, passage: Passage, question: str, answer: str, rng: random.Random) -> tuple[Passage, str, str]:
        joined = f"{passage.title}\n{passage.text}"
        text, question, answer = substitute_entities(joined, question, answer, self._rare.__contains__, self.pool, rng)
        title, _, body = text.partition("\n")
        return Passage(passage.id, title, body), question, answer


def _texts(passages: Iterable[Passage]) -> Iterator[str]:
    return (f"{passage.title} {passage.text}" for passage in passages)


def _forbidden(examples: Sequence[Example]) -> Int[Tensor, "B *F"]:
    """Returns what must not be retrieved for each example, ``-1`` for none; ``[B, F]`` where some has excluded rows."""
    own_B = torch.tensor([example.forbidden_row for example in examples])
    width = max(len(example.excluded_rows) for example in examples)
    if width == 0:
        return own_B
    filled = [[*example.excluded_rows, *[-1] * (width - len(example.excluded_rows))] for example in examples]
    return torch.cat([own_B[:, None], torch.tensor(filled)], dim=1)


class Collator:
    """Turns examples into a :class:`~rag_lightning.types.QuestionBatch`.

    Args:
        model: Knows both vocabularies.
        assembler: Joins an example's own passage to its question; None without reading passages.
        passage_tokens: Writes an example's own passage, and hard negatives, for the passage tower; None without
            contrasting.
        mask: The sign of a hole in these examples' questions, where they have holes: a query encoder whose tokenizer
            has another mask token reads that.
    """

    def __init__(
        self,
        model: RagModel,
        *,
        assembler: ContextAssembler | None = None,
        passage_tokens: PassageTokens | None = None,
        mask: str | None = None,
    ) -> None:
        self.model = model
        self.assembler = assembler
        self.passage_tokens = passage_tokens
        self.mask = mask

    def __call__(self, examples: Sequence[Example], weights: Sequence[float]) -> QuestionBatch:
        """Returns the batch; ``weights`` is 0 on fillers."""
        texts = [example.question.question for example in examples]
        passages = [example.passage for example in examples if example.passage is not None]
        prompt = self.model.prompt_tokens(texts)
        contexts = own = None
        if len(passages) == len(examples) and self.assembler is not None:
            contexts = self.assembler.contexts_of(passages, prompt)
        if len(passages) == len(examples) and self.passage_tokens is not None:
            own = self.passage_tokens.batch_of(passages)
        negative_rows_BM = np.asarray([example.negative_rows for example in examples], dtype=np.int64)
        negatives = None
        if negative_rows_BM.size > 0 and self.passage_tokens is not None:
            negatives = self.passage_tokens.batch(negative_rows_BM.reshape(-1))
        forbidden = _forbidden(examples)
        return QuestionBatch(
            questions=tuple(example.question for example in examples),
            query=self._query(texts),
            prompt=prompt,
            labels=self.model.target_tokens([example.answer for example in examples]),
            positive_ids=torch.tensor([example.positive_row for example in examples]),
            weights_B=torch.tensor(list(weights), dtype=torch.float32),
            contexts=contexts,
            passages=own,
            negatives=negatives,
            negative_ids_BM=torch.from_numpy(negative_rows_BM) if negatives is not None else None,
            forbidden_ids=forbidden if bool((forbidden >= 0).any()) else None,
        )

    def _query(self, texts: Sequence[str]) -> TokenBatch | None:
        if self.model.encoder is None:
            return None
        own = getattr(self.model.encoder.tokenizer, "mask_token", None)
        if self.mask is not None and own is not None and own != self.mask:
            texts = [text.replace(self.mask, own) for text in texts]
        return self.model.query_tokens(texts)
