"""Back-translation: a text said otherwise, by translating it there and back (Sennrich et al. 2016)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rag_lightning.errors import ConfigError
from rag_lightning.heads.reading import TaskExample
from rag_lightning.rag import RagModel
from rag_lightning.types import LabelledText

Translate = Callable[[Sequence[str]], Sequence[str]]


def translator(source: str, device: torch.device | str = "cpu") -> Translate:
    """Returns what a model of ours writes for texts.

    Args:
        source: A run's folder, or that of a saved model; trained with the text as the question and its translation as
            the answer.
        device: Where it runs.

    Raises:
        CheckpointError: It is no saved model.
    """
    folder = Path(source) / "model"
    model = RagModel.from_pretrained(folder if folder.is_dir() else source).to(device).eval()

    def translate(texts: Sequence[str]) -> list[str]:
        return [prediction.answer for prediction in model.generate(list(texts))]

    return translate


def back_translation(there: Translate, back: Translate, rate: float = 1.0) -> "BackTranslation":
    """Returns an augmentation that translates texts there and back, each with a probability.

    Args:
        there: Into the other language.
        back: Out of it.
        rate: For each text.
    """
    return BackTranslation(there, back, rate)


class BackTranslation:
    """See :func:`back_translation`. A text is translated once; one that comes back empty stays as it is."""

    def __init__(self, there: Translate, back: Translate, rate: float) -> None:
        if not 0 < rate <= 1:
            raise ConfigError(f"augmentation.back_translation: expected a rate above 0 and at most 1, got {rate}")
        self.rate = rate
        self._there, self._back = there, back
        self._known: dict[str, str] = {}

    def __call__(self, examples: Sequence[TaskExample], rng: random.Random) -> list[TaskExample]:
        """Returns the examples, some reworded.

        Raises:
            ConfigError: An example whose words bear tags or entities, which no translation keeps.
        """
        texts = check_translatable(examples)
        chosen = [rng.random() < self.rate for _ in texts]
        wanted = [text.text for text, once in zip(texts, chosen, strict=True) if once]
        unknown = [text for text in dict.fromkeys(wanted) if text not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._back(self._there(unknown)), strict=True))
        return [
            replace(text, text=self._known[text.text].strip() or text.text) if once else text
            for text, once in zip(texts, chosen, strict=True)
        ]


def check_translatable(examples: Sequence[TaskExample]) -> list[LabelledText]:
    """Returns the examples, which are texts with one label.

    Raises:
        ConfigError: One is a tagged sentence, or has entities.
    """
    texts: list[LabelledText] = []
    for example in examples:
        if not isinstance(example, LabelledText):
            raise ConfigError(
                f"augmentation.back_translation: expected texts with one label, got a {type(example).__name__}: its "
                "entities would be lost. Use deletion, swap, synonyms, masking or entities."
            )
        texts.append(example)
    return texts
