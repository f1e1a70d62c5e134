"""A walk over activities during training: what a step is spent on, and what it was worth.

After each optimiser step the loss on some held-out examples of the target tasks is measured; the drop since the step
before is the reward of the activity that was trained (Graves et al. 2017, "Automated curriculum learning", §3.2: target
prediction gain). The measure is the mean over all processes, so all processes walk the same path.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.training.tasks.data import TaskBatch, TaskDataModule
from rag_lightning.training.tasks.module import TaskLightningModule, example_losses
from rag_lightning.utils.seeding import rng_at


class WalkCallback(L.Callback):
    """Chooses each step's activity by a walk, rewards it, logs it, and keeps it in the checkpoint.

    Logged besides: ``train/objective``, the loss plus ``alpha`` times :meth:`Walk.expected_reward`. Rewards do not
    depend on the weights as they are now, so that sum has the gradient of the loss.

    Args:
        walk: Over the module's activities.
        targets: Tasks whose held-out loss is the measure; all by default.
        probe_size: Held-out examples of each target.

    Raises:
        ConfigError: A probe without examples.
    """

    def __init__(self, *, walk: Walk, targets: Sequence[str] | None = None, probe_size: int = 64) -> None:
        if probe_size < 1:
            raise ConfigError(f"curriculum.probe_size: expected 1 or more held-out examples, got {probe_size}")
        self.walk = walk
        self.targets = targets
        self.probe_size = probe_size
        self._probes: list[TaskBatch] = []
        self._before = math.nan
        self._rewarded_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the module the walk, and takes the held-out examples.

        Raises:
            ConfigError: The graph's nodes are not the module's activities, or a target is no task of the run.
        """
        if stage != "fit":
            return
        assert isinstance(pl_module, TaskLightningModule)
        names = list(pl_module.tasks)
        if set(self.walk.graph.nodes) != set(pl_module.activities):
            raise ConfigError(
                f"curriculum.graph: expected the run's activities as nodes ({', '.join(pl_module.activities)}), got "
                f"{', '.join(self.walk.graph.nodes)}"
            )
        unknown = [target for target in self.targets or () if target not in names]
        if unknown:
            raise ConfigError(f"curriculum.targets: expected some of {', '.join(names)}, got {', '.join(unknown)}")
        pl_module.walk = self.walk
        self._probes = [self._probe(pl_module.data, name) for name in self.targets or names]

    def _probe(self, data: TaskDataModule, task: str) -> TaskBatch:
        """Returns examples that training never sees, the same for one seed."""
        held_out = data.examples[task].get("validation")
        if not held_out:
            raise DataError(
                f"curriculum: expected validation examples of task {task} to measure rewards with, came none. Give "
                "task.tasks.NAME.validation or validation_share."
            )
        rows = rng_at(data.seed, "probe", task).sample(range(len(held_out)), min(self.probe_size, len(held_out)))
        chosen = [held_out[row] for row in rows]
        return data.batch(task, chosen, [1.0] * len(chosen), [-1] * len(chosen))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measures where training begins, unless it goes on."""
        assert isinstance(pl_module, TaskLightningModule)
        self._rewarded_step = trainer.global_step
        if (unfinished := self.walk.unrewarded) is not None:  # the checkpoint is of a step that failed
            pl_module.resume_activity(unfinished)
        if math.isnan(self._before):
            self._before = self._held_out_loss(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Rewards the activity of an optimiser step that has just been taken."""
        assert isinstance(pl_module, TaskLightningModule)
        if trainer.global_step == self._rewarded_step:
            return
        self._rewarded_step = trainer.global_step
        after = self._held_out_loss(trainer, pl_module)
        reward = self.walk.reward(self._before - after)
        self._before = after
        alpha, expected = self.walk.objective_weight(trainer.global_step - 1), self.walk.expected_reward()
        loss = trainer.callback_metrics["train/loss"]
        pl_module.log_dict(
            {
                "curriculum/held_out_loss": after,
                "curriculum/reward": reward,
                "curriculum/expected_reward": expected,
                "curriculum/alpha": alpha,
                "train/objective": float(loss) + alpha * expected,
                **self.walk.figures(),
            }
        )

    @torch.no_grad()
    def _held_out_loss(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        assert isinstance(pl_module, TaskLightningModule)
        pl_module.eval()
        means: list[Tensor] = []
        for probe in self._probes:
            batch = probe.to(pl_module.device)
            loss_B, units_B = example_losses(pl_module.judge(batch), batch.labels)
            means.append(loss_B.sum() / units_B.sum().clamp(min=1))
        pl_module.train()
        mean: Tensor = trainer.strategy.reduce(torch.stack(means).mean(), reduce_op="mean")
        return float(mean)

    def state_dict(self) -> dict[str, Any]:
        """Returns the walk, its policy's state among it, and the loss that the next step is compared with."""
        return {"walk": self.walk.state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` returned."""
        self.walk.load_state_dict(state_dict["walk"])
        self._before = state_dict["before"]
