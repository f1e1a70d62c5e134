"""Figures of classification: accuracy, macro F1, a report by class, and the official score of SemEval-2010 task 8.

Inputs: the numbers of the predicted and of the true class of each text. All figures come from one confusion matrix of
counts, so batches and processes add up. Precision is 0 where a class was never predicted, recall where it never was
true, F1 where both are 0, as in scikit-learn with ``zero_division=0``.

Macro F1 is the mean over the classes that are true or predicted at least once, as in scikit-learn without ``labels``
and in torchmetrics: a class of the label set that this data neither has nor draws predictions of says nothing.
SemEval's is another: see :func:`semeval_macro_f1`.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from rag_lightning.errors import ConfigError, DataError

OTHER = "Other"
_DIRECTED = re.compile(r"(.+)\(e[12],e[12]\)")


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Figures of one class, or averages over classes, as fractions of 1; ``support`` counts the true ones."""

    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class ClassReport:
    """What scikit-learn's ``classification_report`` says.

    Attributes:
        classes: Those that are true or predicted at least once, by name.
        micro: Of all their counts together.
        macro: The mean over the classes.
        weighted: The mean weighted by support.
    """

    classes: dict[str, ClassFigures]
    micro: ClassFigures
    macro: ClassFigures
    weighted: ClassFigures


def confusion_matrix(
    predicted_N: Int[Tensor, "N"], true_N: Int[Tensor, "N"], *, num_classes: int
) -> Int[Tensor, "C C"]:
    """Returns how often a text of each class (row) was given each class (column).

    Raises:
        DataError: A number that is not that of a class.
    """
    for what, numbers_N in (("predicted", predicted_N), ("true", true_N)):
        if numbers_N.numel() and (int(numbers_N.min()) < 0 or int(numbers_N.max()) >= num_classes):
            raise DataError(
                f"{what} classes: expected numbers from 0 to {num_classes - 1}, came {int(numbers_N.min())} to "
                f"{int(numbers_N.max())}. Number them by the model's label set."
            )
    if not true_N.numel():
        return true_N.new_zeros((num_classes, num_classes), dtype=torch.long)
    matrix_CC: Int[Tensor, "C C"] = multiclass_confusion_matrix(
        predicted_N.long(), true_N.long(), num_classes=num_classes, validate_args=False
    )
    return matrix_CC


def class_counts(confusion_CC: Int[Tensor, "C C"]) -> Int[Tensor, "C 3"]:
    """Returns of each class how many were right, how many were predicted and how many were true.

    >>> class_counts(torch.tensor([[2, 1], [0, 3]])).tolist()
    [[2, 2, 3], [3, 4, 3]]
    """
    return torch.stack([confusion_CC.diagonal(), confusion_CC.sum(dim=0), confusion_CC.sum(dim=1)], dim=1)


def macro_f1(counts_C3: Int[Tensor, "C 3"]) -> Float[Tensor, ""]:
    """Returns the mean F1 of the classes that are true or predicted at least once, 0 where there is none.

    Args:
        counts_C3: As :func:`class_counts` returns them.

    >>> macro_f1(torch.tensor([[2, 2, 3], [3, 4, 3], [0, 0, 0]]))
    tensor(0.8286)
    """
    sizes_C = counts_C3[:, 1] + counts_C3[:, 2]
    # 2PR / (P + R) with P = right / predicted and R = right / true
    f1_C = 2 * counts_C3[:, 0] / sizes_C.clamp(min=1)
    return f1_C.sum() / (sizes_C > 0).sum().clamp(min=1)


def report_of(counts_C3: Int[Tensor, "C 3"], names: Sequence[str], *, left_out: Collection[str] = ()) -> ClassReport:
    """Returns figures by class, and their averages.

    Args:
        counts_C3: As :func:`class_counts` returns them.
        names: Of the C classes.
        left_out: Classes that have no row and enter no average, such as ``O`` among tags. They still count where
            another class was predicted for them.

    Raises:
        ConfigError: Not as many names as classes.
    """
    if len(names) != len(counts_C3):
        raise ConfigError(f"report: expected a name for each of {len(counts_C3)} classes, came {len(names)} names.")
    rows = {
        name: counts
        for name, counts in zip(names, counts_C3.tolist(), strict=True)
        if name not in left_out and counts[1] + counts[2] > 0
    }
    classes = {name: _figures(*counts) for name, counts in rows.items()}
    totals = [sum(column) for column in zip(*rows.values(), strict=True)] or [0, 0, 0]
    figures = list(classes.values())
    return ClassReport(
        classes=classes,
        micro=_figures(*totals),
        macro=_mean(figures, [1] * len(figures)),
        weighted=_mean(figures, [one.support for one in figures]),
    )


def semeval_macro_f1(confusion_CC: Int[Tensor, "C C"], names: Sequence[str]) -> Float[Tensor, ""]:
    """Returns the official score of SemEval-2010 task 8: "(9+1)-way evaluation with directionality taken into account".

    The mean F1 of the relations, without ``Other`` (Hendrickx et al. 2010, §3.3). The two directions of a relation are
    one class, but a prediction in the wrong direction is wrong: it counts among what was predicted of the relation, and
    what was true, and not among what was right. As in the scorer, relations that are never true are not in the mean.

    Args:
        confusion_CC: Rows true, columns predicted, as :func:`confusion_matrix` returns it.
        names: Of the C classes: ``Other``, and relations such as ``Cause-Effect(e1,e2)``.

    Raises:
        ConfigError: A name that is neither, or not as many names as classes.
        DataError: No text has a relation other than ``Other``.
    """
    if len(names) != len(confusion_CC):
        raise ConfigError(f"SemEval score: expected {len(confusion_CC)} class names, came {len(names)}.")
    relations = [_relation(name) for name in names]
    counts = {relation: confusion_CC.new_zeros(3) for relation in relations if relation != OTHER}
    for relation, counts_3 in zip(relations, class_counts(confusion_CC), strict=True):
        if relation != OTHER:
            counts[relation] = counts[relation] + counts_3
    met = [counts_3 for counts_3 in counts.values() if counts_3[2] > 0]
    if not met:
        raise DataError("SemEval score: expected a text with a relation other than Other, came none. Add texts.")
    return macro_f1(torch.stack(met))


def _relation(name: str) -> str:
    """Returns the relation without its direction."""
    match = _DIRECTED.fullmatch(name)
    if match is None and name != OTHER:
        raise ConfigError(
            f"SemEval score: expected classes such as 'Cause-Effect(e1,e2)', or 'Other', came {name!r}. Use it for "
            "SemEval-2010 task 8 only, with the labels as they are in the data."
        )
    return OTHER if match is None else match[1]


def _figures(num_right: int, num_predicted: int, num_true: int) -> ClassFigures:
    return ClassFigures(
        precision=num_right / num_predicted if num_predicted else 0.0,
        recall=num_right / num_true if num_true else 0.0,
        f1=2 * num_right / (num_predicted + num_true) if num_predicted + num_true else 0.0,
        support=num_true,
    )


def _mean(figures: Sequence[ClassFigures], weights: Sequence[int]) -> ClassFigures:
    total = sum(weights)

    def mean(values: Sequence[float]) -> float:
        weighted = sum(weight * value for weight, value in zip(weights, values, strict=True))
        return weighted / total if total else 0.0

    return ClassFigures(
        precision=mean([one.precision for one in figures]),
        recall=mean([one.recall for one in figures]),
        f1=mean([one.f1 for one in figures]),
        support=sum(one.support for one in figures),
    )


class ClassMetrics(Metric):
    """Accuracy and macro F1 over texts.

    ``compute`` returns ``{"accuracy", "macro_f1"}`` as fractions of 1, and ``semeval_macro_f1`` if asked for and some
    text has a relation; nothing where there were no texts. :meth:`report` has the figures by class.

    Args:
        names: Of the classes, in the order of their numbers.
        semeval: Whether to add SemEval-2010 task 8's official score.

    Raises:
        ConfigError: No names, a repeated one, or one that SemEval's score cannot read.

    >>> metric = ClassMetrics(["negative", "positive"])
    >>> metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    >>> metric.compute()
    {'accuracy': tensor(0.6667), 'macro_f1': tensor(0.6667)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    confusion_CC: Tensor

    def __init__(self, names: Sequence[str], *, semeval: bool = False) -> None:
        super().__init__()
        check_names(names)
        self.names = tuple(names)
        self.semeval = semeval
        self._relations = [_relation(name) for name in names] if semeval else []
        self.add_state("confusion_CC", torch.zeros(len(names), len(names), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted_N: Int[Tensor, "predicted"], true_N: Int[Tensor, "N"]) -> None:
        """Adds texts by the numbers of their classes.

        Raises:
            DataError: Not as many predictions as true classes, or a number that is not that of a class.
        """
        if len(predicted_N) != len(true_N):
            raise DataError(f"expected a predicted class for each text, came {len(predicted_N)} for {len(true_N)}.")
        self.confusion_CC += confusion_matrix(
            predicted_N.to(self.confusion_CC.device), true_N.to(self.confusion_CC.device), num_classes=len(self.names)
        )

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures over all texts added."""
        num_texts = self.confusion_CC.sum()
        if num_texts == 0:
            return {}
        figures = {
            "accuracy": self.confusion_CC.trace() / num_texts,
            "macro_f1": macro_f1(class_counts(self.confusion_CC)),
        }
        related = [place for place, relation in enumerate(self._relations) if relation != OTHER]
        if related and self.confusion_CC[related].sum() > 0:
            figures["semeval_macro_f1"] = semeval_macro_f1(self.confusion_CC, self.names)
        return figures

    def report(self) -> ClassReport:
        """Returns the figures by class over the texts added in this process; see :func:`report_of`."""
        return report_of(class_counts(self.confusion_CC), self.names)


def check_names(names: Sequence[str]) -> None:
    """Refuses class names of which there are none, or which are not each there once.

    Raises:
        ConfigError: Names the repeated one.
    """
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated:
        came = f"{repeated[0]!r} again" if repeated else "none"
        raise ConfigError(f"expected class names, each once, came {came}.")
