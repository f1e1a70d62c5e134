"""Examples of retrieval-augmented pre-training: masked text as question, what was masked as answer, passages retrieved.

No labelled question is needed. Unlike the warm-up examples (:mod:`rag_lightning.training.examples`), these bring no
passage of their own: a marginal objective retrieves for them, so that the retriever learns what helps the reader fill
the hole (REALM, Guu et al. 2020, §3.4). The passage that a question was made of holds the answer in the same words;
REALM keeps it from being retrieved, and so does ``forbid_source``, so that matching a sentence with itself is not what
is learned. A corpus that says everything only once then leaves nothing to be found: there, allow it.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from rag_lightning.corpora.masking import DEFAULT_KINDS, corrupt_spans, mask_salient_span
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.salient import SpanKind
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.sentences import sentences
from rag_lightning.training.examples import Example, Examples
from rag_lightning.types import Passage, Question

PretrainingKind = Literal["salient_spans", "random_spans"]
Unit = Literal["sentence", "passage"]
_TRIES = 100  # passages without anything to mask before it is called an error


class MaskedExamples(ABC):
    """What both kinds share: a passage of the corpus for each position, masked anew at each visit.

    Args:
        corpus: The passages.
        rows: Which of them to mask; all by default. Retrieval finds others too.
        mask: What stands for a hole: a token that reader and retriever know.
        forbid_source: Keep the passage that a question was made of from being retrieved for it.
    """

    def __init__(
        self, corpus: PassageCorpus, *, rows: Sequence[int] | None = None, mask: str, forbid_source: bool = True
    ) -> None:
        self.corpus = corpus
        self.rows: Sequence[int] = rows if rows is not None else range(len(corpus))
        self.mask = mask
        self.forbid_source = forbid_source

    def __len__(self) -> int:
        return len(self.rows)

    def draw(self, position: int, rng: random.Random) -> Example:
        """Returns a masked text of the passage; of a random one where that has nothing to mask.

        Raises:
            DataError: Nothing to mask in many passages running.
        """
        row = self.rows[position]
        for _ in range(_TRIES):
            passage = self.corpus[row]
            masked = self._masked(passage, rng)
            if masked is not None:
                question = Question(f"masked-{passage.id}", masked[0], (masked[1],))
                return Example(question, masked[1], forbidden_row=row if self.forbid_source else -1)
            row = rng.choice(self.rows)
        raise DataError(
            f"{self.corpus.source}: expected passages to mask something in, came {_TRIES} running without, the last of "
            f"them {passage.id!r}: {passage.text[:80]!r}. Salient spans need names in mixed case, or dates; "
            "objective.examples=random_spans needs only words."
        )

    @abstractmethod
    def _masked(self, passage: Passage, rng: random.Random) -> tuple[str, str] | None:
        """Returns question and answer; None where nothing can be masked."""


class SalientSpanExamples(MaskedExamples):
    """A sentence without one of its names or dates (:func:`~rag_lightning.corpora.masking.mask_salient_span`).

    Args:
        corpus: The passages.
        rows: Which of them to mask.
        mask: What stands for the hole.
        forbid_source: Keep the passage that a question was made of from being retrieved for it.
        kinds: Which spans: ``date``, ``entity``, ``number``.
        with_title: Write the title before the sentence, unless the answer is in it.
    """

    def __init__(
        self,
        corpus: PassageCorpus,
        *,
        rows: Sequence[int] | None = None,
        mask: str = "<mask>",
        forbid_source: bool = True,
        kinds: Sequence[SpanKind] = DEFAULT_KINDS,
        with_title: bool = False,
    ) -> None:
        super().__init__(corpus, rows=rows, mask=mask, forbid_source=forbid_source)
        self.kinds = tuple(kinds)
        self.with_title = with_title

    def _masked(self, passage: Passage, rng: random.Random) -> tuple[str, str] | None:
        return mask_salient_span(passage, rng, mask=self.mask, kinds=self.kinds, with_title=self.with_title)


class RandomSpanExamples(MaskedExamples):
    """A text without some spans of words (:func:`~rag_lightning.corpora.masking.corrupt_spans`), one sign between them.

    Args:
        corpus: The passages.
        rows: Which of them to mask.
        mask: What stands for a hole, and between the parts of the answer.
        forbid_source: Keep the passage that a question was made of from being retrieved for it.
        unit: Mask in a ``sentence`` or in the whole ``passage``, whose question and answer may be longer than
            ``prompt.max_tokens / 2`` and ``max_target_tokens``, and are then cut.
        mask_share: Share of words masked.
        mean_span_words: Mean length of a span.

    Raises:
        ConfigError: An unknown unit.
    """

    def __init__(
        self,
        corpus: PassageCorpus,
        *,
        rows: Sequence[int] | None = None,
        mask: str = "<mask>",
        forbid_source: bool = True,
        unit: Unit = "sentence",
        mask_share: float = 0.15,
        mean_span_words: float = 3.0,
    ) -> None:
        super().__init__(corpus, rows=rows, mask=mask, forbid_source=forbid_source)
        if unit not in get_args(Unit):
            raise ConfigError(f"data.random_spans.unit: expected sentence or passage, came {unit!r}")
        self.unit: Unit = unit
        self.mask_share = mask_share
        self.mean_span_words = mean_span_words

    def _masked(self, passage: Passage, rng: random.Random) -> tuple[str, str] | None:
        texts = sentences(passage.text) if self.unit == "sentence" else [passage.text.strip()]
        text = rng.choice(texts) if texts else ""
        return corrupt_spans(
            text, rng, mask=self.mask, mask_share=self.mask_share, mean_span_words=self.mean_span_words
        )


def pretraining_examples(
    kind: PretrainingKind,
    corpus: PassageCorpus,
    *,
    rows: Sequence[int],
    tokenizer_mask: str | None,
    settings: Mapping[str, Any],
) -> Examples:
    """Returns the examples that an objective names.

    Args:
        kind: Which.
        corpus: The passages.
        rows: Which of them to mask.
        tokenizer_mask: The reader's mask token, if it has one.
        settings: The other arguments; a ``mask`` among them that is not None goes before the tokenizer's.

    Raises:
        ConfigError: There is no sign for a hole.
    """
    chosen = {name: value for name, value in settings.items() if not (name == "mask" and value is None)}
    if "mask" not in chosen and tokenizer_mask is None:
        raise ConfigError(
            f"objective.examples={kind}: expected a reader whose tokenizer has a mask token, came one without: set "
            f"data.{kind}.mask to a token that it knows, such as <extra_id_0> for T5"
        )
    maker: type[SalientSpanExamples | RandomSpanExamples]
    maker = SalientSpanExamples if kind == "salient_spans" else RandomSpanExamples
    return maker(corpus, rows=rows, **{"mask": tokenizer_mask, **chosen})
