"""The ranking callback on the tiny world, against one similarity at a time."""

import json
from pathlib import Path

import pytest
import torch

from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.retrieval.build import RetrieverSettings
from rag_lightning.retrieval.encode import encode_questions
from rag_lightning.training.objectives import Contrastive
from rag_lightning.training.ranking import RankingCallback

DENSE = ("dense", "dense_popularity", "popularity")


@pytest.fixture
def excluding(tiny_questions, json_lines, tmp_path):
    """Returns question files in which each question excludes the films of the two questions before it."""

    def write(name, numbers):
        records = [
            {**tiny_questions[n], "excluded_passage_ids": [f"film-{n - 1}", f"film-{n - 2}"] if n > 1 else []}
            for n in numbers
        ]
        return str(json_lines(tmp_path / f"{name}.jsonl", records))

    return write


def loop_ranks(run, questions, *, weight=None, counts=None):
    """Returns each question's rank by a loop over films, one similarity at a time."""
    corpus, model = run.data.corpus, run.module.model
    vectors = run.data.dense.snapshot.vectors(torch.arange(len(corpus))).double()
    queries = encode_questions(model.encoder, [question.question for question in questions]).double()
    ranks = []
    for question, query in zip(questions, queries, strict=True):
        scores = {}
        for row, passage in enumerate(corpus):
            if passage.id in question.excluded_passage_ids:
                continue
            if weight is None:
                scores[passage.id] = float(query @ vectors[row])
            else:
                prior = weight * torch.log1p(torch.tensor(float(counts.get(passage.id, 0)))).item()
                scores[passage.id] = float(query @ vectors[row]) / model.settings.temperature + prior
        own = scores.pop(question.positive_passage_ids[0])
        ranks.append(1 + sum(score >= own for score in scores.values()))
    return ranks


def figures(ranks, k):
    n = len(ranks)
    gains = [1 / torch.log2(torch.tensor(1.0 + rank)).item() for rank in ranks if rank <= k]
    return {
        f"hit@{k}": sum(rank <= k for rank in ranks) / n,
        f"ndcg@{k}": sum(gains) / n,
        "mrr": sum(1 / r for r in ranks) / n,
    }


def test_figures_agree_with_a_loop_in_validation_and_test(tiny_run, excluding, tiny_world):
    train = [*range(13), 14, 14, 20, 20, 20]
    lines = [json.loads(line) for line in Path(excluding("raw", train)).read_text(encoding="utf-8").splitlines()]
    for place, line in enumerate(lines):
        line["id"] = f"train-{place}"
    path = tiny_world.root / "repeated.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = tiny_run(
        objective=Contrastive(),
        data={
            "train": str(path),
            "validation": excluding("val", range(13, 18)),
            "test": excluding("test", range(18, 23)),
        },
        callbacks=[RankingCallback(ks=(3,), rankings=DENSE, popularity_weight=0.5)],
        max_steps=3,
        val_check_interval=3,
    ).fit()
    validation = {name: value.item() for name, value in run.trainer.callback_metrics.items() if "val/dense" in name}
    assert "val/popularity_mrr" not in run.trainer.callback_metrics  # it does not change
    (tested,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    counts = {f"film-{n}": train.count(n) for n in range(24)}
    for split, came in (("val", validation), ("test", tested)):
        questions = read_questions(run.data.paths[{"val": "validation"}.get(split, split)])
        assert all(len(question.excluded_passage_ids) == 2 for question in questions)
        for name, settings in (("dense", {}), ("dense_popularity", {"weight": 0.5, "counts": counts})):
            expected = figures(loop_ranks(run, questions, **settings), 3)
            assert {figure: came[f"{split}/{name}_{figure}"] for figure in expected} == pytest.approx(expected)
    assert tested["test/recall@3"] == pytest.approx(
        tested["test/dense_hit@3"]
    )  # what is retrieved is not excluded either
    by_hand = [
        1
        + sum(
            counts[f] >= counts[q.positive_passage_ids[0]]
            for f in counts
            if f not in (*q.excluded_passage_ids, *q.positive_passage_ids)
        )
        for q in questions
    ]
    expected = figures(by_hand, 3)
    assert by_hand[2] == 1  # film-20, asked for three times in training
    assert {name: tested[f"test/popularity_{name}"] for name in expected} == pytest.approx(expected)


def test_fillers_count_nowhere_and_batches_change_nothing(tiny_run, excluding):
    came = []
    for size in (2, 5):
        run = tiny_run(
            objective=Contrastive(),
            data={"test": excluding("test", range(18, 23)), "eval_batch_size": size},
            callbacks=[RankingCallback(rankings=("dense",))],
        )
        (tested,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
        came.append({name: value for name, value in tested.items() if "dense" in name})
    assert len(came[0]) == 7
    assert came[0] == pytest.approx(came[1])


def test_bm25_finds_the_film_that_is_named(tiny_run, excluding):
    pytest.importorskip("bm25s")
    run = tiny_run(
        objective=Contrastive(),
        data={"test": excluding("test", range(18, 23))},
        callbacks=[RankingCallback(ks=(1,), rankings=("bm25",))],
    )
    (tested,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
    assert tested["test/bm25_hit@1"] == tested["test/bm25_mrr"] == 1.0


def test_what_it_cannot_rank_is_refused(tiny_run, tiny_questions, json_lines, tmp_path):
    def start(**data):
        run = tiny_run(objective=Contrastive(), data=data, callbacks=[RankingCallback(rankings=DENSE)])
        run.trainer.test(run.module, datamodule=run.data, verbose=False)

    bare = {name: value for name, value in tiny_questions[20].items() if name != "positive_passage_ids"}
    with pytest.raises(DataError, match="expected one gold passage of each test question.*came 0 of 'q-20'"):
        start(test=str(json_lines(tmp_path / "bare.jsonl", [bare])))
    with pytest.raises(ConfigError, match="ranking: expected data.train"):
        start(test=str(json_lines(tmp_path / "test.jsonl", tiny_questions[20:])), train=None)


def test_a_run_by_words_has_nothing_to_rank(tiny_run, tiny_world):
    pytest.importorskip("bm25s")
    run = tiny_run(
        data={"test": str(tiny_world.test), "retriever": RetrieverSettings(kind="sparse")},
        optim={"train_query_encoder": False},
        callbacks=[RankingCallback(rankings=("dense",))],
    )
    with pytest.raises(ConfigError, match="expected a run that searches passage vectors, as dense compares them"):
        run.fit()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rankings": ("random",)}, "expected some of dense, dense_popularity, popularity, bm25, each once"),
        ({"rankings": ("bm25", "bm25")}, "each once"),
        ({"rankings": ()}, "expected some of"),
        ({"popularity_weight": 0.0}, "popularity_weight: expected a number above 0, came 0.0"),
        ({"ks": ()}, "ks: expected cut-offs"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        RankingCallback(**settings)
