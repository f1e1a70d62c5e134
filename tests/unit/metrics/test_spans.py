"""Figures of mentions against seqeval, of tags against scikit-learn; sums over two processes."""

import json
import warnings
from pathlib import Path

import pytest
import seqeval.metrics
import sklearn.metrics
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.spans import SpanMetrics, span_counts

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-creative-work", "I-creative-work"]
tags = st.sampled_from(["O", "O", *TAGS])
# pairs of (predicted, true) for each word, so that both have one length
sentences = st.lists(st.lists(st.tuples(tags, tags), max_size=8), min_size=1, max_size=5)


def apart(sentences):
    return [[guess for guess, _ in one] for one in sentences], [[gold for _, gold in one] for one in sentences]


def measured(predicted, true):
    metric = SpanMetrics(TAGS)
    metric.update(predicted, true)
    return metric


@given(sentences)
def test_mentions_agree_with_seqeval(sentences):
    """Also where tags break BIO, as a model's predictions do."""
    predicted, true = apart(sentences)
    metric = measured(predicted, true)
    figures = {name: value.item() for name, value in metric.compute().items()}
    if not any(tag != "O" for rows in (predicted, true) for row in rows for tag in row):
        assert figures == ({"tag_accuracy": 1.0} if any(true) else {})
        return
    expected = {
        "precision": seqeval.metrics.precision_score(true, predicted, zero_division=0),
        "recall": seqeval.metrics.recall_score(true, predicted, zero_division=0),
        "f1": seqeval.metrics.f1_score(true, predicted, zero_division=0),
        "macro_f1": seqeval.metrics.f1_score(true, predicted, average="macro", zero_division=0),
        "tag_accuracy": seqeval.metrics.accuracy_score(true, predicted),
    }
    assert figures == pytest.approx(expected)
    report = metric.span_report()
    theirs = seqeval.metrics.classification_report(true, predicted, output_dict=True, zero_division=0)
    assert_same(rows_of(report), theirs)


@given(sentences, st.booleans())
def test_tags_agree_with_sklearn(sentences, outside):
    predicted, true = apart(sentences)
    report = measured(predicted, true).tag_report(outside=outside)
    flat_predicted, flat_true = ([tag for row in rows for tag in row] for rows in (predicted, true))
    present = [tag for tag in TAGS if tag in {*flat_predicted, *flat_true} and (outside or tag != "O")]
    assert list(report.classes) == present
    if not present:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn's, on labels that are left out
        theirs = sklearn.metrics.classification_report(
            flat_true, flat_predicted, labels=present, output_dict=True, zero_division=0
        )
    if "accuracy" in theirs:  # said in place of the micro average where no tag is left out
        accuracy = theirs.pop("accuracy")
        theirs["micro avg"] = dict.fromkeys(["precision", "recall", "f1-score"], accuracy) | {"support": len(flat_true)}
    assert_same(rows_of(report), theirs)


def rows_of(report):
    averages = {"micro avg": report.micro, "macro avg": report.macro, "weighted avg": report.weighted}
    return {
        name: {"precision": row.precision, "recall": row.recall, "f1-score": row.f1, "support": row.support}
        for name, row in (report.classes | averages).items()
    }


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, row in theirs.items():
        assert ours[name] == pytest.approx(row), name


@given(sentences, st.randoms(), st.integers(0, 5))
def test_order_batches_and_merging_change_nothing(sentences, random, cut):
    whole = measured(*apart(sentences))
    shuffled = random.sample(sentences, len(sentences))
    parts, other = measured(*apart(shuffled[:cut])), measured(*apart(shuffled[cut:]))
    parts.merge_state(other)
    torch.testing.assert_close(parts.compute(), whole.compute())
    assert parts.tag_report() == whole.tag_report()


@given(sentences)
def test_a_perfect_prediction_has_only_ones(sentences):
    _, true = apart(sentences)
    assert all(value == 1 for value in measured(true, true).compute().values())


def test_a_mention_counts_where_words_and_type_are_right():
    true = [["B-LOC", "I-LOC", "O", "B-PER"]]
    assert span_counts([["B-LOC", "I-LOC", "O", "B-LOC"]], true, ["LOC", "PER"]).tolist() == [[1, 2, 1], [0, 0, 1]]
    assert span_counts([["B-LOC", "O", "O", "I-PER"]], true, ["LOC", "PER"]).tolist() == [[0, 1, 1], [1, 1, 1]]
    assert span_counts([], [], []).shape == (0, 3)


def test_bad_input_is_refused():
    metric = SpanMetrics(["O", "B-LOC", "I-LOC"])
    with pytest.raises(DataError, match="expected predicted tags for each sentence, came 1 for 2"):
        metric.update([["O"]], [["O"], ["O"]])
    with pytest.raises(DataError, match="sentence 1: expected a predicted tag for each of 2 words, came 1"):
        metric.update([["O"], ["O"]], [["O"], ["O", "O"]])
    with pytest.raises(DataError, match="expected tags among O, B-LOC, I-LOC, came 'B-PER'"):
        metric.update([["O"]], [["B-PER"]])
    assert metric.compute() == {}
    with pytest.raises(ConfigError, match="each once, came 'O' again"):
        SpanMetrics(["O", "O"])


def test_reset_forgets():
    metric = measured([["O"]], [["B-LOC"]])
    metric.reset()
    metric.update([["O"]], [["O"]])
    assert metric.compute() == {"tag_accuracy": torch.tensor(1.0)}


PREDICTED = [["B-LOC", "O"], ["B-PER", "I-PER", "O"], ["O"]]
TRUE = [["B-LOC", "I-LOC"], ["B-PER", "I-PER", "O"], ["B-PER"]]


def _one_of_two_processes(rank: int, meeting_point: str, results: str) -> None:
    from rag_lightning.metrics import ClassMetrics, RankMetrics

    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # uneven on purpose
    spans, classes, ranks = SpanMetrics(TAGS), ClassMetrics(["a", "b"]), RankMetrics(ks=(1,))
    spans.update(PREDICTED[mine], TRUE[mine])
    classes.update(torch.tensor([0, 1, 1])[mine], torch.tensor([0, 1, 0])[mine])
    ranks.update(torch.tensor([1, 2, 0])[mine])
    figures = spans.compute() | classes.compute() | ranks.compute()
    Path(results, str(rank)).write_text(json.dumps({name: value.item() for name, value in figures.items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_figures_of_one(tmp_path):
    multiprocessing.spawn(_one_of_two_processes, (str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    expected = {
        "precision": 1 / 2,
        "recall": 1 / 3,
        "f1": 2 / 5,
        "tag_accuracy": 4 / 6,
        "accuracy": 2 / 3,
        "hit@1": 1 / 3,
        "ndcg@1": 1 / 3,
        "mrr": (1 + 1 / 2) / 3,
    }
    for rank in "01":
        figures = json.loads((tmp_path / rank).read_text())
        assert {name: figures[name] for name in expected} == pytest.approx(expected)
