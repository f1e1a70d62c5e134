"""A tiny run of tasks: data, module and trainer."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.heads.model import HeadedModel, RetrievalSettings
from rag_lightning.training.optim import OptimSettings
from rag_lightning.training.tasks.activities import TrainingActivity
from rag_lightning.training.tasks.data import EXAMPLES, TaskDataModule
from rag_lightning.training.tasks.module import TaskLightningModule
from rag_lightning.training.tasks.task import Task
from tests.unit.heads import tiny


def sst2(folder, **changes):
    base = folder / "sst2"
    return Task(
        **{
            "name": "sst2", "kind": "classification", "train": str(base / "train.jsonl.gz"),
            "validation": str(base / "dev.jsonl.gz"), "test": str(base / "test.jsonl.gz"),
            "fields": {"label_names": {"0": "bad", "1": "good"}}, **changes,
        }
    )  # fmt: skip


def wikigold(folder):
    base = folder / "wikigold"
    return Task(
        name="wikigold", kind="tagging", form="tagged", monitor="f1", train=str(base / "train.jsonl.gz"),
        validation=str(base / "dev.jsonl.gz"), test=str(base / "test.jsonl.gz"),
    )  # fmt: skip


class Run:
    """Data, module and trainer of a tiny run."""

    def __init__(
        self,
        root,
        tasks,
        *,
        num_passages=0,
        steps=40,
        callbacks=(),
        lr=1e-2,
        seed=0,
        activities=None,
        num_layers=1,
        **data,
    ):
        self.data = TaskDataModule(
            tasks=tasks, passages=EXAMPLES if num_passages else None, batch_size=8, seed=seed,
            index_dir=str(root / "index"), allow_unknown=True, **data,
        )  # fmt: skip
        torch.manual_seed(seed)
        reader = tiny.reader(num_layers=num_layers)
        heads = {task.name: task.head(reader.width, len(self.data.labels[task.name])) for task in tasks}
        self.model = HeadedModel(
            reader=reader, heads=heads, encoder=tiny.encoder() if num_passages else None,
            settings=RetrievalSettings(num_passages=num_passages, temperature=0.1),
        ).float()  # fmt: skip
        rates = OptimSettings(lr_reader=lr, lr_heads=lr, lr_query_encoder=lr, schedule="constant")
        labels = {name: tuple(found.to_list()) for name, found in self.data.labels.items()}
        chosen = {name: TrainingActivity(**{"task": tasks[0].name, **one}) for name, one in (activities or {}).items()}
        self.module = TaskLightningModule(
            model=self.model, tasks=tasks, labels=labels, optim=rates, activities=chosen or None
        )
        self.data.bind(self.model)
        self.trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks), callbacks=list(callbacks),
            limit_val_batches=0, default_root_dir=str(root), use_distributed_sampler=False, max_epochs=-1,
        )  # fmt: skip

    def fit(self, checkpoint=None):
        self.trainer.fit(self.module, datamodule=self.data, ckpt_path=checkpoint, weights_only=True)
        return self

    def test(self):
        parts = self.trainer.test(self.module, datamodule=self.data, verbose=False)  # one for each task, the same
        return parts[0]
