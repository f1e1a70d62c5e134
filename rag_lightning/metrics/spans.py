"""Figures of tagging: precision, recall and F1 of whole mentions, and a report by tag of words.

Inputs: the predicted and the true BIO tags of each sentence's words. A mention is right if its words and its type are,
the convention of CoNLL-2002 and 2003 (conlleval; seqeval in its default mode): an ``I-`` where no mention of its type
goes on begins one. Words that were cut off before the model saw them should come as ``O``: their mentions count as
missed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torchmetrics import Metric

from rag_lightning.errors import DataError
from rag_lightning.metrics.classes import (
    ClassReport,
    check_names,
    class_counts,
    confusion_matrix,
    macro_f1,
    report_of,
)
from rag_lightning.text.tagging import OUTSIDE, bio_spans, entity_type


def span_counts(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]], types: Sequence[str]
) -> Int[Tensor, "C 3"]:
    """Returns of each entity type how many mentions were right, how many were predicted and how many were true.

    Args:
        predicted: The tags of each sentence; as many as ``true`` has.
        true: Likewise.
        types: The C entity types; every tag is of one of them.

    >>> span_counts([["B-LOC", "O"]], [["B-LOC", "B-PER"]], types=["LOC", "PER"]).tolist()
    [[1, 1, 1], [0, 0, 1]]
    """
    places = {kind: place for place, kind in enumerate(types)}
    counts = [[0, 0, 0] for _ in types]
    for predicted_tags, true_tags in zip(predicted, true, strict=True):
        predicted_spans, true_spans = set(bio_spans(predicted_tags)), set(bio_spans(true_tags))
        for column, spans in enumerate((predicted_spans & true_spans, predicted_spans, true_spans)):
            for _, _, kind in spans:
                counts[places[kind]][column] += 1
    return torch.tensor(counts, dtype=torch.long).reshape(len(types), 3)


class SpanMetrics(Metric):
    """Precision, recall and F1 of mentions, and how many words have the right tag.

    ``compute`` returns ``{"precision", "recall", "f1"}`` over all mentions, ``macro_f1``, the mean F1 of the entity
    types that are true or predicted at least once, and ``tag_accuracy`` over words; as fractions of 1. The first four
    are left out where no mention is true or predicted, all where there were no words. :meth:`span_report` has the
    figures by entity type, :meth:`tag_report` those by tag.

    Args:
        names: The tags that a model tells apart: ``O``, ``B-LOC``, ``I-LOC``, …

    Raises:
        ConfigError: No names, or a repeated one.

    >>> metric = SpanMetrics(["O", "B-LOC", "I-LOC"])
    >>> metric.update([["B-LOC", "O", "B-LOC"]], [["B-LOC", "O", "O"]])
    >>> metric.compute()["precision"], metric.compute()["recall"]
    (tensor(0.5000), tensor(1.))
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    spans_C3: Tensor
    tag_confusion_CC: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        check_names(names)
        self.names = tuple(names)
        self.types = tuple(dict.fromkeys(entity_type(name) for name in names if name != OUTSIDE))
        self._numbers = {name: number for number, name in enumerate(names)}
        self.add_state("spans_C3", torch.zeros(len(self.types), 3, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("tag_confusion_CC", torch.zeros(len(names), len(names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> None:
        """Adds sentences by the tags of their words.

        Raises:
            DataError: Not as many predictions as sentences, or as tags in one of them, or a tag not among the names.
        """
        if len(predicted) != len(true):
            raise DataError(f"expected predicted tags for each sentence, came {len(predicted)} for {len(true)}.")
        for place, (predicted_tags, true_tags) in enumerate(zip(predicted, true, strict=True)):
            if len(predicted_tags) != len(true_tags):
                raise DataError(
                    f"sentence {place}: expected a predicted tag for each of {len(true_tags)} words, came "
                    f"{len(predicted_tags)}. Give words that were cut off the tag O."
                )
        predicted_N, true_N = self._flat_numbers(predicted), self._flat_numbers(true)
        device = self.spans_C3.device
        self.spans_C3 += span_counts(predicted, true, self.types).to(device)
        self.tag_confusion_CC += confusion_matrix(predicted_N, true_N, num_classes=len(self.names)).to(device)

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures over all sentences added."""
        figures: dict[str, Tensor] = {}
        num_right, num_predicted, num_true = self.spans_C3.sum(dim=0)
        if num_predicted + num_true > 0:
            figures["precision"] = num_right / num_predicted.clamp(min=1)
            figures["recall"] = num_right / num_true.clamp(min=1)
            figures["f1"] = 2 * num_right / (num_predicted + num_true)
            figures["macro_f1"] = macro_f1(self.spans_C3)
        if self.tag_confusion_CC.sum() > 0:
            figures["tag_accuracy"] = self.tag_confusion_CC.trace() / self.tag_confusion_CC.sum()
        return figures

    def span_report(self) -> ClassReport:
        """Returns the figures of mentions by entity type, over the sentences added in this process."""
        return report_of(self.spans_C3, self.types)

    def tag_report(self, *, outside: bool = True) -> ClassReport:
        """Returns the figures of words by tag, over the sentences added in this process.

        Args:
            outside: Whether ``O`` has a row and enters the averages, which it dominates.
        """
        return report_of(class_counts(self.tag_confusion_CC), self.names, left_out=() if outside else (OUTSIDE,))

    def _flat_numbers(self, sentences: Sequence[Sequence[str]]) -> Int[Tensor, "N"]:
        unknown = {tag for tags in sentences for tag in tags} - self._numbers.keys()
        if unknown:
            raise DataError(
                f"expected tags among {', '.join(self.names)}, came {min(unknown)!r}. Make the label set from training "
                "data that has all types."
            )
        return torch.tensor([self._numbers[tag] for tags in sentences for tag in tags], dtype=torch.long)
