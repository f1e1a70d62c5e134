"""How stale an index is, against encoding everything anew; and refreshing by need."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from rag_lightning.errors import ConfigError
from rag_lightning.training.staleness import freshness, take_probe

BOTH = {"train_passage_encoder": True}


@pytest.fixture
def drifted(tiny_run):
    """A run whose passage tower has moved since the index was built."""
    run = tiny_run(optim=BOTH)
    run.data.setup("fit")
    run.data.ensure_index(step=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in run.module.model.encoder.passage.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return run


def exact_overlap(run, num_passages=3):
    """Encodes the whole corpus again and compares sets, question by question."""
    model, data = run.module.model.eval(), run.data
    fresh = torch.stack([model.encoder.passage(data._passage_tokens.batch_of([p]))[0] for p in data.corpus])
    stale = data.dense.vectors(torch.arange(24)[None])[0]
    shares = []
    for question in data.questions["train"]:
        q = model.encoder.query(model.query_tokens([question.question]))[0]
        before = set((stale @ q).topk(num_passages).indices.tolist())
        shares.append(len(before & set((fresh @ q).topk(num_passages).indices.tolist())) / num_passages)
    return sum(shares) / len(shares)


def test_with_every_passage_as_candidate_it_is_the_overlap_with_a_fresh_index(drifted):
    model, data = drifted.module.model, drifted.data
    probe = take_probe(model, data, 128)
    measured = freshness(model, data, probe, num_candidates=24)
    with torch.no_grad():
        expected = exact_overlap(drifted)
    assert measured == pytest.approx(expected)
    assert 0.0 < expected < 1.0
    assert freshness(model, data, probe, num_candidates=5) >= expected - 1e-9  # an upper bound
    assert freshness(model, data, probe, num_candidates=3) == 1.0  # nothing else to choose from


def test_nothing_moved_is_fresh(tiny_run):
    run = tiny_run(optim=BOTH)
    run.data.setup("fit")
    run.data.ensure_index(step=0)
    assert freshness(run.module.model, run.data, take_probe(run.module.model, run.data, 5), num_candidates=24) == 1.0


def test_the_probe_is_taken_without_dropout_and_leaves_modes_alone(tiny_run, tiny_model, tiny_world):
    run = tiny_run(model=tiny_model(dropout=0.4), data={"validation": str(tiny_world.validation)})
    run.data.setup("fit")
    tower = run.module.model.encoder.query.train()
    first, second = (take_probe(run.module.model, run.data, 3) for _ in range(2))
    assert torch.equal(first.queries_PD, second.queries_PD)
    assert first.texts == tuple(q.question for q in run.data.questions["validation"][:3])
    assert tower.training
    assert take_probe(run.module.model, run.data, 0) is None


def test_too_few_candidates_or_no_questions_are_refused(drifted):
    model, data = drifted.module.model, drifted.data
    probe = take_probe(model, data, 4)
    with pytest.raises(ConfigError, match="reindex.num_candidates: expected at least num_passages=3, got 2"):
        freshness(model, data, probe, num_candidates=2)
    with pytest.raises(ConfigError, match="expected validation or training questions to probe with"):
        freshness(model, data, None, num_candidates=5)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize(("rate", "refreshed"), [(1e-2, True), (1e-9, False)])
def test_the_index_is_refreshed_when_it_has_drifted_and_only_then(mode, rate, refreshed, tiny_run, tmp_path):
    run = tiny_run(
        schedule=3,
        optim={**BOTH, "lr_passage_encoder": rate, "lr_query_encoder": rate},
        max_steps=9,
        reindex={"mode": mode, "trigger": "staleness", "min_overlap": 0.97, "num_candidates": 24}
        | ({"lag_steps": 1} if mode == "async" else {}),
        logger=CSVLogger(str(tmp_path)),
        log_every_n_steps=1,
    ).fit()
    with next(tmp_path.rglob("metrics.csv")).open() as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("reindex/freshness")]
    assert [int(row["step"]) for row in rows] == [2, 5, 8]  # steps count from 0 there
    drift = [int(row["step"]) + 1 for row in rows if float(row["reindex/freshness"]) < 0.97]
    last = 9 if mode == "sync" else 8  # begun at 9, the end of the run
    live = sorted({int(name[4:12]) for name in run.recorder.snapshots})
    assert live == [0, *[step for step in drift if step <= last]]
    assert bool(drift) == refreshed
