"""HeadedModel: a reader with a head for each task, plain or retrieval-augmented.

Plain, a head judges a text alone. Retrieval-augmented, the text is read once with each of K passages, and either

- ``marginal``: ``p(y|x) = Σ_z p(z|x) p(y|x,z)`` for classes and tags alike, as in RAG (Lewis et al. 2020, §3.4), or
- ``attention``: one decision from the tokens of all passages (:mod:`rag_lightning.heads.pooling`).

Both give the query encoder a gradient through ``p(z|x)``. The passages are what the corpus holds: labelled examples of
the training set, which makes it a nearest-neighbour model that learns whom to ask, or any texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.heads.classification import ClassificationHead
from rag_lightning.heads.reader import Reader
from rag_lightning.heads.reading import Reading, TaskExample, query_text, read
from rag_lightning.heads.relation import RelationHead
from rag_lightning.heads.token_classification import TokenClassificationHead
from rag_lightning.index.base import Metric, similarity
from rag_lightning.losses.marginal import class_log_probs, doc_log_prior
from rag_lightning.retrieval.base import Retriever, even_where_empty, search
from rag_lightning.types import Evidence, Hits, Passage, TokenBatch
from rag_lightning.utils.io import atomic_directory, read_json, write_json
from rag_lightning.utils.transfer import to_device

Reads = Literal["marginal", "attention"]
CONFIG_FILE, HEADS_FILE = "heads_config.json", "heads.safetensors"
KINDS: dict[str, Any] = {
    "classification": ClassificationHead,
    "tagging": TokenClassificationHead,
    "relation": RelationHead,
}


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """How passages are weighed and read.

    Attributes:
        num_passages: K; 0 for plain heads.
        temperature: Divides similarities.
        metric: What the index ranks by.
        reads: See the module.
        passage_template: How the reader sees a passage; a labelled example's title is its label.
    """

    num_passages: int = 0
    temperature: float = 0.05
    metric: Metric = "inner_product"
    reads: Reads = "marginal"
    passage_template: str = "{text} : {title}"

    def __post_init__(self) -> None:
        if self.num_passages < 0:
            raise ConfigError(f"task.num_passages: expected 0 (plain) or more, got {self.num_passages}")
        if self.reads not in get_args(Reads):
            raise ConfigError(f"task.reads: expected one of {', '.join(get_args(Reads))}, got {self.reads!r}")


@dataclass(frozen=True)
class HeadOutput:
    """What a head says of a batch.

    Attributes:
        log_probs: ``log p(y | x)``, ``[B, C]``, or ``[B, W, C]`` for tags; float32 at least.
        places: First pieces of words ``[B, W]``, ``-1`` where there is none; None for classes.
        log_prior_BK: ``log p(z | x)``; None without retrieval.
        hits: What was found; None without retrieval.
        weights_BKL: Attention over passages and tokens, where the head reads so.
    """

    log_probs: Tensor
    places: Int[Tensor, "B W"] | None
    log_prior_BK: Float[Tensor, "B K"] | None = None
    hits: Hits | None = None
    weights_BKL: Float[Tensor, "B K L"] | None = None


@runtime_checkable
class PassageChange(Protocol):
    """What a training step does to the passages found; see :mod:`rag_lightning.methods.augmentation.passages`."""

    num_further: int
    """How many passages more are to be searched for."""

    def chosen(self, examples: Sequence[TaskExample], evidence: Evidence, num_passages: int) -> Hits:
        """Returns K of the hits for each example."""
        ...

    def reworded(self, passages: Sequence[Sequence[Passage]]) -> Sequence[Sequence[Passage]]:
        """Returns the passages as they are read."""
        ...


class HeadedModel(nn.Module):
    """A reader, its heads, and the encoder that finds passages for it.

    Args:
        reader: Shared by all heads.
        heads: One for each task, by name.
        encoder: Towers for retrieval; None for plain heads.
        settings: How passages are weighed and read.

    Raises:
        ConfigError: Passages are wanted and there is no encoder, or a head that cannot read so.
    """

    def __init__(
        self,
        *,
        reader: Reader,
        heads: Mapping[str, nn.Module],
        encoder: BiEncoder | None = None,
        settings: RetrievalSettings = RetrievalSettings(),
    ) -> None:
        super().__init__()
        if settings.num_passages > 0 and encoder is None:
            raise ConfigError("task.num_passages: expected 0 without an encoder to search with; choose encoder=minilm")
        if settings.reads == "attention":
            for name, head in heads.items():
                if not isinstance(head, ClassificationHead):
                    raise ConfigError(f"task.reads=attention: expected a classification head, {name} has another kind")
        self.reader = reader
        self.heads = nn.ModuleDict(heads)
        self.encoder = encoder if settings.num_passages > 0 else None
        self.settings = settings

    def parts(self) -> dict[str, nn.Module]:
        """Returns what can learn or be frozen, by the names of :class:`~rag_lightning.training.optim.OptimSettings`."""
        parts: dict[str, nn.Module] = {"reader": self.reader, "heads": self.heads}
        if self.encoder is not None:
            parts["query_encoder"] = self.encoder.query
            if self.encoder.passage is not None and not self.encoder.shared:
                parts["passage_encoder"] = self.encoder.passage
        return parts

    def forward(
        self,
        task: str,
        examples: Sequence[TaskExample],
        retriever: Retriever | None = None,
        forbidden_ids: Int[Tensor, "B"] | None = None,
        change: PassageChange | None = None,
    ) -> HeadOutput:
        """Returns what a task's head says of some examples, whose labels are not looked at.

        Args:
            task: Which head.
            examples: B records of the task's kind.
            retriever: Where to search; None for plain heads.
            forbidden_ids: The passage that must not be found for each, ``-1`` for none: the example itself.
            change: What a training step does to the passages found; None leaves them.

        Raises:
            ConfigError: A retriever where heads are plain, or none where they are not.
        """
        if (retriever is None) != (self.settings.num_passages == 0):
            raise ConfigError(
                f"heads: expected a retriever with num_passages={self.settings.num_passages}"
                if retriever is None
                else "heads: expected no retriever, as num_passages=0: these heads were made to read a text alone"
            )
        device = next(self.reader.parameters()).device
        head = self.heads[task]
        if retriever is None:
            reading = to_device(read(self.reader.tokenizer, examples, None, max_tokens=self.reader.max_tokens), device)
            logits = head(self.reader(reading), reading.tokens.attention_mask, reading.places)
            return HeadOutput(_log_softmax(logits), _word_places(head, reading, 1))
        hits, log_prior_BK = self._retrieve(examples, retriever, forbidden_ids, change)
        passages = retriever.evidence(hits).passages
        reading = to_device(
            read(
                self.reader.tokenizer,
                examples,
                passages if change is None else change.reworded(passages),
                max_tokens=self.reader.max_tokens,
                passage_template=self.settings.passage_template,
            ),
            device,
        )
        states_NLD, mask_NL = self.reader(reading), reading.tokens.attention_mask
        if self.settings.reads == "attention":
            logits_BC, weights_BKL = head.over_passages(states_NLD, mask_NL, log_prior_BK)  # type: ignore[operator]
            return HeadOutput(_log_softmax(logits_BC), None, log_prior_BK, hits, weights_BKL)
        each = _log_softmax(head(states_NLD, mask_NL, reading.places))
        log_probs = class_log_probs(each.view(*log_prior_BK.shape, *each.shape[1:]), log_prior_BK)
        return HeadOutput(log_probs, _word_places(head, reading, log_prior_BK.shape[1]), log_prior_BK, hits)

    def _retrieve(
        self,
        examples: Sequence[TaskExample],
        retriever: Retriever,
        forbidden_ids: Int[Tensor, "B"] | None,
        change: PassageChange | None,
    ) -> tuple[Hits, Float[Tensor, "B K"]]:
        """Searches without gradient; the prior has one, to the query encoder."""
        texts, num_passages = [query_text(example) for example in examples], self.settings.num_passages
        vectors_BD = self.query_vectors(texts) if retriever.needs_vectors else None
        found = None if vectors_BD is None else vectors_BD.detach()
        wanted = num_passages if change is None else num_passages + change.num_further
        hits = search(retriever, texts, found, wanted, forbidden_ids)
        if change is not None:
            hits = change.chosen(examples, retriever.evidence(hits), num_passages)
        hits = hits.to(next(self.reader.parameters()).device)
        similarities_BK = None
        if vectors_BD is not None and retriever.gradient_to:
            passages_BKD = retriever.vectors(hits.ids_BK).to(vectors_BD.device)
            similarities_BK = similarity(vectors_BD, passages_BKD, self.settings.metric, hits.found_BK)
        scores_BK = even_where_empty(retriever.scores(hits, similarities_BK, vectors_BD))
        return hits, doc_log_prior(scores_BK, self.settings.temperature)

    def query_vectors(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Returns the vectors of the texts that are searched for."""
        assert self.encoder is not None
        tokenizer: Any = self.encoder.tokenizer
        written = [self.encoder.query_template.format(question=text) for text in texts]
        encoded = tokenizer(
            written, truncation=True, max_length=self.encoder.max_query_tokens, padding=True, return_tensors="pt"
        )
        tokens = TokenBatch(encoded["input_ids"], encoded["attention_mask"])
        vectors_BD: Tensor = self.encoder.query(to_device(tokens, next(self.reader.parameters()).device))
        return vectors_BD

    def save_pretrained(self, directory: str | Path, labels: Mapping[str, Sequence[str]]) -> None:
        """Writes reader, heads, towers and the names of the labels: safetensors and JSON.

        Args:
            directory: Is made, or must be empty.
            labels: Names of each head's labels.
        """
        with atomic_directory(Path(directory), replace=True) as folder:
            self.reader.save(folder / "reader")
            save_file(
                {name: value.contiguous() for name, value in self.heads.state_dict().items()}, folder / HEADS_FILE
            )
            if self.encoder is not None:
                self.encoder.save(folder / "encoder")
            heads = {name: {"labels": list(labels[name]), **_settings(head)} for name, head in self.heads.items()}
            encoder = self.encoder.settings() if self.encoder is not None else None
            write_json(
                folder / CONFIG_FILE,
                {
                    "max_tokens": self.reader.max_tokens,
                    "retrieval": asdict(self.settings),
                    "heads": heads,
                    "encoder": encoder,
                },
            )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> tuple["HeadedModel", dict[str, tuple[str, ...]]]:
        """Reads what :meth:`save_pretrained` wrote: the model in evaluation mode, and the names of the labels.

        Raises:
            MissingFileError: The folder holds no such model.
        """
        folder = Path(directory)
        saved = read_json(folder / CONFIG_FILE, "model of heads")
        reader = Reader.from_source(source=str((folder / "reader").absolute()), max_tokens=saved["max_tokens"])
        labels = {name: tuple(each.pop("labels")) for name, each in saved["heads"].items()}
        heads = {
            name: KINDS[each.pop("kind")](width=reader.width, num_labels=len(labels[name]), **each)
            for name, each in saved["heads"].items()
        }
        encoder = BiEncoder.load(folder / "encoder", saved["encoder"]) if saved["encoder"] is not None else None
        model = cls(reader=reader, heads=heads, encoder=encoder, settings=RetrievalSettings(**saved["retrieval"]))
        model.heads.load_state_dict(load_file(folder / HEADS_FILE))
        return model.eval(), labels


def _settings(head: nn.Module) -> dict[str, Any]:
    """Returns what a head is made with, as plain JSON."""
    kind = next(name for name, made in KINDS.items() if type(head) is made)
    own = {"pooling": head.pooling} if isinstance(head, ClassificationHead) else {}
    return {"kind": kind, "dropout": head.dropout.p, **own}  # type: ignore[union-attr]


def _log_softmax(logits: Tensor) -> Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def _word_places(head: nn.Module, reading: Reading, num_passages: int) -> Int[Tensor, "B W"] | None:
    """Returns where each word begins, ``-1`` where one reading of the text has cut it; None for classes."""
    if reading.places is None or not getattr(head, "tags_words", False):
        return None
    places_BKW = reading.places.view(-1, num_passages, reading.places.shape[1])
    return torch.where((places_BKW < 0).any(dim=1), -1, places_BKW[:, 0])
