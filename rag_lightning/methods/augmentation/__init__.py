"""Augmentation: more examples where labels are few, by altering those there are, and the passages read beside them.

- ``words``: deletion, swap, synonyms, masking, entities; what happens to one example
- ``lexicon``: where synonyms come from
- ``back_translation``: texts said otherwise, through two models that translate there and back
- ``passages``: passages left out, reworded, or replaced by hard negatives
- ``settings``: an augmentation by its name
"""

from rag_lightning.methods.augmentation.back_translation import back_translation
from rag_lightning.methods.augmentation.lexicon import read_lexicon
from rag_lightning.methods.augmentation.passages import ChangedPassages, PassageSettings
from rag_lightning.methods.augmentation.settings import AugmentationSettings, BatchAugmentation
from rag_lightning.methods.augmentation.words import changed, deletion, entities, masking, swap, synonyms

__all__ = [
    "AugmentationSettings",
    "BatchAugmentation",
    "ChangedPassages",
    "PassageSettings",
    "back_translation",
    "changed",
    "deletion",
    "entities",
    "masking",
    "read_lexicon",
    "swap",
    "synonyms",
]
