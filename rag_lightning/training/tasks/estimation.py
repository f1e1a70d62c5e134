"""Edges between activities, measured before training: whose gradients point one way, or who helps whom."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.curriculum.estimate import graph_from_gradients, graph_from_transfer
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.training.tasks.data import EXAMPLES, TaskDataModule
from rag_lightning.training.tasks.module import TaskLightningModule, example_losses
from rag_lightning.utils.seeding import rng_at

Estimate = Literal["gradients", "transfer"]


def estimated_graph(
    module: TaskLightningModule,
    data: TaskDataModule,
    nodes: Mapping[str, Any],
    *,
    by: Estimate,
    num_batches: int = 4,
    num_steps: int = 10,
    probe_size: int = 64,
) -> ActivityGraph:
    """Returns a graph of the run's tasks whose edges are measured at the weights as they are, which stay so.

    Without dropout, so that the same weights and seed give the same edges.

    Args:
        module: Whose activities are its tasks.
        data: Bound to its model.
        nodes: Settings of the nodes, see :meth:`ActivityGraph.from_dict`.
        by: ``gradients``: cosines between the reader's gradients of ``num_batches`` batches of each task. ``transfer``:
            how much further a target's held-out loss falls by ``num_steps`` steps on it where a step on the source
            goes before each.
        num_batches: See ``by``.
        num_steps: See ``by``.
        probe_size: Held-out examples of each target (transfer).

    Raises:
        ConfigError: A reader that does not learn has no gradients.
        DataError: No validation examples to measure transfer with, or a gradient or gain that is not finite.
    """
    data.ensure_index()
    module.eval()
    try:
        return _measured(module, data, nodes, by, num_batches, num_steps, probe_size)
    finally:
        module.train()


def _measured(
    module: TaskLightningModule,
    data: TaskDataModule,
    nodes: Mapping[str, Any],
    by: Estimate,
    num_batches: int,
    num_steps: int,
    probe_size: int,
) -> ActivityGraph:
    if by == "gradients":
        gradients = {name: _gradients(module, data, name, num_batches) for name in module.tasks}
        return graph_from_gradients(gradients, nodes)
    names = list(module.tasks)
    _check_held_out(data, names)
    numbers = range(num_steps)
    alone = {
        target: _loss_after(module, data, [(target, number) for number in numbers], target, probe_size)
        for target in names
    }
    gains = {
        (source, target): alone[target]
        - _loss_after(
            module,
            data,  # the source's batches are never the target's, if they are one task
            [step for number in numbers for step in ((source, num_steps + number), (target, number))],
            target,
            probe_size,
        )
        for source in names
        for target in names
    }
    return graph_from_transfer(gains, nodes)


def _check_held_out(data: TaskDataModule, names: Sequence[str]) -> None:
    without = [name for name in names if not data.examples[name].get("validation")]
    if without:
        raise DataError(
            f"curriculum.estimate: expected validation examples of each task to measure transfer with, came none of "
            f"{', '.join(without)}. Give task.tasks.NAME.validation or validation_share, or estimate by gradients."
        )


def _gradients(
    module: TaskLightningModule, data: TaskDataModule, task: str, num_batches: int
) -> list[Float[Tensor, " _"]]:
    shared = [parameter for parameter in module.model.reader.parameters() if parameter.requires_grad]
    if not shared:
        raise ConfigError(
            "curriculum.estimate: expected a reader that learns, whose gradients are compared, got "
            "optim.train_reader=false. Estimate by transfer, or give edges."
        )
    found = []
    for number in range(num_batches):
        loss = _loss(module, data, task, number)
        gradients = torch.autograd.grad(loss, shared, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in gradients if g is not None]).detach())
    return found


def _loss_after(
    module: TaskLightningModule, data: TaskDataModule, trained: Sequence[tuple[str, int]], target: str, probe_size: int
) -> float:
    """Returns the held-out loss of a target after a short training by plain AdamW, whose weights are then put back."""
    kept = copy.deepcopy(module.model.state_dict())
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "lr": getattr(module.optim, f"lr_{name}")}
        for name, part in module.model.parts().items()
        if name in module.trained
    ]
    optimizer = torch.optim.AdamW(groups)
    try:
        for task, number in trained:
            optimizer.zero_grad()
            _loss(module, data, task, number).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            return float(_loss(module, data, target, 0, split="validation", size=probe_size))
    finally:
        module.model.load_state_dict(kept)
        module.zero_grad(set_to_none=True)


def _loss(
    module: TaskLightningModule,
    data: TaskDataModule,
    task: str,
    number: int,
    *,
    split: str = "train",
    size: int | None = None,
) -> Tensor:
    """Returns the mean loss of examples drawn for a number; nothing is taken from the training order."""
    examples = data.examples[task][split]
    rows = rng_at(data.seed, "estimate", task, split, number).sample(
        range(len(examples)), min(size if size is not None else data.batch_size, len(examples))
    )
    chosen = [examples[row] for row in rows]
    own = rows if split == "train" and data.passages == EXAMPLES else [-1] * len(rows)
    batch = data.batch(task, chosen, [1.0] * len(rows), own).to(module.device)
    output = module.model(batch.task, batch.examples, data.retriever, batch.forbidden_ids)
    loss_B, units_B = example_losses(output, batch.labels)
    return loss_B.sum() / units_B.sum().clamp(min=1)
