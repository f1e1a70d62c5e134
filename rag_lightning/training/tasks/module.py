"""TaskLightningModule: the step of labelled tasks, plain or retrieval-augmented, one task or several."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, NonFiniteLossError
from rag_lightning.heads.model import HeadedModel, HeadOutput, PassageChange
from rag_lightning.heads.reading import TaskExample
from rag_lightning.methods.augmentation import BatchAugmentation, ChangedPassages
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.metrics.classes import ClassMetrics
from rag_lightning.metrics.spans import SpanMetrics
from rag_lightning.training.module import check_shapes
from rag_lightning.training.optim import (
    OptimSettings,
    build_optimizer,
    build_scheduler,
    freeze_all_but,
)
from rag_lightning.training.tasks.activities import TrainingActivity
from rag_lightning.training.tasks.data import EXAMPLES, IGNORED, TaskBatch, TaskDataModule
from rag_lightning.training.tasks.task import Task
from rag_lightning.types import TaggedSentence
from rag_lightning.utils import distributed
from rag_lightning.utils.seeding import rng_at

PARTS = ("reader", "heads", "query_encoder")
"""What learns; the passage tower stays as its index was built."""


@dataclass(frozen=True, slots=True)
class TaskPrediction:
    """What a head said of a test example.

    Attributes:
        task: Whose head.
        id: The example's.
        expected: Its label, or tags.
        predicted: The likeliest.
        probability: Of what was predicted; of tags the least.
        passages: Ids of the passages read, with ``p(z | x)``; empty for plain heads.
    """

    task: str
    id: str
    expected: str | tuple[str, ...]
    predicted: str | tuple[str, ...]
    probability: float
    passages: tuple[tuple[str, float], ...] = ()


class TaskLightningModule(L.LightningModule):
    """Trains a :class:`~rag_lightning.heads.model.HeadedModel`.

    The loss is ``-log p(y|x)``, a mean over the judged places (texts, or words of tagged sentences) of a step over all
    processes.

    Args:
        model: Reader, heads, and the towers that search.
        tasks: As the data module's.
        labels: Names of each task's labels.
        optim: Who learns and how fast.
        activities: What a step can be spent on, by name; each task, by default.

    Raises:
        ConfigError: An activity changes passages that plain heads do not have.
    """

    def __init__(
        self,
        *,
        model: HeadedModel,
        tasks: Sequence[Task],
        labels: dict[str, tuple[str, ...]],
        optim: OptimSettings,
        activities: Mapping[str, TrainingActivity] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tasks = {task.name: task for task in tasks}
        self.labels = labels
        self.optim = optim
        self.trained = optim.trained_parts([part for part in PARTS if part in model.parts()])
        freeze_all_but(model, self.trained)
        self.metrics = nn.ModuleDict({name: _metrics(task, labels[name]) for name, task in self.tasks.items()})
        self.predictions: list[TaskPrediction] = []
        self.tag_reports: dict[str, Any] = {}
        self.walk: Walk | None = None
        self.activities = dict(activities or {name: TrainingActivity(task=name) for name in self.tasks})
        self._augmentations: dict[str, list[BatchAugmentation]] = {}
        self._activity: tuple[int, str] | None = None
        changing = [name for name, one in self.activities.items() if one.passages is not None]
        if changing and model.settings.num_passages == 0:
            raise ConfigError(
                f"curriculum.graph.nodes.{changing[0]}.passages: expected heads that retrieve, these are plain: set "
                "task.retrieval.num_passages, or leave it out"
            )
        self.train()

    @property
    def data(self) -> TaskDataModule:
        """The data module, which draws batches and owns the index."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, TaskDataModule)
        return datamodule

    def on_fit_start(self) -> None:
        """Builds or opens the index, once the model is where it will be and a checkpoint has been read.

        Makes ready what alters examples, too: a lexicon that is not there is missed before training, not in it.
        """
        self.data.ensure_index()
        mask: str | None = self.model.reader.tokenizer.mask_token
        for name, activity in self.activities.items():
            self._check_passages(name, activity)
            train = self.data.examples[activity.task]["train"]
            self._augmentations[name] = [
                one.build(mask=mask, train=train, device=self.device) for one in activity.augment
            ]

    def _check_passages(self, name: str, activity: TrainingActivity) -> None:
        num_negatives = activity.passages.hard_negatives if activity.passages is not None else 0
        if num_negatives == 0:
            return
        place = f"curriculum.graph.nodes.{name}.passages.hard_negatives={num_negatives}"
        if num_negatives >= self.model.settings.num_passages:
            raise ConfigError(
                f"{place}: expected fewer than task.retrieval.num_passages={self.model.settings.num_passages}"
            )
        if self.data.passages != EXAMPLES or self.tasks[activity.task].kind == "tagging":
            raise ConfigError(
                f"{place}: expected task.passages=examples of a task with one label for each, as a passage's label "
                "says that it is wrong. Leave it out."
            )

    def on_validation_start(self) -> None:
        """Opens the index, where a model is validated without training."""
        self.data.ensure_index()

    def on_test_start(self) -> None:
        """Opens the index again, since the best checkpoint has been read."""
        self.data.ensure_index()

    def next_activity(self) -> TrainingActivity:
        """Returns what this optimiser step is spent on: as the walk goes, or each in turn without one."""
        if self._activity is None or self._activity[0] != self.global_step:
            names = list(self.activities)
            name = self.walk.next() if self.walk is not None else names[self.global_step % len(names)]
            self._activity = (self.global_step, name)
        return self.activities[self._activity[1]]

    def resume_activity(self, name: str) -> None:
        """Goes on with an activity that was chosen for this optimiser step and not finished."""
        self._activity = (self.global_step, name)

    def _drawn(self, batch_idx: int) -> list[tuple[TaskBatch, PassageChange | None]]:
        """Returns the step's batches, altered as its activity says."""
        activity = self.next_activity()
        assert self._activity is not None
        name = self._activity[1]
        drawn: list[tuple[TaskBatch, PassageChange | None]] = []
        for number in range(activity.batches):
            rng = rng_at(self.data.seed, "activity", self.global_step, batch_idx, number, self.global_rank)
            batch = self.data.draw(activity.task)
            if activity.augment:
                examples = list(batch.examples)
                for augment in self._augmentations[name]:
                    examples = augment(examples, rng)
                weights, forbidden = batch.weights_B.tolist(), batch.forbidden_ids.tolist()
                batch = self.data.batch(activity.task, examples, weights, forbidden)
            change = ChangedPassages(activity.passages, rng) if activity.passages is not None else None
            drawn.append((batch.to(self.device), change))
        return drawn

    # ------------------------------------------------------------------ training

    def training_step(self, step: int, batch_idx: int) -> Tensor:
        """Draws a batch of the step's task and returns its loss; refuses one that is not finite."""
        self.data.begin_step()
        name = self.next_activity().task
        examples: list[TaskExample] = []
        sums: list[Tensor] = []
        for batch, change in self._drawn(batch_idx):
            loss_B, units_B = example_losses(self.judge(batch, change), batch.labels)
            sums.append(torch.stack([(loss_B * batch.weights_B).sum(), (units_B * batch.weights_B).sum()]))
            examples += batch.examples
        totals = torch.stack(sums).sum(dim=0)
        summed = self.trainer.strategy.reduce(totals.detach(), reduce_op="sum")
        mean = float(summed[0] / summed[1].clamp(min=1))
        if not math.isfinite(mean):
            ids = ", ".join(example.id for example in examples[:8])
            raise NonFiniteLossError(
                f"the loss of task {name} is not finite at step {self.global_step} (examples {ids}, …). The weights "
                "are as they were before this step and the last checkpoint is kept. Lower the learning rates, or look "
                "at these examples."
            )
        self.log_dict({"train/loss": mean, f"train/{name}/loss": mean}, batch_size=len(examples), prog_bar=True)
        loss: Tensor = totals[0] * self.trainer.world_size / summed[1].clamp(min=1)
        for parameter in self._idle(name):
            loss = loss + 0.0 * parameter.sum()  # distributed training waits for a gradient of each
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lets the heads of other tasks and what is out of the activity's scope rest: no weight decay, no momentum."""
        activity = self.next_activity()
        for parameter in self._idle(activity.task):
            parameter.grad = None
        for group in optimizer.param_groups:
            part, depth = group["name"].split("/")[0], group["depth"]
            group["lr"] *= activity.layer_decay**depth  # until the schedule sets it for the next step
            if not activity.moves(part, depth):
                for parameter in group["params"]:
                    parameter.grad = None

    def _idle(self, task: str) -> list[nn.Parameter]:
        return [
            parameter
            for name, head in self.model.heads.items()
            if name != task
            for parameter in head.parameters()
            if parameter.requires_grad
        ]

    def judge(self, batch: TaskBatch, change: PassageChange | None = None) -> HeadOutput:
        """Returns what the task's head says of a batch, the passages found changed where a training step says so."""
        output: HeadOutput = self.model(batch.task, batch.examples, self.data.retriever, batch.forbidden_ids, change)
        return output

    # ------------------------------------------------------------------ evaluation

    def on_validation_epoch_start(self) -> None:
        """Forgets the last epoch."""
        self._start()

    def on_test_epoch_start(self) -> None:
        """Forgets the last epoch."""
        self._start()

    def validation_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judges a batch and counts."""
        self._measure(batch)

    def test_step(self, batch: TaskBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Judges a batch and counts."""
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's metrics."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Logs the epoch's metrics."""
        self._finish("test")

    def _start(self) -> None:
        self.predictions = []
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]

    def _measure(self, batch: TaskBatch) -> None:
        output, names = self.judge(batch), self.labels[batch.task]
        corpus = self.data.retriever.corpus if self.data.retriever is not None else None
        real = [row for row, weight in enumerate(batch.weights_B.tolist()) if weight > 0]
        metric: Any = self.metrics[batch.task]
        for row in real:
            prediction = _prediction(batch, output, row, names, corpus)
            self.predictions.append(prediction)
            if isinstance(prediction.expected, tuple):
                metric.update([prediction.predicted], [prediction.expected])
        if real and batch.labels.ndim == 1:
            metric.update(output.log_probs[real].argmax(dim=1), batch.labels[real])

    def _finish(self, stage: str) -> None:
        figures: dict[str, Tensor] = {}
        chosen_by: list[Tensor] = []
        split = "validation" if stage == "val" else "test"
        for name, task in self.tasks.items():
            if split not in self.data.examples[name]:
                continue
            metric: Any = self.metrics[name]
            if isinstance(metric, SpanMetrics):
                with metric.sync_context():
                    self.tag_reports[name] = asdict(metric.tag_report())
            values = {key: value.float().to(self.device) for key, value in metric.compute().items()}
            figures |= {f"{stage}/{name}/{key}": value for key, value in values.items()}
            if len(self.tasks) == 1:
                figures |= {f"{stage}/{key}": value for key, value in values.items()}
            if task.monitor in values:
                chosen_by.append(values[task.monitor])
            if stage == "test":
                figures |= {f"test/{name}/majority_{key}": value for key, value in self._majority(name).items()}
        if len(self.tasks) > 1 and chosen_by:
            figures[f"{stage}/mean"] = torch.stack(chosen_by).mean()
        self.log_dict(figures, sync_dist=True)  # the same in all processes already

    def _majority(self, name: str) -> dict[str, Tensor]:
        """Returns what is reached on a task's test by always saying the commonest label of the training examples."""
        task, names = self.tasks[name], self.labels[name]
        metric: Any = _metrics(task, names).to(self.device)
        train, test = (self.data.examples[name][split] for split in ("train", "test"))
        commonest = Counter(label for example in train for label in labels_of(example)).most_common(1)[0][0]
        if task.kind == "tagging":
            expected = [labels_of(example) for example in test]
            metric.update([[commonest] * len(tags) for tags in expected], expected)
        else:
            numbers = torch.tensor([names.index(label) for example in test for label in labels_of(example)])
            metric.update(torch.full_like(numbers, names.index(commonest)), numbers)
        figures: dict[str, Tensor] = metric.compute()
        return {key: value.float().to(self.device) for key, value in figures.items()}

    # ------------------------------------------------------------------ optimiser and checkpoints

    @property
    def _by_layer(self) -> bool:
        return any(one.layer_decay != 1 or one.scope == "top" for one in self.activities.values())

    def configure_optimizers(self) -> Any:
        """Returns AdamW with one group for each part, and its schedule, stepped every optimiser step."""
        optimizer = build_optimizer(self.model, self.optim, by_layer=self._by_layer)
        scheduler = build_scheduler(optimizer, self.optim, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train(self, mode: bool = True) -> "TaskLightningModule":
        """Sets training mode; frozen parts stay in evaluation mode, without dropout."""
        super().train(mode)
        for name, part in self.model.parts().items():
            if name not in self.trained:
                part.eval()
        return self

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of other shapes before anything is overwritten."""
        check_shapes(self.state_dict(), checkpoint["state_dict"])


def labels_of(example: TaskExample) -> tuple[str, ...]:
    """Returns an example's tags, or its one label."""
    return example.tags if isinstance(example, TaggedSentence) else (example.label,)


def example_losses(output: HeadOutput, labels: Int[Tensor, "B *W"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Returns each example's summed ``-log p(y|x)``, and the places that were judged: 1 for a text, words for tags.

    Words that the reader cut off are not judged.
    """
    judged = judged_places(output, labels)
    picked = output.log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~judged, 0.0)
    return -picked.view(len(labels), -1).sum(dim=1), judged.view(len(labels), -1).sum(dim=1).float()


def judged_places(output: HeadOutput, labels: Int[Tensor, "B *W"]) -> Bool[Tensor, "B *W"]:
    """Returns where a label is known and the reader has seen the word."""
    return labels != IGNORED if output.places is None else (labels != IGNORED) & (output.places >= 0)


def _prediction(
    batch: TaskBatch, output: HeadOutput, row: int, names: Sequence[str], corpus: PassageCorpus | None
) -> TaskPrediction:
    example: TaskExample = batch.examples[row]
    best = output.log_probs[row].max(dim=-1)
    passages: tuple[tuple[str, float], ...] = ()
    if output.hits is not None and output.log_prior_BK is not None and corpus is not None:
        found = zip(output.hits.ids_BK[row].tolist(), output.log_prior_BK[row].exp().tolist(), strict=True)
        passages = tuple((corpus[number].id if number >= 0 else "", probability) for number, probability in found)
    if isinstance(example, TaggedSentence):
        assert output.places is not None
        seen = (output.places[row, : len(example.tags)] >= 0).tolist()
        tags = tuple(
            names[number] if there else "O"
            for number, there in zip(best.indices.tolist(), seen, strict=False)  # behind the sentence is padding
        )
        least = float(best.values[: len(tags)].min().exp())
        return TaskPrediction(batch.task, example.id, example.tags, tags, least, passages)
    expected = names[int(batch.labels[row])]
    return TaskPrediction(
        batch.task, example.id, expected, names[int(best.indices)], float(best.values.exp()), passages
    )


def _metrics(task: Task, labels: Sequence[str]) -> nn.Module:
    if task.kind == "tagging":
        return SpanMetrics(labels)
    return ClassMetrics(labels, semeval=task.scoring == "semeval")


def gathered_predictions(module: TaskLightningModule) -> list[TaskPrediction]:
    """Returns every process's predictions of the test, on every process, in the order of the examples."""
    parts = distributed.gather_objects(module.predictions)
    order = {
        (name, example.id): place
        for name, splits in module.data.examples.items()
        for place, example in enumerate(splits.get("test", []))
    }
    return sorted((p for part in parts for p in part), key=lambda p: (p.task, order[p.task, p.id]))
