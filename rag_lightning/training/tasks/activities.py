"""What a training step can be spent on: whose examples, how altered, which weights move, how many batches.

One record for both graphs: the activities of a task graph are the run's tasks, those of an augmentation graph are ways
to train on one task. A walk over them (:mod:`rag_lightning.training.tasks.walking`) asks no more than their names.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rag_lightning.errors import ConfigError
from rag_lightning.methods.augmentation import AugmentationSettings, PassageSettings

Scope = Literal["all", "top", "heads"]


@dataclass(frozen=True, kw_only=True)
class TrainingActivity:
    """One activity.

    Attributes:
        task: Whose examples are drawn.
        augment: How they are altered, one alteration after another.
        passages: What is done to the passages retrieved for them; None leaves them.
        scope: Which of the weights that a run trains move: ``all``; ``top``, the heads and the uppermost layers of the
            reader; or ``heads``. An order of scopes is staged unfreezing (Howard and Ruder 2018, §3.3).
        top_layers: Of the reader, for ``top``.
        layer_decay: Each layer of the reader learns so much slower than the one above it, below ``optim.layer_decay``
            still: discriminative fine-tuning (the same, §3.2).
        batches: Read by one step, as if they were one batch: gradient accumulation.

    Raises:
        ConfigError: A setting out of range.
    """

    task: str
    augment: Sequence[AugmentationSettings] = ()
    passages: PassageSettings | None = None
    scope: Scope = "all"
    top_layers: int = 1
    layer_decay: float = 1.0
    batches: int = 1

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise ConfigError(f"activity.scope: expected one of {', '.join(get_args(Scope))}, got {self.scope!r}")
        if self.top_layers < 1:
            raise ConfigError(
                f"activity.top_layers: expected 1 or more, got {self.top_layers}; heads alone are scope=heads"
            )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"activity.layer_decay: expected a factor above 0 and at most 1, got {self.layer_decay}")
        if self.scope != "top" and self.top_layers != 1:
            raise ConfigError(
                f"activity.top_layers: expected none with scope={self.scope}, which does not read it, got "
                f"{self.top_layers}"
            )
        if self.scope == "heads" and self.layer_decay != 1:
            raise ConfigError(
                f"activity.layer_decay: expected none with scope=heads, as no layer moves, got {self.layer_decay}"
            )
        if self.batches < 1:
            raise ConfigError(f"activity.batches: expected 1 or more, got {self.batches}")

    def moves(self, part: str, depth: int) -> bool:
        """Returns whether a weight moves.

        Args:
            part: Of the model it belongs to; see :meth:`rag_lightning.heads.model.HeadedModel.parts`.
            depth: How far below the reader's top; see :meth:`rag_lightning.heads.reader.Reader.depths`.
        """
        if self.scope == "all" or part == "heads":
            return True
        return self.scope == "top" and part == "reader" and depth < self.top_layers


ACTIVITY_KEYS = tuple(field.name for field in fields(TrainingActivity))


def activity_from(name: str, settings: Mapping[str, Any], tasks: Sequence[str]) -> TrainingActivity:
    """Builds an activity from the plain values of a node.

    Args:
        name: The node's; a task's name stands for that task.
        settings: The activity's fields; ``augment`` a name, a mapping of
            :class:`~rag_lightning.methods.augmentation.AugmentationSettings`, or a list of those.
        tasks: Those of the run.

    Raises:
        ConfigError: No task, an unknown one, or an unknown setting.
    """
    place = f"curriculum.graph.nodes.{name}"
    task = settings.get("task", name if name in tasks else tasks[0] if len(tasks) == 1 else None)
    if task not in tasks:
        raise ConfigError(f"{place}: expected the name of a task or task: one of {', '.join(tasks)}, got {task!r}")
    values = {**settings, "task": task}
    augment = values.get("augment") or ()
    augment = [augment] if isinstance(augment, str | Mapping) else augment
    try:
        values["augment"] = tuple(
            AugmentationSettings(**({"kind": one} if isinstance(one, str) else dict(one))) for one in augment
        )
        if values.get("passages") is not None:
            values["passages"] = PassageSettings(**values["passages"])
        return TrainingActivity(**values)
    except TypeError as error:
        raise ConfigError(
            f"{place}: expected reward_weight, size, {', '.join(ACTIVITY_KEYS)}; augment with "
            f"{_names(AugmentationSettings)}; passages with {_names(PassageSettings)}: {error}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def _names(record: Any) -> str:
    return ", ".join(field.name for field in fields(record))
