"""Translation: sentence pairs, one a line, in two languages.

Multi30k (Elliott et al. 2016, image captions in English and German; research use only, as its README says)::

    {"id": 0, "en": "A man in an orange hat starring at something.",
     "de": "Ein Mann mit einem orangefarbenen Hut, der etwas anstarrt.", "image": "1007129816.jpg"}

becomes the question ``A man in …`` with the answer ``Ein Mann …``. The passages are the training pairs, searched by
their source (a translation memory; Gu et al. 2018, "Search engine guided neural machine translation").
"""

from dataclasses import dataclass

from rag_lightning.corpora.generation.parts import EXAMPLES, SPLITS, data_file, with_examples
from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.corpora.passages import string_field
from rag_lightning.corpora.records import identified_lines
from rag_lightning.types import Question


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Reads sentence pairs.

    Attributes:
        folder: Holds ``train``, ``dev`` and ``test`` (``.jsonl.gz`` or ``.jsonl``).
        source: The field to translate from.
        target: The field to translate to.
        passages: ``examples``, the training pairs, or a passage file.
    """

    folder: str
    source: str = "en"
    target: str = "de"
    passages: str = EXAMPLES

    def __call__(self) -> PreparedData:
        """Returns the data set; see :class:`~rag_lightning.corpora.generation.prepared.Preparation`."""
        names = dict(zip(SPLITS, ("train", "dev", "test"), strict=True))
        train, validation, test = (self._read(split, name) for split, name in names.items())
        return with_examples(self.passages, train, validation, test)

    def _read(self, split: str, name: str) -> list[Question]:
        return [
            Question(
                f"{split}-{record_id}",
                string_field(record, self.source, place),
                (string_field(record, self.target, place),),
            )
            for place, record_id, record in identified_lines(data_file(self.folder, name))
        ]
