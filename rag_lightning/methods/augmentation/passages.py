"""What a training step may do to the passages it has found, so that the reader does not lean on any one of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rag_lightning.errors import ConfigError
from rag_lightning.heads.reading import TaskExample
from rag_lightning.index.base import MISSING_ID
from rag_lightning.text.sentences import sentences
from rag_lightning.types import Evidence, Hits, Passage, TaggedSentence


@dataclass(frozen=True, kw_only=True)
class PassageSettings:
    """What is done to the passages of an example.

    Attributes:
        dropout: Each is left out with this probability, and ``p(z|x)`` is that of the others; the best of all stays
            where none would.
        shuffle: The sentences of each are put in another order with this probability. (The order of the passages
            themselves is not seen by heads.)
        hard_negatives: So many of the K places, the last, go to the best ranked passages of another label: near the
            text, and wrong. Of labelled examples as passages, whose titles are their labels.
    """

    dropout: float = 0.0
    shuffle: float = 0.0
    hard_negatives: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"passages.dropout: expected a probability of at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.shuffle <= 1:
            raise ConfigError(f"passages.shuffle: expected a probability, got {self.shuffle}")
        if self.hard_negatives < 0:
            raise ConfigError(f"passages.hard_negatives: expected 0 or more, got {self.hard_negatives}")


class ChangedPassages:
    """One step's changes; a :class:`rag_lightning.heads.model.PassageChange`.

    Args:
        settings: Which.
        rng: Draws them.

    Attributes:
        num_further: How many passages more are to be searched for.
    """

    def __init__(self, settings: PassageSettings, rng: random.Random) -> None:
        self.settings = settings
        self.num_further = 4 * settings.hard_negatives
        self._rng = rng

    def chosen(self, examples: Sequence[TaskExample], evidence: Evidence, num_passages: int) -> Hits:
        """Returns K of the hits for each example: hard negatives mixed in, some left out.

        Raises:
            ConfigError: Hard negatives for examples without one label, or as many as there are places.
        """
        hits = evidence.hits
        places = [list(range(num_passages)) for _ in examples]
        if self.settings.hard_negatives:
            if self.settings.hard_negatives >= num_passages:
                raise ConfigError(
                    f"passages.hard_negatives: expected fewer than task.retrieval.num_passages={num_passages}, got "
                    f"{self.settings.hard_negatives}"
                )
            places = [
                self._mixed(example, found, num_passages)
                for example, found in zip(examples, evidence.passages, strict=True)
            ]
        order_BK = torch.tensor(places, device=hits.ids_BK.device)
        ids_BK, scores_BK = hits.ids_BK.gather(1, order_BK), hits.scores_BK.gather(1, order_BK)
        dropped = [self._dropped(num_passages) for _ in examples]
        dropped_BK = torch.tensor(dropped, device=ids_BK.device)
        return replace(
            hits,
            ids_BK=ids_BK.masked_fill(dropped_BK, MISSING_ID),
            scores_BK=scores_BK.masked_fill(dropped_BK, -torch.inf),
        )

    def _mixed(self, example: TaskExample, found: Sequence[Passage], num_passages: int) -> list[int]:
        if isinstance(example, TaggedSentence):
            raise ConfigError(
                "passages.hard_negatives: expected examples with one label, got tagged sentences: leave it out"
            )
        label = example.label
        alike = [passage.title == label or passage.title.startswith(f"{label} of ") for passage in found]
        wrong = [place for place, same in enumerate(alike) if not same]
        negatives = wrong[: self.settings.hard_negatives]
        others = [place for place in range(len(found)) if place not in negatives]
        return others[: num_passages - len(negatives)] + negatives

    def _dropped(self, num_passages: int) -> list[bool]:
        dropped = [self._rng.random() < self.settings.dropout for _ in range(num_passages)]
        dropped[0] &= not all(dropped)
        return dropped

    def reworded(self, passages: Sequence[Sequence[Passage]]) -> list[list[Passage]]:
        """Returns the passages as they are read."""
        return [[self._shuffled(passage) for passage in found] for found in passages]

    def _shuffled(self, passage: Passage) -> Passage:
        if self._rng.random() >= self.settings.shuffle:
            return passage
        parts = sentences(passage.text)
        self._rng.shuffle(parts)
        return replace(passage, text=" ".join(parts))
