"""What a task is made of: how its file is read, which head judges, what is counted.

======================  =========================================  ===========================================
kind                    record                                     head
======================  =========================================  ===========================================
``classification``      text, perhaps a context, and a class       :mod:`rag_lightning.heads.classification`
``tagging``             words with a BIO tag each                  :mod:`rag_lightning.heads.token_classification`
``relation``            a text with two entities and a relation    :mod:`rag_lightning.heads.relation`
======================  =========================================  ===========================================
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

from rag_lightning.corpora.labelled import LabelSet, divided, read_labelled
from rag_lightning.corpora.relations import read_relations
from rag_lightning.corpora.tagged import read_spans, read_tagged
from rag_lightning.errors import ConfigError
from rag_lightning.heads.classification import ClassificationHead, HeadPooling
from rag_lightning.heads.reading import TaskExample, query_text
from rag_lightning.heads.relation import RelationHead
from rag_lightning.heads.token_classification import TokenClassificationHead
from rag_lightning.text.tagging import bio_spans
from rag_lightning.types import LabelledText, Passage, TaggedSentence

TaskKind = Literal["classification", "tagging", "relation"]
FileForm = Literal["labelled", "tagged", "spans", "relations"]
READERS: Mapping[FileForm, Callable[..., Sequence[TaskExample]]] = {
    "labelled": read_labelled,
    "tagged": read_tagged,
    "spans": read_spans,
    "relations": read_relations,
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task: its files, its head, its metrics.

    Attributes:
        name: Of its head, and in figures.
        kind: What is judged.
        train: File of labelled examples.
        validation: The same; None for no validation.
        test: The same; None for no test.
        form: How the files are written; see :mod:`rag_lightning.corpora.labelled`.
        fields: The form's own settings: which field holds what, names of classes.
        divide: Shares of one file (``train``) to train, validate and test on, where a dataset has no more.
        validation_share: Of the training file, held out to validate on where a dataset has no file for it.
        pooling: Of a classification head.
        dropout: On what the head sees.
        scoring: ``semeval`` for relations that come in two directions and an ``Other``; else macro-F1 and accuracy.
        monitor: The metric that chooses a checkpoint and rewards a walk.
    """

    name: str
    kind: TaskKind
    train: str
    validation: str | None = None
    test: str | None = None
    form: FileForm = "labelled"
    fields: Mapping[str, Any] = field(default_factory=dict)
    divide: Sequence[float] | None = None
    validation_share: float = 0.0
    pooling: HeadPooling = "cls"
    dropout: float = 0.1
    scoring: Literal["plain", "semeval"] = "plain"
    monitor: str = "accuracy"

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, TaskKind), ("form", self.form, FileForm)):
            if value not in get_args(known):
                raise ConfigError(f"task.{what}: expected one of {', '.join(get_args(known))}, got {value!r}")
        tags = self.form in ("tagged", "spans")
        if tags != (self.kind == "tagging") or (self.form == "relations") != (self.kind == "relation"):
            raise ConfigError(
                f"task.form={self.form}: does not fit task.kind={self.kind}; expected labelled for classification, "
                "tagged or spans for tagging, relations for relation"
            )
        if self.divide is not None and (self.validation is not None or self.test is not None):
            raise ConfigError("task.divide: expected one file (task.train) to divide, got validation or test too")
        if self.validation_share != 0 and (self.divide is not None or self.validation is not None):
            raise ConfigError("task.validation_share: expected no task.validation and no task.divide with it")

    def read(self) -> dict[str, list[TaskExample]]:
        """Returns the examples of each split that there is.

        Raises:
            DataError: Names file, line and field.
        """
        reader = READERS[self.form]
        if self.divide is not None:
            if len(self.divide) != len(SPLITS):
                raise ConfigError(f"task.divide: expected three shares, got {list(self.divide)}")
            parts = divided(list(reader(self.train, **self.fields)), self.divide)
            return {split: list(part) for split, part in zip(SPLITS, parts, strict=True)}
        paths = {"train": self.train, "validation": self.validation, "test": self.test}
        splits = {split: list(reader(path, **self.fields)) for split, path in paths.items() if path is not None}
        if self.validation_share != 0:
            shares = (1 - self.validation_share, self.validation_share)
            splits["train"], splits["validation"] = map(list, divided(splits["train"], shares))
        return splits

    def head(self, width: int, num_labels: int) -> nn.Module:
        """Returns a head of fresh weights."""
        if self.kind == "tagging":
            return TokenClassificationHead(width=width, num_labels=num_labels, dropout=self.dropout)
        if self.kind == "relation":
            return RelationHead(width=width, num_labels=num_labels, dropout=self.dropout)
        return ClassificationHead(width=width, num_labels=num_labels, pooling=self.pooling, dropout=self.dropout)

    def labels(self, train: Sequence[TaskExample]) -> LabelSet:
        """Returns the labels that the training examples bear."""
        if self.kind == "tagging":
            return LabelSet.from_sentences(one for one in train if isinstance(one, TaggedSentence))
        return LabelSet.from_records(one for one in train if not isinstance(one, TaggedSentence))


def as_passage(example: TaskExample) -> Passage:
    """Returns a labelled example as a passage: what is searched is its text, what is read its title too, the label.

    >>> as_passage(TaggedSentence("1", ("Anna", "sings"), ("B-PER", "O")))
    Passage(id='1', title='Anna = PER', text='Anna sings')
    """
    if isinstance(example, TaggedSentence):
        mentions = [f"{' '.join(example.words[start:end])} = {kind}" for start, end, kind in bio_spans(example.tags)]
        return Passage(example.id, ", ".join(mentions) or "none", query_text(example))
    if isinstance(example, LabelledText):
        return Passage(example.id, example.label, query_text(example))
    head, tail = (example.text[start:end] for start, end in (example.head, example.tail))
    return Passage(example.id, f"{example.label} of {head} and {tail}", query_text(example))
