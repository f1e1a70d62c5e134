"""What a RagModel is made of, and how that is written to disk: safetensors, JSON and tokenizers, nothing pickled.

A saved model is a folder::

    rag_config.json            settings, prompt, decoding defaults, where its corpus and index snapshot are
    encoder/query, passage     the towers in the transformers layout (passage/ only where it differs)
    encoder/tokenizer
    generator/                 the reader with its tokenizer, in the transformers layout
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, RagSequenceForGeneration, RagTokenForGeneration

from rag_lightning.corpora.passages import resolve
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import CheckpointError, ConfigError, MissingFileError
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.base import Metric
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.utils.io import atomic_directory, read_json, write_json

MarginalKind = Literal["rag_token", "rag_sequence"]
DecodingMode = Literal["rag_token", "rag_sequence_fast", "rag_sequence_thorough"]
CONFIG_NAME = "rag_config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RagSettings:
    """How a model retrieves and marginalises; saved with it.

    Attributes:
        num_passages: K; 0 is a closed-book model.
        objective: The marginal it was trained with; also scores its answers.
        decoding: Default decoding.
        temperature: Divides similarities before their softmax. 1 for DPR's raw inner products; normalised encoders
            want about 0.05, since cosines lie within ±1.
        metric: Similarity of questions and passages.
        max_target_tokens: Longest target in training, special tokens included.
        hf_compat: Put the document prior where transformers puts it (see the marginals).
    """

    num_passages: int = 5
    objective: MarginalKind = "rag_token"
    decoding: DecodingMode = "rag_token"
    temperature: float = 1.0
    metric: Metric = "inner_product"
    max_target_tokens: int = 32
    hf_compat: bool = False

    def __post_init__(self) -> None:
        if self.num_passages < 0:
            raise ConfigError(f"expected num_passages >= 0 (0 is closed-book), got {self.num_passages}")
        if not self.temperature > 0:
            raise ConfigError(f"expected temperature > 0, got {self.temperature}")
        if self.max_target_tokens < 3:
            raise ConfigError(f"expected max_target_tokens >= 3 (start, a token, end), got {self.max_target_tokens}")


@dataclass(frozen=True)
class RetrieverSource:
    """Where a model's corpus and index snapshot are.

    Attributes:
        passages: A passage file, or a ``bundled:`` one.
        snapshot: The snapshot's folder.
    """

    passages: str
    snapshot: str

    def relative_to(self, directory: Path) -> "RetrieverSource":
        """Returns the same places as seen from ``directory``."""
        passages = self.passages
        if not passages.startswith("bundled:"):
            passages = os.path.relpath(passages, directory)
        return RetrieverSource(passages, os.path.relpath(self.snapshot, directory))

    def resolved_in(self, directory: Path) -> "RetrieverSource":
        """Undoes :meth:`relative_to`."""
        passages = self.passages
        if not passages.startswith("bundled:"):
            passages = os.path.normpath(directory / passages)
        return RetrieverSource(passages, os.path.normpath(directory / self.snapshot))


@dataclass(frozen=True, kw_only=True)
class RagParts:
    """The parts of a RagModel; see there."""

    encoder: BiEncoder | None
    generator: Seq2SeqGenerator
    prompt: Prompt
    settings: RagSettings
    decoding_options: DecodingOptions
    retriever_source: RetrieverSource | None = None


def save_parts(parts: RagParts, directory: Path) -> None:
    """Writes a model's folder, replacing one that exists only when the new one is complete."""
    source = parts.retriever_source
    config = {
        "format_version": FORMAT_VERSION,
        "settings": asdict(parts.settings),
        "prompt": asdict(parts.prompt),
        "decoding_options": asdict(parts.decoding_options),
        "encoder": parts.encoder.settings() if parts.encoder is not None else None,
        "retriever": asdict(source.relative_to(directory.absolute())) if source is not None else None,
    }
    with atomic_directory(directory, replace=True) as part:
        if parts.encoder is not None:
            parts.encoder.save(part / "encoder")
        parts.generator.save(part / "generator")
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
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{place}: expected model format {FORMAT_VERSION}, came {config.get('format_version')!r}: "
            "load it with the version of rag_lightning that wrote it"
        )
    retriever = config["retriever"]
    return RagParts(
        encoder=BiEncoder.load(place / "encoder", config["encoder"]) if config["encoder"] is not None else None,
        generator=Seq2SeqGenerator.load(place / "generator"),
        prompt=Prompt(**config["prompt"]),
        settings=RagSettings(**config["settings"]),
        decoding_options=DecodingOptions(**config["decoding_options"]),
        retriever_source=RetrieverSource(**retriever).resolved_in(place.absolute()) if retriever is not None else None,
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
        model_class.from_pretrained(source, dtype=torch.float32),
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
