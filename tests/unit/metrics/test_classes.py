"""Accuracy, macro F1 and reports against scikit-learn and torchmetrics; SemEval's score against a loop over texts."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, classification_report, f1_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.classes import (
    ClassMetrics,
    class_counts,
    confusion_matrix,
    macro_f1,
    report_of,
    semeval_macro_f1,
)

NAMES = ["a", "b", "c", "d"]
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


def tensors(pairs):
    predicted, true = zip(*pairs, strict=True)
    return torch.tensor(predicted), torch.tensor(true)


@given(pairs)
def test_accuracy_and_macro_f1_agree_with_sklearn_and_torchmetrics(pairs):
    predicted_N, true_N = tensors(pairs)
    metric = ClassMetrics(NAMES)
    metric.update(predicted_N, true_N)
    figures = {name: value.item() for name, value in metric.compute().items()}
    expected = {
        "accuracy": accuracy_score(true_N, predicted_N),
        "macro_f1": f1_score(true_N, predicted_N, average="macro", zero_division=0),
    }
    assert figures == pytest.approx(expected)
    torch_f1 = multiclass_f1_score(predicted_N, true_N, num_classes=4, average="macro")
    torch_accuracy = multiclass_accuracy(predicted_N, true_N, num_classes=4, average="micro")
    assert figures == pytest.approx({"accuracy": torch_accuracy.item(), "macro_f1": torch_f1.item()})


@given(pairs, st.sampled_from([(), ("a",), ("b", "d")]))
def test_a_report_agrees_with_sklearn(pairs, left_out):
    predicted_N, true_N = tensors(pairs)
    report = report_of(class_counts(confusion_matrix(predicted_N, true_N, num_classes=4)), NAMES, left_out=left_out)
    present = sorted({NAMES[number] for pair in pairs for number in pair} - set(left_out))
    assert list(report.classes) == present
    if not present:
        assert report.macro.f1 == report.micro.f1 == report.weighted.f1 == 0.0
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn's, on labels that are left out
        expected = classification_report(
            [NAMES[number] for number in true_N],
            [NAMES[number] for number in predicted_N],
            labels=present,
            zero_division=0,
            output_dict=True,
        )
    rows = report.classes | {"macro avg": report.macro, "weighted avg": report.weighted}
    if "micro avg" in expected:
        rows["micro avg"] = report.micro
    else:  # sklearn says accuracy where no class is left out: there all three figures of the micro average are that
        accuracy = expected.pop("accuracy")
        assert (report.micro.precision, report.micro.recall, report.micro.f1) == pytest.approx((accuracy,) * 3)
    got = {
        name: {"precision": row.precision, "recall": row.recall, "f1-score": row.f1, "support": row.support}
        for name, row in rows.items()
    }
    assert set(got) == set(expected)
    for name, row in expected.items():
        assert got[name] == pytest.approx(row), name


def test_the_matrix_has_true_classes_in_rows():
    matrix = confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), num_classes=3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    nothing = confusion_matrix(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), num_classes=2)
    assert nothing.tolist() == [[0, 0], [0, 0]]


RELATIONS = ["Cause-Effect", "Member-Collection", "Entity-Origin"]
LABELS = ["Other", *(f"{relation}({order})" for relation in RELATIONS for order in ("e1,e2", "e2,e1"))]
label_pairs = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=25)


def loop_over_texts(pairs):
    """The task's description, text by text: the relation in the right direction is right, Other has no F1."""
    scores = []
    for relation in RELATIONS:
        right = predicted = true = 0
        for guess, gold in pairs:
            predicted += guess.split("(")[0] == relation
            true += gold.split("(")[0] == relation
            right += guess == gold and gold.split("(")[0] == relation
        if true:  # the scorer averages over the relations of the key file
            precision, recall = (right / predicted if predicted else 0.0), right / true
            scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores) if scores else None


@given(label_pairs)
def test_the_semeval_score_is_that_of_a_loop(pairs):
    predicted_N, true_N = tensors([(LABELS.index(guess), LABELS.index(gold)) for guess, gold in pairs])
    metric = ClassMetrics(LABELS, semeval=True)
    metric.update(predicted_N, true_N)
    expected = loop_over_texts(pairs)
    score = metric.compute().get("semeval_macro_f1")
    assert (score is None) == (expected is None)
    assert expected is None or score.item() == pytest.approx(expected)


def test_the_semeval_score_counts_a_wrong_direction_as_wrong():
    names = ["Other", "Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)"]

    def score(predicted, true):
        return semeval_macro_f1(
            confusion_matrix(torch.tensor(predicted), torch.tensor(true), num_classes=3), names
        ).item()

    assert score([1, 2, 0], [1, 2, 0]) == 1.0
    assert score([2, 1], [1, 2]) == 0.0
    assert score([1, 1], [1, 2]) == 0.5  # P = R = 1/2 of both directions together
    assert score([1, 0, 1], [1, 0, 0]) == pytest.approx(2 / 3)  # Other as a relation costs precision


def test_semeval_refuses_what_it_cannot_score():
    with pytest.raises(ConfigError, match=r"expected classes such as 'Cause-Effect\(e1,e2\)', or 'Other', came 'P17'"):
        ClassMetrics(["Other", "P17"], semeval=True)
    matrix = confusion_matrix(torch.tensor([0]), torch.tensor([0]), num_classes=2)
    with pytest.raises(DataError, match="expected a text with a relation other than Other, came none"):
        semeval_macro_f1(matrix, ["Other", "Cause-Effect(e1,e2)"])
    with pytest.raises(ConfigError, match="expected 2 class names, came 1"):
        semeval_macro_f1(matrix, ["Other"])


@given(pairs, st.integers(0, 20))
def test_batches_and_merging_change_nothing(pairs, cut):
    predicted_N, true_N = tensors(pairs)
    whole, parts, other = ClassMetrics(NAMES), ClassMetrics(NAMES), ClassMetrics(NAMES)
    whole.update(predicted_N, true_N)
    parts.update(predicted_N[:cut], true_N[:cut])
    other.update(predicted_N[cut:], true_N[cut:])
    parts.merge_state(other)
    torch.testing.assert_close(parts.compute(), whole.compute())
    assert parts.report() == whole.report()


def test_figures_without_texts_are_left_out():
    metric = ClassMetrics(NAMES)
    metric.update(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    assert metric.compute() == {}
    assert metric.report().classes == {}
    assert macro_f1(torch.zeros(3, 3, dtype=torch.long)) == 0


def test_bad_input_is_refused():
    metric = ClassMetrics(["a", "b"])
    with pytest.raises(DataError, match="expected a predicted class for each text, came 1 for 2"):
        metric.update(torch.tensor([0]), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="predicted classes: expected numbers from 0 to 1, came 0 to 2"):
        metric.update(torch.tensor([0, 2]), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="true classes: expected numbers from 0 to 1, came -1 to 0"):
        metric.update(torch.tensor([0, 1]), torch.tensor([0, -1]))
    with pytest.raises(ConfigError, match="expected class names, each once, came 'a' again"):
        ClassMetrics(["a", "b", "a"])
    with pytest.raises(ConfigError, match="expected class names, each once, came none"):
        ClassMetrics([])
    with pytest.raises(ConfigError, match="expected a name for each of 3 classes, came 1 names"):
        report_of(torch.zeros(3, 3, dtype=torch.long), ["a"])
