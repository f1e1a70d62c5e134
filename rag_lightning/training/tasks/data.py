"""TaskDataModule: the labelled examples of one or several tasks, and the passages their reader may retrieve.

Which task comes next is decided when a step begins, not when a loader looks ahead; so the loader yields step numbers,
and the step draws its batch (:meth:`TaskDataModule.draw`). Each task goes through its own examples epoch by epoch.
"""

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jaxtyping import Float, Int
from torch import Tensor

from rag_lightning.corpora.labelled import LabelSet
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.heads.model import HeadedModel
from rag_lightning.heads.reading import TaskExample
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.text.tagging import check_language, check_words
from rag_lightning.training.live_index import IndexSettings, LiveIndex
from rag_lightning.training.loader import BatchLoader
from rag_lightning.training.tasks.task import Task, as_passage
from rag_lightning.types import TaggedSentence, TensorRecord
from rag_lightning.utils import distributed
from rag_lightning.utils.seeding import rng_at

logger = logging.getLogger(__name__)
IGNORED = -100
"""The label of a place that is not judged; torch's cross-entropy calls it so."""
EXAMPLES = "examples"


@dataclass(frozen=True)
class TaskBatch(TensorRecord):
    """Examples of one task.

    Attributes:
        task: Whose.
        examples: The B records.
        labels: Label numbers ``[B]``; of tags ``[B, W]``, :data:`IGNORED` behind a sentence's end.
        weights_B: 1; 0 on a filler that only keeps processes in step.
        forbidden_ids: The passage made of each example itself, ``-1`` where there is none.
    """

    task: str
    examples: tuple[TaskExample, ...]
    labels: Int[Tensor, "B *W"]
    weights_B: Float[Tensor, "B"]
    forbidden_ids: Int[Tensor, "B"]


class TaskDataModule(L.LightningDataModule):
    """Tasks and the passages their reader may retrieve.

    Args:
        tasks: What is learnt.
        passages: ``examples``, the training examples with their labels; or a passage file; None without retrieval.
        batch_size: Examples of a step, over all processes.
        eval_batch_size: The same of evaluation.
        train_share: Of the training examples, drawn once by the seed: what is left when labels are few.
        limit_train: Training examples of each task at most, drawn likewise.
        limit_eval: Validation and test examples of each task at most, the same for all seeds.
        allow_unknown: Take texts that the reader's tokenizer mostly does not know.
        index: How the passages' index is built; exact by default.
        index_dir: Where.
        seed: Seeds the order.
        progress: Show a bar while encoding.

    Raises:
        ConfigError: No task, two of one name, a share outside (0, 1], or a limit below 2.
    """

    def __init__(
        self,
        *,
        tasks: Sequence[Task],
        passages: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        train_share: float = 1.0,
        limit_train: int | None = None,
        limit_eval: int | None = None,
        allow_unknown: bool = False,
        index: IndexSettings | None = None,
        index_dir: str = "index",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"task: expected one task or more, each of its own name, got {names}")
        if not 0 < train_share <= 1:
            raise ConfigError(f"task.train_share: expected a share above 0 and at most 1, got {train_share}")
        for limit, value in (("limit_train", limit_train), ("limit_eval", limit_eval)):
            if value is not None and value < 2:
                raise ConfigError(f"task.{limit}: expected 2 or more, or null for all, got {value}")
        if passages == EXAMPLES and len(tasks) > 1:
            raise ConfigError(
                "task.passages=examples: expected one task, whose labels the examples bear, got "
                f"{', '.join(names)}. Give a passage file, or null."
            )
        self.tasks = {task.name: task for task in tasks}
        self.passages = passages
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.allow_unknown = allow_unknown
        self.index_settings = index if index is not None else IndexSettings()
        self.index_dir = index_dir
        self.seed = seed
        self.progress = progress
        self.examples = {name: task.read() for name, task in self.tasks.items()}
        self.labels: dict[str, LabelSet] = {  # of all training examples: what may be said is known, if few examples are
            name: task.labels(self.examples[name]["train"]) for name, task in self.tasks.items()
        }
        for name, splits in self.examples.items():
            splits["train"] = _few(splits["train"], train_share, limit_train, seed, name)
            for split in set(splits) - {"train"}:
                splits[split] = _few(splits[split], 1.0, limit_eval, 0, f"{name}/{split}")
        self.retriever: Retriever | None = None
        self._index: LiveIndex | None = None
        self._corpus: PassageCorpus | None = None
        self._draws: dict[str, _Draws] = {}
        self._restored: dict[str, Any] = {}
        self._before_step: tuple[int, dict[str, Any]] | None = None

    def bind(self, model: HeadedModel) -> None:
        """Tells whose tokenizer reads the texts, and whose towers search.

        Raises:
            DataError: The reader's tokenizer knows too little of the texts.
            ConfigError: The model retrieves and there are no passages, or the other way round; or the tokenizer would
                run words together that are to be tagged.
        """
        for name, splits in self.examples.items():
            texts = [as_passage(example).text for example in splits["train"][:1000]]
            check_language(texts, model.reader.tokenizer, allow=self.allow_unknown)
            if self.tasks[name].kind == "tagging":
                check_words(model.reader.tokenizer)
            logger.info("task %s: %s", name, ", ".join(f"{len(part)} {split}" for split, part in splits.items()))
        retrieves = model.settings.num_passages > 0
        if retrieves != (self.passages is not None):
            raise ConfigError(
                f"task.num_passages={model.settings.num_passages} with task.passages={self.passages}: expected both "
                "for retrieval, or 0 and null for plain heads"
            )
        if not retrieves:
            return
        assert model.encoder is not None
        self._corpus = self._read_corpus()
        self._index = LiveIndex(
            model=model,
            corpus=self._corpus,
            tokens=PassageTokens(encoder=model.encoder, corpus=self._corpus),
            root=Path(self.index_dir),
            settings=self.index_settings,
            seed=self.seed,
            progress=self.progress,
        )

    def _read_corpus(self) -> PassageCorpus:
        if self.passages != EXAMPLES:
            assert self.passages is not None
            return PassageCorpus.read(self.passages)
        (splits,) = self.examples.values()
        return PassageCorpus.from_passages(map(as_passage, splits["train"]), source="the training examples")

    def ensure_index(self) -> None:
        """Builds the index if there is none; the passage tower is frozen, so it never goes stale."""
        if self._index is not None and self.retriever is None:
            self._index.ensure(step=0)
            self.retriever = self._index.retriever

    # ------------------------------------------------------------------ batches

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which each example of each task is met once."""
        return sum(-(-len(splits["train"]) // self.batch_size) for splits in self.examples.values())

    def draw(self, task: str) -> TaskBatch:
        """Returns a task's next training batch; all processes ask for the same task."""
        if task not in self._draws:
            self._draws[task] = _Draws(partial(self._loader, task, "train", shuffle=True), self._restored.pop(task, {}))
        return self._draws[task].next()

    def train_dataloader(self) -> "StepLoader":
        """Returns step numbers; see the module's description."""
        return StepLoader(self.steps_per_epoch, self._num_done)

    def begin_step(self) -> None:
        """Remembers where each task's epoch stands before a step draws: a step that fails has read nothing."""
        self._before_step = self._num_finished(), self._draws_state()

    def _num_finished(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def _draws_state(self) -> dict[str, Any]:
        return {**self._restored, **{name: draws.state_dict() for name, draws in self._draws.items()}}

    def _num_done(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.fit_loop.epoch_loop.batch_progress.current.processed)

    def val_dataloader(self) -> list[BatchLoader[Any, TaskBatch]]:
        """Returns the validation batches of each task."""
        return [self._loader(name, "validation") for name, splits in self.examples.items() if "validation" in splits]

    def test_dataloader(self) -> list[BatchLoader[Any, TaskBatch]]:
        """Returns the test batches of each task."""
        return [self._loader(name, "test") for name, splits in self.examples.items() if "test" in splits]

    def _loader(
        self, task: str, split: str, *, shuffle: bool = False, current_epoch: Callable[[], int] = lambda: 0
    ) -> BatchLoader[Any, TaskBatch]:
        rows = _Rows(self.examples[task][split])
        own = shuffle and self.passages == EXAMPLES

        def collate(drawn: Sequence[tuple[TaskExample, int]], weights: Sequence[float]) -> TaskBatch:
            return self.batch(task, [one for one, _ in drawn], weights, [row if own else -1 for _, row in drawn])

        return BatchLoader(
            rows,
            collate,
            batch_size=max(self.batch_size if shuffle else self.eval_batch_size, distributed.world_size()),
            seed=self.seed,
            shuffle=shuffle,
            current_epoch=current_epoch,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def batch(
        self, task: str, examples: Sequence[TaskExample], weights: Sequence[float], forbidden: Sequence[int]
    ) -> TaskBatch:
        """Returns a batch with label numbers.

        Raises:
            DataError: A label that no training example bears.
        """
        labels = self.labels[task]
        if isinstance(examples[0], TaggedSentence):
            width = max(len(one.words) for one in examples if isinstance(one, TaggedSentence))
            numbers = torch.full((len(examples), width), IGNORED)
            for row, one in enumerate(examples):
                assert isinstance(one, TaggedSentence)
                place = f"task {task}, sentence {one.id!r}"
                numbers[row, : len(one.tags)] = torch.tensor([labels.number(tag, place) for tag in one.tags])
        else:
            judged = [one for one in examples if not isinstance(one, TaggedSentence)]
            numbers = torch.tensor([labels.number(one.label, f"task {task}, example {one.id!r}") for one in judged])
        return TaskBatch(task, tuple(examples), numbers, torch.tensor(weights), torch.tensor(forbidden))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Returns a batch on the device; step numbers stay as they are."""
        return batch.to(device) if isinstance(batch, TensorRecord) else batch

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Returns how far each task's epoch has come in the steps that are over, and which snapshot is live."""
        draws = self._draws_state()
        if self._before_step is not None and self._before_step[0] == self._num_finished():
            draws = self._before_step[1]  # a checkpoint of a step that failed
        return {"draws": draws, "index": self._index.state_dict() if self._index is not None else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint stood."""
        self._restored, self._draws, self._before_step = dict(state_dict["draws"]), {}, None
        if self._index is not None:
            self._index.load_state_dict(state_dict["index"])
            self.retriever = None


class _Rows:
    """Examples with their numbers."""

    def __init__(self, examples: Sequence[TaskExample]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def draw(self, position: int, rng: random.Random) -> tuple[TaskExample, int]:
        return self._examples[position], position


class _Draws:
    """One batch after another, for as long as they are asked for."""

    def __init__(self, make_loader: Callable[..., BatchLoader[Any, TaskBatch]], state: Mapping[str, int]) -> None:
        self._epoch, self._done = state.get("epoch", 0), state.get("num_yielded", 0)
        self._loader = make_loader(current_epoch=lambda: self._epoch)
        self._loader.load_state_dict(self.state_dict())
        self._batches = iter(self._loader)

    def next(self) -> TaskBatch:
        """Returns the next batch, of the next epoch where one is over."""
        if self._done == len(self._loader):
            self._epoch, self._done = self._epoch + 1, 0
            self._batches = iter(self._loader)
        self._done += 1
        return next(self._batches)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "num_yielded": self._done}


class StepLoader:
    """Yields the numbers of an epoch's steps; goes on within an epoch after a resume.

    Args:
        num_steps: How many.
        num_done: Tells how many steps of this epoch have been taken, whatever a loader has looked ahead.
    """

    def __init__(self, num_steps: int, num_done: Callable[[], int] = lambda: 0) -> None:
        self._num_steps = num_steps
        self._num_done = num_done
        self._first = 0

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[int]:
        first, self._first = self._first, 0
        return iter(range(first, self._num_steps))

    def state_dict(self) -> dict[str, int]:
        """Returns how far the epoch has come."""
        return {"num_done": self._num_done()}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Lets the next pass begin where the checkpoint stood; nothing is left of an epoch that was over."""
        self._first = int(state_dict["num_done"])


def _few(examples: Sequence[TaskExample], share: float, limit: int | None, seed: int, name: str) -> list[TaskExample]:
    """Returns a share of the examples, or so many at most, in their order; the same whatever is done with them."""
    wanted = min(max(1, round(share * len(examples))), limit if limit is not None else len(examples))
    if wanted >= len(examples):
        return list(examples)
    if wanted < 2:
        raise DataError(f"task.train_share={share}: expected two examples at least of task {name}, came {wanted}")
    rows = list(range(len(examples)))
    rng_at(seed, "train_share", name).shuffle(rows)
    return [examples[row] for row in sorted(rows[:wanted])]
