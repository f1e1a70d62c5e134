"""One set of weights and one set of batches, seen by ours, by transformers' RAG and by the bare models.

Inputs: a :class:`~rag_lightning.benchmark.shape.Shape` and texts. The models are transformers' DPR question encoder and
BART from a configuration, random and without dropout, so that the sides' losses can be compared. Passage vectors are
drawn, not encoded; each question's K passages are given vectors near its own (a random encoder's questions all point
the same way, and would otherwise all find the same passages, of the same lengths).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRQuestionEncoder,
    PreTrainedTokenizerBase,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
)

from rag_lightning.benchmark.shape import Shape
from rag_lightning.benchmark.texts import Texts
from rag_lightning.index.snapshot import SnapshotStore
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.contexts import ContextAssembler
from rag_lightning.retrieval.dense import DenseRetriever
from rag_lightning.text.token_store import TokenStore
from rag_lightning.types import Question, QuestionBatch, TokenBatch
from rag_lightning.utils.seeding import derived_seed

_SPREAD = 4.0
"""How far a question's own passages score above the others, so that ``p(z|x)`` is neither flat nor certain."""


@dataclass(frozen=True, kw_only=True)
class PaddedBatch:
    """A batch as a reader without a retriever takes it: what ours found, made ready beforehand.

    Attributes:
        query: The questions in the encoder's vocabulary.
        contexts: Padded to the batch's longest, ``[B * K, L]``.
        padded: Padded to ``max_combined_length``, as transformers' ``RagRetriever.postprocess_docs`` does.
        passages_BKD: The found passages' vectors.
        labels: The targets, start token first.
    """

    query: TokenBatch
    contexts: TokenBatch
    padded: TokenBatch
    passages_BKD: Float[Tensor, "B K D"]
    labels: Int[Tensor, "B T1"]


@dataclass(frozen=True, kw_only=True)
class World:
    """What every side works on.

    Attributes:
        shape: The sizes.
        texts: What is read.
        model: Ours.
        rag_token: transformers' ``RagTokenForGeneration`` around the same weights.
        rag_sequence: transformers' ``RagSequenceForGeneration`` likewise.
        store: The passages' tokens, memory-mapped.
        assembler: Joins them to questions.
        retriever: Exact search.
        batches: Ours.
        padded: The same for the other sides.
        folder: For files of parts that write some.
    """

    shape: Shape
    texts: Texts
    model: RagModel
    rag_token: Any
    rag_sequence: Any
    store: TokenStore
    assembler: ContextAssembler
    retriever: DenseRetriever
    batches: Sequence[QuestionBatch]
    padded: Sequence[PaddedBatch]
    folder: Path

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return torch.device(self.shape.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns what a forward pass runs under."""
        if self.shape.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.shape.device, torch.bfloat16)

    def zero_gradients(self) -> None:
        """Drops the gradients of all weights; the sides share them."""
        self.model.zero_grad(set_to_none=True)


def build_world(shape: Shape, texts: Texts, folder: Path) -> World:
    """Returns weights, corpus, index and batches.

    Args:
        shape: The sizes.
        texts: What is read; its tokenizer decides V.
        folder: An existing folder for the token store and the index.

    Raises:
        ConfigError: The texts do not fit the shape.
    """
    rag_token, rag_sequence = hf_models(shape, texts.tokenizer)
    model = RagModel.from_hf_rag(
        rag_token, question_tokenizer=texts.tokenizer, generator_tokenizer=texts.tokenizer
    ).train()
    model.settings = replace(model.settings, max_target_tokens=shape.max_target_tokens + 1)
    store = TokenStore.build(
        (model.prompt.passage_text(passage) for passage in texts.corpus),
        texts.tokenizer,
        directory=folder / "tokens",
        key="benchmark",
        max_tokens=model.prompt.max_passage_tokens,
        progress=False,
    )
    assembler = ContextAssembler(
        corpus=texts.corpus,
        tokenizer=texts.tokenizer,
        prompt=model.prompt,
        store=store,
        affixes=model.generator.affixes(),
    )
    device = torch.device(shape.device)
    size = shape.batch_size
    groups = [texts.questions[first : first + size] for first in range(0, len(texts.questions), size)]
    batches = [_question_batch(model, group).to(device) for group in groups]
    vectors_ND = _planted_vectors(model, batches, len(texts.corpus), shape)
    snapshot = SnapshotStore(folder / "index", device=device if device.type == "cuda" else None).publish(
        vectors_ND, encoder_hash="benchmark", corpus_hash=texts.corpus.hash, pooling="dpr_pooler"
    )
    retriever = DenseRetriever(snapshot, texts.corpus)
    padded = [_padded(model, batch, retriever, assembler, shape) for batch in batches]
    return World(
        shape=shape,
        texts=texts,
        model=model,
        rag_token=rag_token,
        rag_sequence=rag_sequence,
        store=store,
        assembler=assembler,
        retriever=retriever,
        batches=batches,
        padded=padded,
        folder=folder,
    )


def hf_models(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """Returns transformers' RAG-Token and RAG-Sequence around one random question encoder and one random BART."""
    torch.manual_seed(derived_seed(shape.seed, "benchmark weights") % 2**32)
    question_config = DPRConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.encoder_width,
        num_hidden_layers=shape.encoder_layers,
        num_attention_heads=shape.encoder_heads,
        intermediate_size=4 * shape.encoder_width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator_config = bart_config(shape, tokenizer)
    config = RagConfig.from_question_encoder_generator_configs(
        question_config,
        generator_config,
        n_docs=shape.num_passages,
        max_combined_length=shape.max_combined_length,
    )
    device = torch.device(shape.device)
    parts: dict[str, Any] = {
        "question_encoder": DPRQuestionEncoder(question_config).to(device),
        "generator": BartForConditionalGeneration(generator_config).to(device),
    }
    token, sequence = RagTokenForGeneration(config, **parts), RagSequenceForGeneration(config, **parts)
    return token.train(), sequence.train()


def bart_config(shape: Shape, tokenizer: PreTrainedTokenizerBase) -> BartConfig:
    """Returns the generator's configuration: the tokenizer's special tokens, no dropout, nothing forced."""
    start: Mapping[str, Any] = {
        "bos_token_id": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": _first(tokenizer.eos_token_id, tokenizer.sep_token_id),
    }
    return BartConfig(
        vocab_size=len(tokenizer),
        d_model=shape.generator_width,
        encoder_layers=shape.generator_layers,
        decoder_layers=shape.generator_layers,
        encoder_attention_heads=shape.generator_heads,
        decoder_attention_heads=shape.generator_heads,
        encoder_ffn_dim=shape.generator_ffn,
        decoder_ffn_dim=shape.generator_ffn,
        max_position_embeddings=shape.generator_positions,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=start["bos_token_id"],
        forced_bos_token_id=None,
        forced_eos_token_id=None,
        **start,
    )


def _first(first: int | None, second: int | None) -> int | None:
    return first if first is not None else second


def _question_batch(model: RagModel, questions: Sequence[Question]) -> QuestionBatch:
    texts = [question.question for question in questions]
    return QuestionBatch(
        questions=tuple(questions),
        query=model.query_tokens(texts),
        prompt=model.prompt_tokens(texts),
        labels=model.target_tokens([question.answers[0] for question in questions]),
        positive_ids=torch.full((len(questions),), -1),
        weights_B=torch.ones(len(questions)),
    )


@torch.no_grad()
def _planted_vectors(
    model: RagModel, batches: Sequence[QuestionBatch], num_passages: int, shape: Shape
) -> Float[Tensor, "N D"]:
    """Returns drawn passage vectors, K of which, drawn too, lie in each question's own direction."""
    assert model.encoder is not None
    queries_QD = torch.cat([model.encoder.query(_given(batch.query)).float().cpu() for batch in batches])
    common_D = F.normalize(queries_QD.mean(dim=0), dim=0)
    own_QD = queries_QD - (queries_QD @ common_D)[:, None] * common_D
    rng = np.random.default_rng(derived_seed(shape.seed, "benchmark vectors"))
    noise_ND: Tensor = torch.from_numpy(rng.standard_normal((num_passages, queries_QD.shape[1]), dtype=np.float32))
    noise_ND -= (noise_ND @ common_D)[:, None] * common_D
    size = own_QD.norm(dim=1).mean().clamp_min(1e-6)
    vectors_ND: Tensor = noise_ND / (size * noise_ND.shape[1] ** 0.5)
    for own_D in own_QD:
        rows = torch.from_numpy(rng.choice(num_passages, shape.num_passages, replace=False))
        vectors_ND[rows] += _SPREAD * F.normalize(own_D, dim=0) / size
    return vectors_ND


@torch.no_grad()
def _padded(
    model: RagModel, batch: QuestionBatch, retriever: DenseRetriever, assembler: ContextAssembler, shape: Shape
) -> PaddedBatch:
    query = _given(batch.query)
    hits, _ = model.retrieve(query, [question.question for question in batch.questions], retriever)
    contexts = assembler.contexts(hits.ids_BK, batch.prompt)
    missing = shape.max_combined_length - contexts.input_ids.shape[1]
    padded = TokenBatch(
        F.pad(contexts.input_ids, (0, missing), value=model.generator.pad_token_id),
        F.pad(contexts.attention_mask, (0, missing)),
    )
    passages_BKD = retriever.vectors(hits.ids_BK)
    return PaddedBatch(query=query, contexts=contexts, padded=padded, passages_BKD=passages_BKD, labels=batch.labels)


def _given(query: TokenBatch | None) -> TokenBatch:
    assert query is not None
    return query
