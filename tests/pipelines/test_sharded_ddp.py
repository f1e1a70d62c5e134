"""Shards of 2 and 3 Gloo processes are one index, and errors of one process are errors of all.

The file is also the processes' program (``RANK WORLD_SIZE FOLDER DEVICE BACKEND``): each runs every case of its world
size in one process group and writes what it found, so that many cases cost one start. What was found is judged here,
against a full sort in NumPy and against the index of all rows.
"""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rag_lightning.index.build import build_index
from rag_lightning.index.sharded import ShardedIndex, open_shard
from rag_lightning.utils.distributed import shard

pytestmark = pytest.mark.ddp
METRICS = ("inner_product", "l2", "cosine")
WORLD_SIZES = (2, 3)

# the processes check types and shapes as pytest does here
PROGRAM = f"""
import jaxtyping, runpy
jaxtyping.install_import_hook("rag_lightning", "beartype.beartype")
runpy.run_path({__file__!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Case:
    """A corpus, and the batch of each process.

    Attributes:
        different: Rows are drawn with repetition from so many different ones; 0 makes all differ.
    """

    num_vectors: int
    batches: tuple[int, ...]
    num_passages: int
    metric: str = "inner_product"
    dimension: int = 16
    different: int = 0
    factory: str = "exact"
    nprobe: int | None = None
    dtype: str = "float32"
    seed: int = 0

    def vectors(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.seed)
        if self.different == 0:
            return torch.randn(self.num_vectors, self.dimension, generator=draw)
        rows_MD = torch.randn(self.different, self.dimension, generator=draw)
        return rows_MD[torch.randint(self.different, (self.num_vectors,), generator=draw)]

    def queries(self) -> list[torch.Tensor]:
        draw = torch.Generator().manual_seed(self.seed + 1)
        whole = torch.randn(sum(self.batches), self.dimension, generator=draw).to(getattr(torch, self.dtype))
        return list(whole.split(list(self.batches)))


def named_cases(world_size: int) -> dict[str, Case]:
    uneven, one_sided = {2: ((5, 3), (0, 4)), 3: ((5, 0, 3), (0, 0, 4))}[world_size]
    cases = {}
    for metric in METRICS:
        cases |= {
            f"uneven-{metric}": Case(101, uneven, 7, metric),
            f"ties-{metric}": Case(60, uneven, 25, metric, different=3),
            f"small-shards-{metric}": Case(7, one_sided, 6, metric, different=4),
            f"flat-{metric}": Case(101, uneven, 7, metric, factory="Flat"),
        }
    return cases | {
        "all-rows": Case(7, uneven, 7),
        "fewer-rows-than-processes": Case(world_size - 1, one_sided, world_size - 1),
        "flat-fewer-rows-than-processes": Case(world_size - 1, uneven, 1, factory="Flat"),
        "no-questions": Case(11, (0,) * world_size, 4),
        "bfloat16": Case(101, uneven, 7, dtype="bfloat16"),
        "lists-all": Case(101, uneven, 7, factory="IVF4,Flat", nprobe=4),
        "lists-one": Case(60, uneven, 30, factory="IVF4,Flat", nprobe=1),
    }


def random_cases(world_size: int, how_many: int = 150) -> dict[str, Case]:
    draw = random.Random(world_size)
    cases = {}
    for seed in range(how_many):
        num_vectors = draw.randint(1, 80)
        cases[f"random-{seed}"] = Case(
            num_vectors,
            tuple(draw.randint(0, 6) for _ in range(world_size)),
            draw.randint(1, num_vectors),
            draw.choice(METRICS),
            dimension=draw.randint(1, 40),
            different=draw.choice([0, 0, 2, 9]),
            seed=seed,
        )
    return cases


def wrong_calls(world_size: int) -> tuple[str, ...]:
    return (
        "nan",
        "too-many",
        "dimension",
        "zero-without-rows",
        "different-k",
        "broken-shard",
        "different-metric",
        "whole-on-each",
        *(("small-list", "other-rank") if world_size == 2 else ()),
    )


# ---------------------------------------------------------------------- the processes' program


class BrokenIndex:
    """Searches nothing, as an index whose GPU is full."""

    metric, num_vectors, dimension = "inner_product", 11, 4

    def search(self, queries_BD: torch.Tensor, num_passages: int) -> Any:
        raise RuntimeError("out of memory")

    def add(self, vectors_ND: Any) -> None:
        raise AssertionError

    def save(self, directory: Path) -> None:
        raise AssertionError


def search_wrongly(name: str, rank: int, world_size: int) -> None:
    """Makes a call that the last process, or the way they play together, makes wrong."""
    last = rank == world_size - 1
    place = {"rank": rank, "world_size": world_size}
    vectors_ND, queries_BD = torch.randn(101, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2 + rank, 4)
    if name == "small-list":  # 51 rows make 51 lists; the other 50 do not
        open_shard(vectors_ND, factory="IVF51,Flat", **place)
    elif name == "other-rank":
        open_shard(vectors_ND, rank=0, world_size=2)
    elif name == "zero-without-rows":
        queries_BD[0] = 0.0 if last else 1.0
        open_shard(vectors_ND[:1], metric="cosine", **place).search(queries_BD, 1)
    elif name == "broken-shard":
        rows = shard(11 * world_size, rank, world_size)
        whole = {"num_vectors": 11 * world_size, "dimension": 4, "metric": "inner_product"}
        local = BrokenIndex() if last else build_index(vectors_ND[:11])
        ShardedIndex(local, offset=rows.start, **whole).search(queries_BD[: rank * 2], 3)
    elif name == "different-metric":
        open_shard(vectors_ND, metric="l2" if last else "inner_product", **place).search(queries_BD, 3)
    elif name == "whole-on-each":
        whole = {"offset": 0, "num_vectors": 101, "dimension": 4, "metric": "inner_product"}
        ShardedIndex(build_index(vectors_ND), **whole).search(queries_BD, 3)
    else:
        index = open_shard(vectors_ND, **place)
        if name == "nan" and last:
            queries_BD[1, 2] = torch.nan
        if name == "dimension" and last:
            queries_BD = torch.ones(2, 5)
        num_passages = {"too-many": 102, "different-k": 4}.get(name, 3) if last else 3
        index.search(queries_BD, num_passages)


def run_process(rank: int, world_size: int, folder: Path, device: str, backend: str) -> None:
    """Runs all cases, each wrong call followed by a right one; writes ``rank<rank>.npz`` and ``rank<rank>.json``."""
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    file = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, init_method=file, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    found: dict[str, np.ndarray] = {}
    errors: dict[str, tuple[str, str]] = {}

    def answer(name: str, case: Case) -> None:
        index = open_shard(
            case.vectors(),
            rank=rank,
            world_size=world_size,
            factory=case.factory,
            metric=case.metric,
            nprobe=case.nprobe,
            device=device if case.factory == "exact" else None,
        )
        queries_BD = case.queries()[rank].to(device).requires_grad_()
        scores_BK, ids_BK = index.search(queries_BD, case.num_passages)
        assert scores_BK.device == ids_BK.device == queries_BD.device
        assert not scores_BK.requires_grad
        found[f"{name}/scores"], found[f"{name}/ids"] = scores_BK.cpu().numpy(), ids_BK.cpu().numpy()

    for name, case in (named_cases(world_size) | random_cases(world_size)).items():
        answer(name, case)
    for name in wrong_calls(world_size):
        try:
            search_wrongly(name, rank, world_size)
        except Exception as error:
            errors[name] = (type(error).__name__, str(error))
        answer(f"after-{name}", named_cases(world_size)["uneven-inner_product"])
    np.savez(folder / f"rank{rank}.npz", **found)
    (folder / f"rank{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


# ---------------------------------------------------------------------- the tests


@dataclass(frozen=True)
class Answers:
    """What the processes of one group wrote."""

    world_size: int
    found: list[dict[str, np.ndarray]]
    errors: list[dict[str, tuple[str, str]]]

    def of(self, name: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Scores and ids of the questions of all processes, in rank order; each process's are its own batch's."""
        parts = [(rank[f"{name}/scores"], rank[f"{name}/ids"]) for rank in self.found]
        for (scores, ids), batch in zip(parts, case.batches, strict=True):
            assert scores.shape == ids.shape == (batch, case.num_passages)
            assert (scores.dtype, ids.dtype) == (np.float32, np.int64)
        scores_BK, ids_BK = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return scores_BK, ids_BK


def run_group(world_size: int, folder: Path, device: str = "cpu", backend: str = "gloo") -> Answers:
    """Starts the processes; when one fails or hangs, all are ended and its words are shown."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = [str(world_size), str(folder), device, backend]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            _, words = process.communicate(timeout=200)
            assert process.returncode == 0, words[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    found = []
    for rank in range(world_size):
        with np.load(folder / f"rank{rank}.npz") as arrays:
            found.append(dict(arrays))
    errors = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world_size)]
    return Answers(world_size, found, errors)


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda world_size: f"{world_size}-processes")
def answers(request, tmp_path_factory):
    return run_group(request.param, tmp_path_factory.mktemp("shards"))


def full_sort(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """float64 and a stable sort of all rows: equal scores stay in the order of the rows."""
    queries = torch.cat(case.queries()).double().numpy()
    vectors = case.vectors().double().numpy()
    scores = np.stack([[_score(query, vector, case.metric) for vector in vectors] for query in queries])
    order = np.argsort(-scores, axis=1, kind="stable")[:, : case.num_passages]
    return np.take_along_axis(scores, order, axis=1), order


def _score(query: np.ndarray, vector: np.ndarray, metric: str) -> float:
    if metric == "l2":
        return -float(((query - vector) ** 2).sum())
    product = float((query * vector).sum())
    return product / float(np.sqrt((query**2).sum() * (vector**2).sum())) if metric == "cosine" else product


def whole_index(case: Case) -> tuple[np.ndarray, np.ndarray]:
    index = build_index(case.vectors(), factory=case.factory, metric=case.metric, nprobe=case.nprobe)
    scores_BK, ids_BK = index.search(torch.cat(case.queries()), case.num_passages)
    return scores_BK.numpy(), ids_BK.numpy()


def assert_is_one_index(answers: Answers, name: str, case: Case) -> None:
    scores_BK, ids_BK = answers.of(name, case)
    if len(ids_BK) > 0:
        expected_scores, expected_ids = full_sort(case)
        np.testing.assert_array_equal(ids_BK, expected_ids, err_msg=name)
        np.testing.assert_allclose(scores_BK, expected_scores, rtol=1e-5, atol=1e-5, err_msg=name)
    whole_scores, whole_ids = whole_index(case)
    np.testing.assert_array_equal(ids_BK, whole_ids, err_msg=name)
    if case.factory == "exact":  # to the last bit: the scores do not depend on how the rows are cut
        np.testing.assert_array_equal(scores_BK.view(np.int32), whole_scores.view(np.int32), err_msg=name)


def test_shards_are_one_index(answers):
    cases = {name: case for name, case in named_cases(answers.world_size).items() if name != "lists-one"}
    assert len(cases) == 18
    for name, case in cases.items():
        assert_is_one_index(answers, name, case)


def test_random_shapes_are_one_index(answers):
    cases = random_cases(answers.world_size)
    assert any(case.num_vectors < answers.world_size for case in cases.values())
    assert sum(0 in case.batches for case in cases.values()) > 20
    for name, case in cases.items():
        assert_is_one_index(answers, name, case)


@pytest.mark.parametrize("metric", METRICS)
def test_equal_scores_of_different_shards_come_by_ascending_row(answers, metric):
    name = f"ties-{metric}"
    case = named_cases(answers.world_size)[name]
    scores_BK, ids_BK = answers.of(name, case)
    # 25 of 60 rows of which each is one of 3: runs of equal scores, with rows of every shard among them
    first_shard = -(-case.num_vectors // answers.world_size)
    for scores, ids in zip(scores_BK, ids_BK, strict=True):
        equal = scores[1:] == scores[:-1]
        assert equal.sum() >= 22
        assert (np.diff(ids)[equal] > 0).all()
        assert (np.diff(ids // first_shard)[equal] > 0).any()


def test_an_approximate_shard_that_finds_too_few_leaves_gaps_at_the_end(answers):
    case = named_cases(answers.world_size)["lists-one"]
    scores_BK, ids_BK = answers.of("lists-one", case)
    vectors, queries = case.vectors().double().numpy(), torch.cat(case.queries()).double().numpy()
    assert (ids_BK == -1).any()
    for scores, ids, query in zip(scores_BK, ids_BK, queries, strict=True):
        num_found = int((ids >= 0).sum())
        assert num_found > 0
        assert len(set(ids[:num_found])) == num_found
        assert (ids[num_found:] == -1).all()
        assert (scores[num_found:] == -np.inf).all()
        np.testing.assert_allclose(scores[:num_found], vectors[ids[:num_found]] @ query, rtol=1e-5, atol=1e-5)
        assert (np.diff(scores[:num_found]) <= 0).all()
        # one list of each shard was visited: every shard has its say
        parts = [shard(case.num_vectors, rank, answers.world_size) for rank in range(answers.world_size)]
        assert all(any(row in part for row in ids[:num_found]) for part in parts)


EXPECTED = {
    "nan": ("DataError", "NaN or infinity in 1 of {batch} queries (rows [1])"),
    "too-many": ("ConfigError", "num_passages: expected 1 to 101, the passages in the index; came 102."),
    "dimension": ("ConfigError", "expected dimension 4, that of the index; came 5"),
    "zero-without-rows": ("DataError", "expected query vectors of non-zero length, came 1 zero vector(s) of {batch}"),
    "different-k": (
        "ConfigError",
        "same num_passages from every process, came [{threes}, 4] in rank order",
    ),
    "different-metric": ("ConfigError", "expected the same metric from every process, came ['inner_product', "),
    "whole-on-each": ("ConfigError", "rows 0..100, each once and in rank order; came 0..100, 0..100"),
    "small-list": ("ConfigError", "index factory 'IVF51,Flat': expected one that FAISS accepts for 50 x 4 vectors"),
    "other-rank": ("ConfigError", "shard: expected rank 1 of the 2 processes that run, came rank 0 of 2."),
}


def test_an_error_of_one_process_is_raised_on_all(answers):
    """And the group is still in step: the search after it is right."""
    last = answers.world_size - 1
    names = [name for name in wrong_calls(answers.world_size) if name != "broken-shard"]
    assert len(names) == {2: 9, 3: 7}[answers.world_size]
    for name in names:
        kind, words = EXPECTED[name]
        words = words.format(batch=2 + last, threes=", ".join(["3"] * last))
        for errors in answers.errors:
            assert errors[name][0] == kind, (name, errors[name])
            assert words in errors[name][1], (name, errors[name])
        own = answers.errors[last][name][1]
        if name not in ("different-k", "different-metric", "whole-on-each"):  # all see these alike
            expected = f"sharded index: process {last} failed, and with it all others: {kind}: {own}"
            assert answers.errors[0][name][1] == expected
    right = named_cases(answers.world_size)["uneven-inner_product"]
    for name in wrong_calls(answers.world_size):
        assert_is_one_index(answers, f"after-{name}", right)


def test_a_shard_that_fails_reaches_also_a_process_without_questions(answers):
    """Rank 0 asks nothing and waits for no candidate: it raises with the others, not in a later search."""
    last = answers.world_size - 1
    assert answers.errors[last]["broken-shard"] == ["RuntimeError", "out of memory"]
    words = f"sharded index: process {last} failed, and with it all others: RuntimeError: out of memory"
    for errors in answers.errors[:last]:
        assert errors["broken-shard"] == ["RagError", words]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_shards_on_gpus_are_one_index(backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL wants a GPU for each process")
    answers = run_group(2, tmp_path, device="cuda", backend=backend)
    for name, case in (named_cases(2) | random_cases(2)).items():
        if case.factory == "exact":
            scores_BK, ids_BK = answers.of(name, case)
            expected_scores, expected_ids = whole_index(case)
            np.testing.assert_array_equal(ids_BK, expected_ids, err_msg=name)
            np.testing.assert_allclose(scores_BK, expected_scores, rtol=1e-5, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
