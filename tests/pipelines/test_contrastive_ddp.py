"""Contrastive training in two and three processes takes the steps of one: losses, gradients, weights.

The processes run this file. Batches are uneven, the last one leaves fillers, and everything is in float64, so that only
a wrong gradient differs.
"""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.corpora.questions import read_questions
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.training.examples import Collator, QuestionExamples
from rag_lightning.training.loader import BatchLoader
from rag_lightning.training.objectives import Contrastive, Sources
from rag_lightning.types import QuestionBatch
from rag_lightning.utils import distributed

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[2]
BATCH_SIZE = 5


class Loss(nn.Module):
    """The objective as one module for DDP to wrap; reduces as the Lightning module does."""

    def __init__(self, model: RagModel, objective: Contrastive, sources: Sources) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.sources = sources

    def forward(self, batch: QuestionBatch) -> tuple[Tensor, Tensor]:
        """Returns the loss to differentiate, and each question's."""
        loss_B = self.objective(self.model, batch, self.sources).loss_B
        return (loss_B * batch.weights_B).sum() * distributed.world_size() / BATCH_SIZE, loss_B.detach()


def train(folder: Path, passages: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains one epoch by gradient descent; returns the real questions' losses, the gradients, and the weights."""
    model = RagModel.from_pretrained(folder / "model").double().train()
    model.generator.requires_grad_(False)
    corpus = PassageCorpus.read(passages)
    questions = read_questions(folder / "train.jsonl", corpus=corpus)
    objective = Contrastive(**settings)
    encoder = model.encoder
    assert encoder is not None
    assembler = ContextAssembler(corpus=corpus, tokenizer=model.generator.tokenizer, prompt=model.prompt)
    loader = BatchLoader(
        QuestionExamples(questions, corpus, with_passage=True, num_negatives=objective.num_negatives),
        Collator(model, passage_tokens=PassageTokens(encoder=encoder, corpus=corpus)),
        batch_size=BATCH_SIZE,
        shuffle=True,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    loss: nn.Module = Loss(model, objective, Sources(assembler))
    if distributed.world_size() > 1:
        loss = DistributedDataParallel(loss)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.3)
    losses: list[list[float]] = []
    gradients: list[dict[str, Tensor]] = []
    for batch in loader:
        optimizer.zero_grad()
        total, loss_B = loss(batch)
        total.backward()
        losses.append(loss_B[batch.weights_B > 0].tolist())
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
        optimizer.step()
    return {"losses": losses, "gradients": gradients, "weights": encoder.state_dict()}


@pytest.fixture
def prepared(tiny_model, tiny_questions, tmp_path, json_lines):
    """11 questions in batches of 5, 5 and 1, three of them about one film; hard negatives that are gold for others."""

    def build(*, shared: bool = False) -> Path:
        tiny_model(shared=shared).save_pretrained(tmp_path / "model")
        rows = [dict(row) for row in tiny_questions[:11]]
        for place, row in enumerate(rows):
            row["positive_passage_ids"] = [f"film-{0 if place in (3, 7, 9) else place}"]
            wanted = [f"film-{(place + step) % 24}" for step in (1, 2, 12, 13)][: place % 5]
            row["negative_passage_ids"] = [one for one in wanted if one not in row["positive_passage_ids"]]
        json_lines(tmp_path / "train.jsonl", rows)
        return tmp_path

    return build


def several(folder: Path, passages: Path, settings: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    """Returns what each of several processes found."""
    (folder / "store").unlink(missing_ok=True)
    arguments = [str(world_size), str(folder), str(passages), json.dumps(settings)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},  # a script sees its own folder only
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def run_process(rank: int, world_size: int, folder: Path, passages: Path, settings: dict[str, Any]) -> None:
    """What each process does."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    torch.save(train(folder, passages, settings), folder / f"{rank}.pt")
    dist.destroy_process_group()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("world_size", "shared", "settings"),
    [
        (2, False, {}),
        (3, True, {"hard_negatives": 2}),
        (3, False, {"hard_negatives": 1, "cache_chunk": 2}),  # processes of unlike numbers of chunks
    ],
)
def test_several_processes_take_the_steps_of_one(world_size, shared, settings, prepared, tiny_world):
    folder = prepared(shared=shared)
    one = train(folder, tiny_world.passages, settings)
    parts = several(folder, tiny_world.passages, settings, world_size)
    assert [len(losses) for losses in one["losses"]] == [5, 5, 1]
    for number, losses in enumerate(one["losses"]):
        close(torch.tensor([loss for found in parts for loss in found["losses"][number]]), torch.tensor(losses))
    assert max(float(value.abs().max()) for value in one["gradients"][0].values()) > 1e-2
    for found in parts:
        for mine, other in zip(found["gradients"], one["gradients"], strict=True):
            close(mine, other)
        close(found["weights"], one["weights"])
    alone = one["losses"][2][0]
    assert (alone == 0.0) == (not settings)  # one question has nothing to be contrasted with but hard negatives


def test_without_sharing_a_step_depends_on_the_processes(prepared, tiny_world):
    """What the test above would find if passages were not gathered."""
    folder = prepared()
    one = train(folder, tiny_world.passages, {"cross_process": False})
    assert one["losses"] == train(folder, tiny_world.passages, {})["losses"]  # one process shares with itself
    parts = several(folder, tiny_world.passages, {"cross_process": False}, 2)
    losses = [loss for found in parts for loss in found["losses"][0]]
    assert all(mine < whole - 1e-3 for mine, whole in zip(losses, one["losses"][0], strict=True))  # fewer negatives


# ---------------------------------------------------------------------- the command line

OVERRIDES = [
    "objective=contrastive",
    "objective.hard_negatives=1",
    "objective.cache_chunk=2",
    "trainer.max_steps=4",
    "trainer.log_every_n_steps=1",
    "optim.train_passage_encoder=true",
    "optim.warmup_steps=0",
    "optim.lr_query_encoder=1e-2",
    "optim.lr_passage_encoder=1e-2",
    "optim.eps=1e-3",  # a denominator of 1e-8 would magnify rounding
    "callbacks=no_validation",
    "data.validation=null",
    "data.batch_size=3",
]


def test_the_command_line_in_two_processes_is_the_one_of_one(
    cli, prepared, tiny_model_overrides, tiny_data_overrides, tmp_path
):
    """A batch of 3 for 2 processes: a process with one question was once refused, as it had nothing of its own."""
    folder = prepared()
    usual = [*tiny_model_overrides, *tiny_data_overrides, *OVERRIDES, f"data.train={folder / 'train.jsonl'}"]
    cli("train", tmp_path / "one", *usual)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "rag_lightning", "train", *usual, "trainer.strategy=ddp", "trainer.devices=2",
         f"hydra.run.dir={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    columns = []
    for run in (tmp_path / "one", tmp_path / "two"):
        with (run / "logs" / "version_0" / "metrics.csv").open() as stream:
            columns.append([float(row["train/loss"]) for row in csv.DictReader(stream) if row.get("train/loss")])
    assert len(columns[0]) == 4
    assert columns[1] == pytest.approx(columns[0], rel=1e-4)
    for file in sorted((tmp_path / "one" / "model" / "encoder").rglob("*.safetensors")):
        other = load_file(tmp_path / "two" / file.relative_to(tmp_path / "one"))
        for name, value in load_file(file).items():
            torch.testing.assert_close(
                other[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


if __name__ == "__main__":
    run_process(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), json.loads(sys.argv[5]))
