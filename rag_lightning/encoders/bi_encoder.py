"""The two towers: questions and passages into one vector space.

A tower is any transformers encoder, a pooling, and optionally a projection and a normalisation. The towers may be
one and the same (shared), start equal and part in training, or come from two checkpoints (DPR).
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    DPRContextEncoder,
    DPRQuestionEncoder,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rag_lightning.corpora.places import model_place
from rag_lightning.encoders import word_embeddings  # noqa: F401 (registers the model type with AutoModel)
from rag_lightning.encoders.pooling import check_pooling, pool_cls, pool_mean, unit_length
from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.text.tokenizers import load_tokenizer, tokenizer_hash
from rag_lightning.types import Passage, TokenBatch
from rag_lightning.utils.hashing import hash_tensors, hash_texts
from rag_lightning.utils.lengths import embedded_once, lengths_of, model_length_groups, restored
from rag_lightning.utils.memory import aligned


class Tower(nn.Module):
    """One encoder with its pooling.

    Args:
        backbone: A transformers encoder.
        pooling: ``cls``, ``mean``, or ``dpr_pooler`` (the pooler output, as DPR's models return it).
        projection_dim: Adds a linear layer to this many dimensions.
        normalise: Scales vectors to length 1, so that inner product is cosine similarity.
    """

    def __init__(
        self,
        *,
        backbone: PreTrainedModel,
        pooling: str = "cls",
        projection_dim: int | None = None,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        check_pooling(pooling)
        if backbone.config.model_type == "dpr" and pooling != "dpr_pooler":
            raise ConfigError(f"a DPR encoder returns only its pooler output: set pooling=dpr_pooler, got {pooling!r}")
        if pooling != "dpr_pooler" and getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # its output is not used; idle parameters would stall distributed training
        self.backbone = backbone
        self.pooling = pooling
        self.normalise = normalise
        width = backbone.config.hidden_size
        self.projection = nn.Linear(width, projection_dim) if projection_dim is not None else None
        own_projection = getattr(backbone.config, "projection_dim", 0) if pooling == "dpr_pooler" else 0
        self.group_overhead_tokens: float | None = None  # as a generator's
        self.dimension: int = projection_dim if projection_dim is not None else own_projection or width

    def forward(self, tokens: TokenBatch) -> Float[Tensor, "N D"]:
        """Returns one vector for each text; when learning, texts of like length run together."""
        if not torch.is_grad_enabled():  # corpora are encoded in batches of like length already
            return self._vectors(tokens)
        lengths, width = lengths_of(tokens), tokens.input_ids.shape[1]
        groups = model_length_groups(self.backbone, lengths, width, overhead_tokens=self.group_overhead_tokens)
        if len(groups) == 1:
            return self._vectors(tokens)
        embedded, vectors = embedded_once(self.backbone, tokens.input_ids), []
        for group in groups:
            with embedded(group):
                vectors.append(self._vectors(group.of(tokens)))
        return restored(vectors, groups)

    def _vectors(self, tokens: TokenBatch) -> Float[Tensor, "N D"]:
        output = self.backbone(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, return_dict=True)
        if self.pooling == "dpr_pooler":
            pooled_ND = output.pooler_output
        elif self.pooling == "mean":
            pooled_ND = pool_mean(output.last_hidden_state, tokens.attention_mask)
        else:
            pooled_ND = pool_cls(output.last_hidden_state)
        if self.projection is not None:
            pooled_ND = self.projection(pooled_ND)
        return unit_length(pooled_ND) if self.normalise else pooled_ND

    def save(self, directory: Path) -> None:
        """Writes the backbone in the transformers layout and the projection beside it."""
        self.backbone.save_pretrained(directory)
        if self.projection is not None:
            save_file(self.projection.state_dict(), directory / "projection.safetensors")

    def load_projection(self, directory: Path) -> None:
        """Reads the projection that :meth:`save` wrote, if this tower has one."""
        if self.projection is not None:
            self.projection.load_state_dict(load_file(directory / "projection.safetensors"))


class BiEncoder(nn.Module):
    """A query tower, a passage tower, and how each text is written for them.

    Args:
        query: The query tower.
        passage: The passage tower; the same object for shared towers; None where only a finished index is searched
            (published RAG checkpoints carry no passage encoder).
        tokenizer: The tokenizer of both.
        query_template: How a question is written; ``{question}``.
        passage_template: How a passage is written; ``{title}``, ``{text}``, ``{sep}`` (the separator token).
        max_query_tokens: Longest question, special tokens included.
        max_passage_tokens: Longest passage, special tokens not included; longer ones are cut and counted.

    Raises:
        ConfigError: The towers differ in dimension.
    """

    def __init__(
        self,
        *,
        query: Tower,
        passage: Tower | None,
        tokenizer: PreTrainedTokenizerBase | None,
        query_template: str = "{question}",
        passage_template: str = "{title} {text}",
        max_query_tokens: int = 64,
        max_passage_tokens: int = 254,
    ) -> None:
        super().__init__()
        if passage is not None and query.dimension != passage.dimension:
            raise ConfigError(
                f"query vectors have {query.dimension} dimensions but passage vectors {passage.dimension}: "
                "set projection_dim so that both towers end in one space"
            )
        self.query = query
        self.passage = passage
        self.tokenizer = tokenizer
        self.query_template = query_template
        self.passage_template = passage_template
        self.max_query_tokens = max_query_tokens
        self.max_passage_tokens = max_passage_tokens

    @property
    def shared(self) -> bool:
        """True where both towers are one."""
        return self.query is self.passage

    @property
    def dimension(self) -> int:
        """D, the dimension of query and passage vectors."""
        return self.query.dimension

    @classmethod
    def from_source(
        cls,
        *,
        source: str,
        passage_source: str | None = None,
        tokenizer: str | None = None,
        pooling: str = "mean",
        projection_dim: int | None = None,
        normalise: bool = True,
        shared: bool = False,
        query_template: str = "{question}",
        passage_template: str = "{title} {text}",
        max_query_tokens: int = 64,
        max_passage_tokens: int = 254,
    ) -> "BiEncoder":
        """Loads towers from a folder, a hub id, a ``bundled:`` folder, or ``minilm`` (the ``minilm`` extra).

        Args:
            source: The query tower's place.
            passage_source: The passage tower's place; by default the query tower's.
            tokenizer: The tokenizer's place; by default the query tower's.
            pooling: See :class:`Tower`.
            projection_dim: See :class:`Tower`.
            normalise: See :class:`Tower`.
            shared: One tower for both; otherwise they start equal (or from two places) and may part.
            query_template: See :class:`BiEncoder`.
            passage_template: See :class:`BiEncoder`.
            max_query_tokens: See :class:`BiEncoder`.
            max_passage_tokens: See :class:`BiEncoder`.
        """
        if shared and passage_source is not None:
            raise ConfigError("shared=true takes one source: remove passage_source, or set shared=false")
        place = model_place(source)

        def tower(where: str, role: str) -> Tower:
            backbone = _load_backbone(where, role, pooling)
            return Tower(backbone=backbone, pooling=pooling, projection_dim=projection_dim, normalise=normalise)

        query = tower(place, "query")
        passage = query if shared else tower(model_place(passage_source or source), "passage")
        if not shared and passage_source is None and query.projection is not None and passage.projection is not None:
            passage.projection.load_state_dict(query.projection.state_dict())
        return cls(
            query=query,
            passage=passage,
            tokenizer=load_tokenizer(model_place(tokenizer) if tokenizer is not None else place),
            query_template=query_template,
            passage_template=passage_template,
            max_query_tokens=max_query_tokens,
            max_passage_tokens=max_passage_tokens,
        )

    @classmethod
    def from_config(
        cls,
        *,
        model_type: str,
        settings: dict[str, Any],
        tokenizer: str,
        pooling: str = "mean",
        projection_dim: int | None = None,
        normalise: bool = True,
        shared: bool = False,
        query_template: str = "{question}",
        passage_template: str = "{title} {text}",
        max_query_tokens: int = 64,
        max_passage_tokens: int = 254,
    ) -> "BiEncoder":
        """Builds randomly initialised towers whose vocabulary is the tokenizer's; they start equal.

        Args:
            model_type: A transformers model type (``bert``), or ``rag_word_embeddings``.
            settings: Fields of that type's configuration.
            tokenizer: Folder, hub id or ``bundled:`` folder of the tokenizer.
            pooling: See :class:`Tower`.
            projection_dim: See :class:`Tower`.
            normalise: See :class:`Tower`.
            shared: One tower for both questions and passages.
            query_template: See :class:`BiEncoder`.
            passage_template: See :class:`BiEncoder`.
            max_query_tokens: See :class:`BiEncoder`.
            max_passage_tokens: See :class:`BiEncoder`.
        """
        tokens = load_tokenizer(model_place(tokenizer))
        ids = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id}
        config = AutoConfig.for_model(model_type, **{**ids, **settings})

        def tower() -> Tower:
            backbone = AutoModel.from_config(config)
            return Tower(backbone=backbone, pooling=pooling, projection_dim=projection_dim, normalise=normalise)

        query = tower()
        passage = query if shared else tower()
        passage.load_state_dict(query.state_dict())
        return cls(
            query=query,
            passage=passage,
            tokenizer=tokens,
            query_template=query_template,
            passage_template=passage_template,
            max_query_tokens=max_query_tokens,
            max_passage_tokens=max_passage_tokens,
        )

    def passage_text(self, passage: Passage) -> str:
        """Returns a passage as the passage tower reads it."""
        separator = (self.tokenizer.sep_token or "") if self.tokenizer is not None else ""
        return self.passage_template.format(title=passage.title, text=passage.text, sep=separator).strip()

    def passage_hash(self) -> str:
        """Returns the hash of all that decides a passage's vector: weights, pooling, template, limit, tokenizer.

        An index belongs to exactly one.
        """
        tower = self.passage_tower()
        decides = [
            hash_tensors(dict(tower.state_dict())),
            f"{tower.pooling} {tower.normalise} {self.passage_template} {self.max_passage_tokens}",
            str(getattr(tower.backbone.config, "weight_rate", "")),  # multiplies term weights, but is none of them
            tokenizer_hash(self.tokenizer) if self.tokenizer is not None else "no tokenizer",
        ]
        return hash_texts(decides)

    def index_hash(self) -> str | None:
        """Returns :meth:`passage_hash`; None without a passage tower, where nothing tells which indexes are its own."""
        return self.passage_hash() if self.passage is not None else None

    def passage_tower(self) -> Tower:
        """Returns the passage tower.

        Raises:
            ConfigError: There is none.
        """
        if self.passage is None:
            raise ConfigError(
                "this encoder has no passage tower (published RAG checkpoints have none): give encoder.passage_source, "
                "for instance facebook/dpr-ctx_encoder-single-nq-base, to encode passages"
            )
        return self.passage

    def save(self, directory: Path) -> None:
        """Writes the towers, and the tokenizer if there is one, in the transformers layout."""
        self.query.save(directory / "query")
        if self.passage is not None and not self.shared:
            self.passage.save(directory / "passage")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory / "tokenizer")

    def settings(self) -> dict[str, Any]:
        """Returns what :meth:`load` needs besides the files, as plain JSON."""
        return {
            "pooling": self.query.pooling,
            "projection_dim": self.query.dimension if self.query.projection is not None else None,
            "normalise": self.query.normalise,
            "shared": self.shared,
            "has_passage_tower": self.passage is not None,
            "query_template": self.query_template,
            "passage_template": self.passage_template,
            "max_query_tokens": self.max_query_tokens,
            "max_passage_tokens": self.max_passage_tokens,
        }

    @classmethod
    def load(cls, directory: Path, settings: dict[str, Any]) -> "BiEncoder":
        """Reads what :meth:`save` wrote.

        Shared towers may lie in ``passage`` instead of ``query``: so a passage tower is handed on alone.

        Raises:
            MissingFileError: A tower's folder is not there.
            CheckpointError: A tower's folder lacks weights.
        """
        settings = dict(settings)
        shared, has_passage_tower = settings.pop("shared"), settings.pop("has_passage_tower")
        of_tower = {name: settings.pop(name) for name in ("pooling", "projection_dim", "normalise")}

        def tower(role: str) -> Tower:
            backbone = _load_backbone(model_place(str(directory / role)), role, of_tower["pooling"])
            loaded = Tower(backbone=backbone, **of_tower)
            loaded.load_projection(directory / role)
            return loaded

        alone = shared and (directory / "passage").is_dir()
        query = tower("passage" if alone else "query")
        passage: Tower | None = None
        if has_passage_tower:
            passage = query if shared else tower("passage")
        has_tokenizer = (directory / "tokenizer").is_dir()
        tokenizer = load_tokenizer(directory / "tokenizer") if has_tokenizer else None
        return cls(query=query, passage=passage, tokenizer=tokenizer, **settings)


def _load_backbone(place: str, role: str, pooling: str) -> PreTrainedModel:
    """Loads one tower's encoder; a weight that the checkpoint lacks would stay random without a word.

    Raises:
        CheckpointError: The checkpoint lacks weights, for instance a DPR question encoder asked for as passage tower.
    """
    config = AutoConfig.from_pretrained(place)
    of_dpr = DPRQuestionEncoder if role == "query" else DPRContextEncoder
    loader = of_dpr if config.model_type == "dpr" else AutoModel
    backbone, report = loader.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    weights = {name for name, _ in backbone.named_parameters()}
    if pooling != "dpr_pooler":
        weights = {name for name in weights if not name.startswith("pooler.")}  # dropped by the tower
    missing = sorted(weights & set(report["missing_keys"]))
    if missing:
        found = ", ".join(config.architectures or [config.model_type])
        raise CheckpointError(
            f"{role} tower: {place} ({found}) lacks {len(missing)} weights of {type(backbone).__name__}, such as "
            f"{missing[0]}. Give a checkpoint of that class (DPR's two encoders differ: then set passage_source)."
        )
    model: PreTrainedModel = aligned(backbone)
    return model
