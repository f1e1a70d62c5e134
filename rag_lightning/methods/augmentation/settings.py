"""An augmentation by its name, with what it needs of a run."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.heads.reading import TaskExample, query_text
from rag_lightning.methods.augmentation.back_translation import back_translation, check_translatable, translator
from rag_lightning.methods.augmentation.lexicon import covered, read_lexicon
from rag_lightning.methods.augmentation.words import (
    Augmentation,
    changed,
    deletion,
    entities,
    masking,
    swap,
    synonyms,
)
from rag_lightning.types import TaggedSentence

logger = logging.getLogger(__name__)
AugmentationKind = Literal["deletion", "swap", "synonyms", "masking", "entities", "back_translation"]
BatchAugmentation = Callable[[Sequence[TaskExample], random.Random], list[TaskExample]]
RATES = {"deletion": 0.1, "swap": 0.1, "synonyms": 0.1, "masking": 0.15, "entities": 0.5, "back_translation": 1.0}
"""Of words, mentions or texts; 0.1 is Wei and Zou's (2019), 0.15 Devlin et al.'s (2019)."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """An augmentation.

    Attributes:
        kind: Its name.
        rate: Of what it alters; None is :data:`RATES`.
        mean_span_words: Of masked spans; None is 2.
        lexicon: Synonyms: a JSON file, or a folder of WN18RR.
        there: Run or model that translates into another language (back-translation).
        back: The same out of it.
    """

    kind: AugmentationKind
    rate: float | None = None
    mean_span_words: float | None = None
    lexicon: str | None = None
    there: str | None = None
    back: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(AugmentationKind):
            raise ConfigError(
                f"augmentation: expected one of {', '.join(get_args(AugmentationKind))}, got {self.kind!r}"
            )
        needs = {"synonyms": ("lexicon",), "back_translation": ("there", "back")}.get(self.kind, ())
        missing = [name for name in needs if getattr(self, name) is None]
        if missing:
            raise ConfigError(f"augmentation.{self.kind}: expected {' and '.join(missing)}, got none")
        reads = ("mean_span_words",) if self.kind == "masking" else needs
        optional = ("mean_span_words", "lexicon", "there", "back")
        unread = [name for name in optional if getattr(self, name) is not None and name not in reads]
        if unread:
            raise ConfigError(f"augmentation.{self.kind}: expected no {' and '.join(unread)}, which it does not read")

    def build(
        self, *, mask: str | None, train: Sequence[TaskExample], device: torch.device | str = "cpu"
    ) -> BatchAugmentation:
        """Returns the augmentation.

        Args:
            mask: The reader's mask token; None where it has none.
            train: The training examples.
            device: Where translators run.

        Raises:
            ConfigError: Masking for a reader that has no mask, or back-translation of tags or entities.
            CheckpointError: A translator is no saved model.
            DataError: Nothing that it could alter.
        """
        rate = self.rate if self.rate is not None else RATES[self.kind]
        if self.kind == "back_translation":
            check_translatable(train[:1])
            there, back = (translator(str(one), device) for one in (self.there, self.back))
            return back_translation(there, back, rate)
        if self.kind == "entities":
            return _each(entities([one for one in train if isinstance(one, TaggedSentence)], rate))
        if self.kind == "synonyms":
            lexicon = read_lexicon(str(self.lexicon))
            share = covered(lexicon, map(query_text, train))
            if share == 0:
                raise DataError(
                    f"augmentation.synonyms: expected words of the training texts in {self.lexicon}, came none"
                )
            logger.info("augmentation.synonyms: %.1f %% of the training texts' words are in the lexicon", 100 * share)
            return _each(changed(synonyms(lexicon, rate)))
        if self.kind == "masking":
            if mask is None:
                raise ConfigError("augmentation.masking: expected a reader with a mask token, its tokenizer has none")
            return _each(
                changed(masking(mask, rate, self.mean_span_words if self.mean_span_words is not None else 2.0))
            )
        return _each(changed(deletion(rate) if self.kind == "deletion" else swap(rate)))


def _each(augment: Augmentation) -> BatchAugmentation:
    return lambda examples, rng: [augment(example, rng) for example in examples]
