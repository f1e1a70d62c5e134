"""What a RagModel is made of, and how that is written to disk: safetensors, JSON and tokenizers, nothing pickled.

A saved model is a folder::

    rag_config.json            settings, prompt, decoding defaults, how it retrieves, where its corpus and indexes are
    encoder/query, passage     the towers in the transformers layout (passage/ only where it differs)
    encoder/tokenizer
    generator/                 the reader with its tokenizer, in the transformers layout
    fusion.safetensors         the learned gate of a hybrid retriever, where there is one
    null_passage.safetensors   the vector of the null passage, where there is one
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, RagSequenceForGeneration, RagTokenForGeneration

from rag_lightning.corpora.passages import PassageCorpus, resolve
from rag_lightning.decoding.options import DecodingMode, DecodingOptions
from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import CheckpointError, ConfigError, MissingFileError
from rag_lightning.generators.causal import CausalGenerator
from rag_lightning.generators.pretrained import PretrainedGenerator
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.base import Metric
from rag_lightning.index.bm25 import Bm25Index
from rag_lightning.index.snapshot import open_snapshot
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.build import RetrieverSettings, build_retriever, open_cross_encoder
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.retrieval.encode import PassageTokens
from rag_lightning.retrieval.fusion import ScoreFusion, fusion_of
from rag_lightning.retrieval.null import NullPassage
from rag_lightning.retrieval.rerank import live_vectors
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.utils.io import atomic_directory, existing_file, read_json, write_json
from rag_lightning.utils.memory import aligned

MarginalKind = Literal["rag_token", "rag_sequence", "fid", "stuffed"]
GENERATORS: dict[str, type[PretrainedGenerator]] = {"seq2seq": Seq2SeqGenerator, "causal": CausalGenerator}
CONFIG_NAME = "rag_config.json"
FUSION_NAME = "fusion.safetensors"
NULL_PASSAGE_NAME = "null_passage.safetensors"
FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, FORMAT_VERSION)  # 1 knew dense retrieval only, 2 no null passage


@dataclass(frozen=True, kw_only=True)
class RagSettings:
    """How a model retrieves and marginalises; saved with it.

    Attributes:
        num_passages: K; 0 is a closed-book model.
        objective: The marginal it was trained with, or how all passages are read at once: ``fid`` (by the decoder,
            encoded apart) or ``stuffed`` (in one prompt). Also scores its answers.
        decoding: Default decoding.
        temperature: Divides similarities before their softmax. 1 for DPR's raw inner products; normalised encoders
            want about 0.05, since cosines lie within ±1.
        metric: Similarity of questions and passages.
        max_target_tokens: Longest target in training, special tokens included.
        hf_compat: Put the document prior where transformers puts it (see the marginals).
        null_passage: Choose among K + 1: the K passages found and none of them, the question alone; see
            :mod:`rag_lightning.retrieval.null`.
    """

    num_passages: int = 5
    objective: MarginalKind = "rag_token"
    decoding: DecodingMode = "rag_token"
    temperature: float = 1.0
    metric: Metric = "inner_product"
    max_target_tokens: int = 32
    hf_compat: bool = False
    null_passage: bool = False

    def __post_init__(self) -> None:
        if self.num_passages < 0:
            raise ConfigError(f"expected num_passages >= 0 (0 is closed-book), got {self.num_passages}")
        if self.null_passage and self.num_passages == 0:
            raise ConfigError(
                "model.null_passage: expected num_passages of at least 1, came 0: a closed-book model reads the "
                "question alone anyway. Set model.null_passage=false."
            )
        if not self.temperature > 0:
            raise ConfigError(f"expected temperature > 0, got {self.temperature}")
        if self.max_target_tokens < 3:
            raise ConfigError(f"expected max_target_tokens >= 3 (start, a token, end), got {self.max_target_tokens}")


@dataclass(frozen=True)
class RetrieverSource:
    """How a model retrieves, and where its corpus and indexes are.

    Attributes:
        passages: A passage file, or a ``bundled:`` one.
        snapshot: The snapshot's folder; None for retrieval by words alone.
        bm25: The BM25 index's folder, for retrieval by words; None builds it in memory when it is first wanted.
        settings: The kind of retriever.
    """

    passages: str
    snapshot: str | None = None
    bm25: str | None = None
    settings: RetrieverSettings = field(default_factory=RetrieverSettings)

    def relative_to(self, directory: Path) -> "RetrieverSource":
        """Returns the same places as seen from ``directory``."""
        place = self.settings.cross_encoder
        is_folder = place is not None and Path(place).is_dir()  # and no hub id
        return self._moved(lambda place: os.path.relpath(place, directory), moves_cross_encoder=is_folder)

    def resolved_in(self, directory: Path) -> "RetrieverSource":
        """Undoes :meth:`relative_to`."""
        place = self.settings.cross_encoder
        is_folder = place is not None and (directory / place).is_dir()
        return self._moved(lambda place: os.path.normpath(directory / place), moves_cross_encoder=is_folder)

    def _moved(self, move: Callable[[str], str], *, moves_cross_encoder: bool) -> "RetrieverSource":
        settings = self.settings
        if moves_cross_encoder and settings.cross_encoder is not None:
            settings = replace(settings, cross_encoder=move(settings.cross_encoder))
        return replace(
            self,
            passages=self.passages if self.passages.startswith("bundled:") else move(self.passages),
            snapshot=move(self.snapshot) if self.snapshot is not None else None,
            bm25=move(self.bm25) if self.bm25 is not None else None,
            settings=settings,
        )


@dataclass(frozen=True, kw_only=True)
class RagParts:
    """The parts of a RagModel; see there."""

    encoder: BiEncoder | None
    generator: PretrainedGenerator
    prompt: Prompt
    settings: RagSettings
    decoding_options: DecodingOptions
    retriever_source: RetrieverSource | None = None
    fusion: ScoreFusion | None = None
    null_passage: NullPassage | None = None


def save_parts(parts: RagParts, directory: Path) -> None:
    """Writes a model's folder, replacing one that exists only when the new one is complete."""
    source = parts.retriever_source
    config = {
        "format_version": FORMAT_VERSION,
        "settings": asdict(parts.settings),
        "prompt": asdict(parts.prompt),
        "decoding_options": asdict(parts.decoding_options),
        "encoder": parts.encoder.settings() if parts.encoder is not None else None,
        "generator": {"kind": parts.generator.kind, "settings": parts.generator.settings()},
        "fusion": parts.fusion.settings() if parts.fusion is not None else None,
        "retriever": asdict(source.relative_to(directory.absolute())) if source is not None else None,
    }
    with atomic_directory(directory, replace=True) as part:
        if parts.encoder is not None:
            parts.encoder.save(part / "encoder")
        parts.generator.save(part / "generator")
        if parts.fusion is not None and parts.fusion.state_dict():
            save_file(parts.fusion.state_dict(), part / FUSION_NAME)
        if parts.null_passage is not None:
            save_file(parts.null_passage.state_dict(), part / NULL_PASSAGE_NAME)
        write_json(part / CONFIG_NAME, config)


def load_parts(source: str | Path) -> RagParts:
    """Reads a model's folder, or a published RAG checkpoint in transformers' layout.

    Raises:
        MissingFileError: ``source`` looks like a path and is not there.
        CheckpointError: The folder is of neither layout, or of a newer format.
    """
    place = resolve(source)
    if not (place / CONFIG_NAME).is_file():
        return _load_published(str(source), place)
    config = read_json(place / CONFIG_NAME, "model configuration")
    if config.get("format_version") not in READABLE_VERSIONS:
        raise CheckpointError(
            f"{place}: expected model format {FORMAT_VERSION} or older, came {config.get('format_version')!r}: "
            "load it with the version of rag_lightning that wrote it"
        )
    settings = RagSettings(**config["settings"])
    return RagParts(
        encoder=BiEncoder.load(place / "encoder", config["encoder"]) if config["encoder"] is not None else None,
        generator=_load_generator(config.get("generator"), place),
        prompt=Prompt(**config["prompt"]),
        settings=settings,
        decoding_options=DecodingOptions(**config["decoding_options"]),
        retriever_source=_load_source(config["retriever"], place),
        fusion=_load_fusion(config.get("fusion"), place),
        null_passage=_load_null_passage(place) if settings.null_passage else None,
    )


def _load_generator(record: dict[str, Any] | None, place: Path) -> PretrainedGenerator:
    record = record if record is not None else {"kind": "seq2seq", "settings": {}}  # as all models once were
    return GENERATORS[record["kind"]].load(place / "generator", record["settings"])


def _load_source(record: dict[str, Any] | None, place: Path) -> RetrieverSource | None:
    if record is None:
        return None
    settings = RetrieverSettings(**record.get("settings", {}))
    return RetrieverSource(**{**record, "settings": settings}).resolved_in(place.absolute())


def _load_fusion(record: dict[str, Any] | None, place: Path) -> ScoreFusion | None:
    if record is None:
        return None
    fusion = fusion_of(record)
    if fusion.state_dict():
        weights = load_file(existing_file(place / FUSION_NAME, "the model's fusion"))
        try:
            fusion.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{place / FUSION_NAME}: expected the weights of {record}: {error}") from error
    return fusion


def _load_null_passage(place: Path) -> NullPassage:
    weights = load_file(existing_file(place / NULL_PASSAGE_NAME, "the model's null passage"))
    if set(weights) != {"vector_D"}:
        raise CheckpointError(f"{place / NULL_PASSAGE_NAME}: expected vector_D alone, came {sorted(weights)}")
    return NullPassage(weights["vector_D"])


def open_retriever(source: RetrieverSource, *, encoder: BiEncoder | None, fusion: ScoreFusion | None) -> Retriever:
    """Opens the retriever that a model was saved with.

    Args:
        source: Which, and where.
        encoder: The model's; None for a retriever that needs no vectors.
        fusion: The model's.

    Raises:
        ConfigError: A part that the retriever needs is missing.
        MissingFileError: A corpus or index has been moved.
        StaleIndexError: The snapshot was made by another encoder, or an index from another corpus.
    """
    settings = source.settings
    corpus = PassageCorpus.read(source.passages)
    dense, reencode, bm25 = None, None, None
    if settings.needs_vectors:
        if encoder is None or source.snapshot is None:
            raise ConfigError(
                f"this model retrieves by vectors (kind={settings.kind}): expected an encoder and an index snapshot, "
                "came a model without. Pass a retriever that needs none, or load the model that was trained."
            )
        snapshot = open_snapshot(Path(source.snapshot), encoder_hash=encoder.index_hash(), corpus_hash=corpus.hash)
        dense = DenseRetriever(snapshot, corpus)
        if settings.rerank == "live":
            reencode = live_vectors(encoder, PassageTokens(encoder=encoder, corpus=corpus))
    if settings.needs_words and source.bm25 is not None:
        bm25 = Bm25Index.load(Path(source.bm25))
    elif settings.needs_words:
        bm25 = Bm25Index.build(corpus, settings.bm25)
    return build_retriever(
        settings,
        corpus=corpus,
        dense=dense,
        bm25=bm25,
        fusion=fusion,
        reencode=reencode,
        cross_encoder=open_cross_encoder(settings),
    )


def _load_published(source: str, place: Path) -> RagParts:
    is_folder = place.is_dir()
    if not is_folder and (place.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise MissingFileError(f"model: no such folder: {place}. Check the path.")
    if is_folder and not (place / "config.json").is_file():
        raise CheckpointError(
            f"{place}: expected {CONFIG_NAME} (a model saved by this package) or config.json (a published RAG "
            f"checkpoint), found {sorted(entry.name for entry in place.iterdir())[:8]}. Give the model folder of a run."
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{source}: expected a saved model's folder or a hub id, but no configuration could be read: {reason}. "
            "Check the name and the network."
        ) from error
    if config.model_type != "rag":
        raise CheckpointError(f"{source}: expected model type 'rag', came {config.model_type!r}: not a RAG checkpoint")
    sequence = "RagSequenceForGeneration" in (config.architectures or [])
    model_class = RagSequenceForGeneration if sequence else RagTokenForGeneration
    return parts_of_hf_rag(
        aligned(model_class.from_pretrained(source, dtype=torch.float32)),
        load_tokenizer(source, "question_encoder_tokenizer", config.question_encoder),
        load_tokenizer(source, "generator_tokenizer", config.generator),
    )


def parts_of_hf_rag(hf_model: Any, question_tokenizer: Any = None, generator_tokenizer: Any = None) -> RagParts:
    """Takes a transformers RAG model apart; weights are shared, not copied.

    Raises:
        CheckpointError: The question encoder is not DPR's. transformers takes such an encoder's first output for
            a vector, which for other models is a sequence of states.
    """
    config = hf_model.config
    if hf_model.question_encoder.config.model_type != "dpr":
        raise CheckpointError(
            "expected a DPR question encoder (its first output is one vector), got model type "
            f"{hf_model.question_encoder.config.model_type!r}: build a BiEncoder with a pooling instead"
        )
    context_encoder = getattr(hf_model.rag, "ctx_encoder", None)
    sequence = isinstance(hf_model, RagSequenceForGeneration)
    return RagParts(
        encoder=BiEncoder(
            query=Tower(backbone=hf_model.question_encoder, pooling="dpr_pooler"),
            passage=Tower(backbone=context_encoder, pooling="dpr_pooler") if context_encoder is not None else None,
            tokenizer=question_tokenizer,
            passage_template="{title} {sep} {text}",
        ),
        generator=Seq2SeqGenerator(model=hf_model.generator, tokenizer=generator_tokenizer),
        prompt=Prompt(
            passage_template="{title}" + config.title_sep + "{text}",
            question_template=config.doc_sep + "{question}",
            max_tokens=config.max_combined_length,
            max_passage_tokens=config.max_combined_length,
        ),
        settings=RagSettings(
            num_passages=config.n_docs,
            objective="rag_sequence" if sequence else "rag_token",
            decoding="rag_sequence_thorough" if sequence else "rag_token",
        ),
        decoding_options=_hf_decoding_options(hf_model),
    )


def _hf_decoding_options(hf_model: Any) -> DecodingOptions:
    generation = hf_model.generator.generation_config
    return DecodingOptions(
        num_beams=generation.num_beams or 1,
        max_new_tokens=(generation.max_length or 20) - 1,
        length_penalty=generation.length_penalty if generation.length_penalty is not None else 1.0,
        forced_bos_token_id=generation.forced_bos_token_id,
        forced_eos_token_id=generation.forced_eos_token_id,
    )
