"""RagModel: a query encoder, a generator, and the marginal likelihood that trains them together.

Read this page first. For a question x, the encoder gives a vector q; the index gives K passages z with their
similarities; ``p(z|x)`` is the softmax of the similarities (or of BM25, or of both fused: whatever document scores the
retriever gives, see :mod:`rag_lightning.retrieval`); the generator reads each passage joined to the question and gives
``p(y_t | x, z, y_<t)``; :mod:`rag_lightning.losses.marginal` sums the passages out. The gradient reaches the query
encoder through ``p(z|x)``: a passage that explains the answer better than its rivals is drawn nearer.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.decoding.options import Decoded, DecodingOptions
from rag_lightning.decoding.rag_sequence import decode_rag_sequence
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import EncodedContexts
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.index.base import similarity
from rag_lightning.losses.marginal import (
    doc_log_prior,
    hf_smoothed_nll,
    passage_log_likelihood,
    passage_log_posterior,
    rag_sequence_log_likelihood,
    rag_token_log_likelihood,
    smoothing_penalty,
)
from rag_lightning.rag_parts import (
    DecodingMode,
    MarginalKind,
    RagParts,
    RagSettings,
    RetrieverSource,
    load_parts,
    open_retriever,
    parts_of_hf_rag,
    save_parts,
)
from rag_lightning.retrieval.base import Retriever
from rag_lightning.retrieval.contexts import ContextAssembler, pad_sequences
from rag_lightning.retrieval.fusion import ScoreFusion
from rag_lightning.text.prompts import Prompt
from rag_lightning.types import Hits, Prediction, Question, RagBatch, RetrievedPassage, TensorRecord, TokenBatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Marginal(TensorRecord):
    """What the marginal says of a batch.

    Attributes:
        nll_B: The training loss of each example: ``-log p(y|x)``, label-smoothed if asked.
        log_likelihood_B: ``log p(y|x)`` without smoothing.
        log_prior_BK: ``log p(z|x)``.
        log_posterior_BK: ``log p(z|x,y)``.
        passage_log_likelihood_BK: ``log p(y|x,z)``, of the whole answer from each passage alone; None for
            fusion-in-decoder where it was not asked for, and then the posterior is the prior.
        num_tokens_B: Scored target tokens.
        logits_BRTV: The decoder's logits, only when asked for: R is K, or 1 for fusion-in-decoder, which reads once.
    """

    nll_B: Float[Tensor, "B"]
    log_likelihood_B: Float[Tensor, "B"]
    log_prior_BK: Float[Tensor, "B K"]
    log_posterior_BK: Float[Tensor, "B K"]
    passage_log_likelihood_BK: Float[Tensor, "B K"] | None
    num_tokens_B: Int[Tensor, "B"]
    logits_BRTV: Float[Tensor, "B R T V"] | None = None


class RagModel(nn.Module):
    """Encoder, generator and marginal.

    Args:
        encoder: The two towers; None for a closed-book model, or for one that retrieves by words alone.
        generator: The reader.
        prompt: How passage and question are written for the generator.
        settings: K, marginal, temperature, metric.
        decoding_options: Defaults for :meth:`generate`.
        fusion: How a hybrid retriever joins its scores; kept here, so that a learned gate is trained and saved too.
    """

    def __init__(
        self,
        *,
        encoder: BiEncoder | None,
        generator: Seq2SeqGenerator,
        prompt: Prompt | None = None,
        settings: RagSettings | None = None,
        decoding_options: DecodingOptions | None = None,
        fusion: ScoreFusion | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.fusion = fusion
        self.generator = generator
        self.prompt = prompt if prompt is not None else Prompt()
        self.settings = settings if settings is not None else RagSettings()
        self.decoding_options = decoding_options if decoding_options is not None else DecodingOptions()
        self.retriever_source: RetrieverSource | None = None
        self._default_retriever: Retriever | None = None
        self._told_of_cut_questions = False

    # ------------------------------------------------------------------ scoring

    def retrieve(
        self,
        query: TokenBatch | None,
        questions: Sequence[str],
        retriever: Retriever,
        *,
        num_passages: int | None = None,
        reencode: Callable[[Int[Tensor, "B K"]], TokenBatch] | None = None,
    ) -> tuple[Hits, Float[Tensor, "B K"]]:
        """Returns the hits, and their document scores with gradient to what the retriever names in ``gradient_to``.

        One search serves the whole batch. The search itself has no gradient; the similarities of what it found do,
        against the index's vectors (a frozen passage encoder) or against freshly encoded passages. The retriever makes
        document scores of them (:meth:`rag_lightning.retrieval.base.Retriever.scores`); where its scores are constants,
        no similarities are computed, and where it searches by words alone, no question is encoded.

        Args:
            query: Questions in the encoder's vocabulary; may be None for a retriever that needs no vectors.
            questions: Their texts.
            retriever: Where to search.
            num_passages: K; the model's by default.
            reencode: Gives the encoder tokens ``[B * K, L]`` of passage numbers. When given, the K passages are
                encoded again with gradient to the passage encoder, though found through the index of an older one.

        Raises:
            ConfigError: The retriever searches by vectors, and there is no encoder or ``query`` to make them from.
        """
        num_passages = num_passages if num_passages is not None else self.settings.num_passages
        device = next(self.parameters()).device
        if not retriever.needs_vectors:
            hits = retriever.retrieve(questions, None, num_passages).to(device)
            return hits, retriever.scores(hits, None, None)
        if self.encoder is None or query is None:
            what = "this model has no encoder" if self.encoder is None else "the questions came without encoder tokens"
            raise ConfigError(
                f"{what}, and the retriever searches by query vectors: give an encoder, retrieve by words "
                "(retriever kind sparse), or set num_passages=0 for a closed-book model"
            )
        if not retriever.gradient_to:
            with torch.no_grad():
                hits = retriever.retrieve(questions, self.encoder.query(query), num_passages).to(device)
            return hits, retriever.scores(hits, None, None)
        queries_BD = self.encoder.query(query)
        hits = retriever.retrieve(questions, queries_BD.detach(), num_passages)
        if reencode is None:
            passages_BKD = retriever.vectors(hits.ids_BK).to(queries_BD.device)
        else:
            passages_ND = self.encoder.passage_tower()(reencode(hits.ids_BK))
            passages_BKD = passages_ND.view(*hits.ids_BK.shape, passages_ND.shape[-1])
        similarities_BK = similarity(queries_BD, passages_BKD, self.settings.metric, hits.found_BK)
        return hits, retriever.scores(hits, similarities_BK, queries_BD)

    def marginal(
        self,
        batch: RagBatch,
        *,
        encoded: EncodedContexts | None = None,
        objective: MarginalKind | None = None,
        label_smoothing: float = 0.0,
        hf_compat: bool | None = None,
        read_alone: bool = True,
        keep_logits: bool = False,
    ) -> Marginal:
        """Returns the marginal likelihood of the batch's targets; with ``fid`` that of a decoder that reads them all.

        Args:
            batch: Contexts, similarities, labels.
            encoded: The contexts, if they are encoded already.
            objective: ``rag_token``, ``rag_sequence`` or ``fid``; the model's by default.
            label_smoothing: ε; see :func:`rag_lightning.losses.marginal.smoothing_penalty`.
            hf_compat: Prior placement and smoothing as in transformers; the model's setting by default.
            read_alone: With ``fid``, score the target from each passage alone too, without gradient.
            keep_logits: Also return the logits, for losses that compare whole distributions.
        """
        objective = objective if objective is not None else self.settings.objective
        if objective == "fid":
            return self._fused(batch, encoded, label_smoothing, read_alone=read_alone, keep_logits=keep_logits)
        hf_compat = hf_compat if hf_compat is not None else self.settings.hf_compat
        hf_smoothing = hf_compat and label_smoothing > 0
        output = self.generator.score(
            encoded if encoded is not None else self.generator.encode(batch.contexts),
            batch.labels,
            batch.doc_scores_BK.shape[1],
            vocab_mean=label_smoothing > 0 and not hf_compat,
            keep_logits=hf_smoothing or keep_logits,
        )
        prior_BK = doc_log_prior(batch.doc_scores_BK, self.settings.temperature)
        arguments = (output.token_log_probs_BKT, prior_BK, output.target_mask_BT)
        if objective == "rag_sequence":
            log_likelihood_B = rag_sequence_log_likelihood(*arguments, hf_compat=hf_compat)
        elif objective == "rag_token":
            log_likelihood_B = rag_token_log_likelihood(*arguments)
        else:
            raise ConfigError(f"expected objective rag_token, rag_sequence or fid, got {objective!r}")
        posterior_BK = passage_log_posterior(*arguments)
        nll_B = -log_likelihood_B
        if hf_smoothing and output.logits_BKTV is not None:
            nll_B = hf_smoothed_nll(
                output.logits_BKTV,
                prior_BK,
                batch.labels[:, 1:],
                output.target_mask_BT,
                label_smoothing,
                sequence=objective == "rag_sequence",
            )
        elif output.vocab_mean_BKT is not None:
            penalty_B = smoothing_penalty(output.vocab_mean_BKT, posterior_BK, output.target_mask_BT)
            nll_B = (1 - label_smoothing) * nll_B + label_smoothing * penalty_B
        alone_BK = passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)
        logits_BRTV = output.logits_BKTV if keep_logits else None
        num_tokens_B = output.target_mask_BT.sum(dim=1)
        return Marginal(nll_B, log_likelihood_B, prior_BK, posterior_BK, alone_BK, num_tokens_B, logits_BRTV)

    def _fused(
        self,
        batch: RagBatch,
        encoded: EncodedContexts | None,
        label_smoothing: float,
        *,
        read_alone: bool,
        keep_logits: bool,
    ) -> Marginal:
        """Returns what a decoder says that attends to all passages at once; see :meth:`EncodedContexts.fused`."""
        encoded = encoded if encoded is not None else self.generator.encode(batch.contexts)
        prior_BK = doc_log_prior(batch.doc_scores_BK, self.settings.temperature)
        fused = encoded.fused(prior_BK > -torch.inf)
        output = self.generator.score(fused, batch.labels, 1, vocab_mean=label_smoothing > 0, keep_logits=keep_logits)
        log_likelihood_B = passage_log_likelihood(output.token_log_probs_BKT, output.target_mask_BT)[:, 0]
        nll_B = -log_likelihood_B
        if output.vocab_mean_BKT is not None:
            certain_B1 = torch.zeros_like(nll_B)[:, None]
            penalty_B = smoothing_penalty(output.vocab_mean_BKT, certain_B1, output.target_mask_BT)
            nll_B = (1 - label_smoothing) * nll_B + label_smoothing * penalty_B
        alone_BK, posterior_BK = None, prior_BK
        if read_alone:
            with torch.no_grad():
                each = self.generator.score(encoded, batch.labels, prior_BK.shape[1])
            alone_BK = passage_log_likelihood(each.token_log_probs_BKT, each.target_mask_BT)
            posterior_BK = passage_log_posterior(each.token_log_probs_BKT, prior_BK.detach(), each.target_mask_BT)
        num_tokens_B = output.target_mask_BT.sum(dim=1)
        return Marginal(nll_B, log_likelihood_B, prior_BK, posterior_BK, alone_BK, num_tokens_B, output.logits_BKTV)

    def log_likelihood(
        self,
        *,
        context_input_ids: Int[Tensor, "N L"],
        context_attention_mask: Int[Tensor, "N L"],
        doc_scores: Float[Tensor, "B K"],
        labels: Int[Tensor, "B T1"],
        objective: MarginalKind | None = None,
        hf_compat: bool | None = None,
    ) -> Float[Tensor, "B"]:
        """Returns ``log p(y | x)`` from exactly the tensors that transformers' RAG forward takes.

        Args:
            context_input_ids: ``[B * K, L]``, passages of one question adjacent.
            context_attention_mask: 1 on real tokens.
            doc_scores: Raw similarities.
            labels: Start token first, padding where unscored; at least one scored token in each row.
            objective: ``rag_token`` or ``rag_sequence``; the model's by default.
            hf_compat: See :meth:`marginal`.
        """
        batch = RagBatch(TokenBatch(context_input_ids, context_attention_mask), doc_scores, labels)
        return self.marginal(batch, objective=objective, hf_compat=hf_compat).log_likelihood_B

    # ------------------------------------------------------------------ text to tensors

    def query_tokens(self, questions: Sequence[str]) -> TokenBatch:
        """Returns questions in the encoder's vocabulary, special tokens included."""
        if self.encoder is None or self.encoder.tokenizer is None:
            raise ConfigError("this model has no encoder tokenizer: give one when loading it")
        texts = [self.encoder.query_template.format(question=question) for question in questions]
        encoded = self.encoder.tokenizer(texts, truncation=True, max_length=self.encoder.max_query_tokens)["input_ids"]
        return pad_sequences(encoded, self.encoder.tokenizer.pad_token_id)

    def prompt_tokens(self, questions: Sequence[str]) -> TokenBatch:
        """Returns the question part of the generator's input, without special tokens."""
        texts = [self.prompt.question_text(question) for question in questions]
        encoded = self._generator_tokenizer()(texts, add_special_tokens=False)["input_ids"]
        limit = self.prompt.max_tokens // 2
        num_cut = sum(len(ids) > limit for ids in encoded)
        if num_cut > 0 and not self._told_of_cut_questions:
            self._told_of_cut_questions = True
            logger.warning(
                "%d of %d questions are longer than half of prompt.max_tokens=%d and are cut there; further ones will "
                "be cut without a message. Raise model.prompt.max_tokens.",
                num_cut,
                len(encoded),
                self.prompt.max_tokens,
            )
        return pad_sequences([ids[:limit] for ids in encoded], self.generator.pad_token_id)

    def target_tokens(self, answers: Sequence[str]) -> Int[Tensor, "B T1"]:
        """Returns labels: the decoder's start token, the answer as the tokenizer writes it, the end token, padding.

        A tokenizer that begins texts with a token of its own keeps it after the start token (BART: ``</s> <s> …``),
        so that training sees the prefix that decoding starts from.
        """
        generator = self.generator
        tokenizer = self._generator_tokenizer()
        rows = []
        for ids in tokenizer(list(answers))["input_ids"]:
            body = [token for token in ids if token != generator.pad_token_id]
            body = body[:-1] if body and body[-1] == generator.eos_token_id else body
            body = body[1:] if body and body[0] == generator.start_token_id else body
            body = body[: self.settings.max_target_tokens - 2]
            rows.append([generator.start_token_id, *body, generator.eos_token_id])
        return pad_sequences(rows, generator.pad_token_id).input_ids

    def _generator_tokenizer(self) -> Any:
        if self.generator.tokenizer is None:
            raise ConfigError("this model has no generator tokenizer: give one when loading it")
        return self.generator.tokenizer

    # ------------------------------------------------------------------ answers

    def decode(
        self,
        encoded: EncodedContexts,
        doc_scores_BK: Float[Tensor, "B K"],
        *,
        decoding: DecodingMode | None = None,
        options: DecodingOptions | None = None,
    ) -> Decoded:
        """Returns the answers' tokens, decoded over K passages at once; see :mod:`rag_lightning.decoding`."""
        decoding = decoding if decoding is not None else self.settings.decoding
        options = options if options is not None else self.decoding_options
        prior_BK = doc_log_prior(doc_scores_BK, self.settings.temperature)
        if decoding == "rag_token":
            return decode_rag_token(self.generator, encoded, prior_BK, options)
        if decoding in ("rag_sequence_fast", "rag_sequence_thorough"):
            thorough = decoding == "rag_sequence_thorough"
            return decode_rag_sequence(self.generator, encoded, prior_BK, options, thorough=thorough)
        if decoding == "fid":
            fused = encoded.fused(prior_BK > -torch.inf)
            return decode_rag_token(self.generator, fused, torch.zeros_like(prior_BK[:, :1]), options)
        known = ", ".join(get_args(DecodingMode))
        raise ConfigError(f"expected decoding {known}, got {decoding!r}")

    def answers(self, decoded: Decoded) -> list[str]:
        """Returns the texts of decoded answers."""
        tokenizer = self._generator_tokenizer()
        texts = tokenizer.batch_decode(decoded.sequences_BT, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def generate(
        self,
        questions: Sequence[str] | Sequence[Question],
        *,
        retriever: Retriever | None = None,
        decoding: DecodingMode | None = None,
        num_passages: int | None = None,
        options: DecodingOptions | None = None,
        batch_size: int = 16,
    ) -> list[Prediction]:
        """Answers questions, with the passages behind each answer.

        Args:
            questions: Texts, or records with ids.
            retriever: Where to search; by default the snapshot and corpus that the model was saved with.
            decoding: The model's by default.
            num_passages: K; the model's by default.
            options: Beams, lengths; the model's by default.
            batch_size: Questions at a time.

        Raises:
            ConfigError: No retriever is given and none was saved, or K is larger than the corpus.
        """
        records = [
            question if isinstance(question, Question) else Question(str(number), str(question), ())
            for number, question in enumerate(questions)
        ]
        if self.settings.num_passages > 0 and retriever is None:
            retriever = self.default_retriever()
        assembler = ContextAssembler(
            corpus=retriever.corpus if retriever is not None else None,
            tokenizer=self._generator_tokenizer(),
            prompt=self.prompt,
        )
        modes = {module: module.training for module in self.modules()}  # frozen parts may stand otherwise than the rest
        self.eval()
        try:
            predictions: list[Prediction] = []
            for start in range(0, len(records), batch_size):
                batch = records[start : start + batch_size]
                predictions += self._answer_batch(batch, retriever, assembler, decoding, num_passages, options)
            return predictions
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _answer_batch(
        self,
        records: Sequence[Question],
        retriever: Retriever | None,
        assembler: ContextAssembler,
        decoding: DecodingMode | None,
        num_passages: int | None,
        options: DecodingOptions | None,
    ) -> list[Prediction]:
        device = next(self.parameters()).device
        texts = [record.question for record in records]
        prompt = self.prompt_tokens(texts).to(device)
        if retriever is None:
            hits, scores_BK = None, torch.zeros(len(records), 1, device=device)
            contexts = assembler.without_passage(prompt)
        else:
            query = self.query_tokens(texts).to(device) if retriever.needs_vectors else None
            hits, scores_BK = self.retrieve(query, texts, retriever, num_passages=num_passages)
            contexts = assembler.contexts(hits.ids_BK.to(device), prompt)
        encoded = self.generator.encode(contexts)
        decoded = self.decode(encoded, scores_BK, decoding=decoding, options=options)
        return self.predictions(records, decoded, encoded, scores_BK, hits, retriever)

    def predictions(
        self,
        records: Sequence[Question],
        decoded: Decoded,
        encoded: EncodedContexts,
        scores_BK: Float[Tensor, "B K"],
        hits: Hits | None,
        retriever: Retriever | None,
    ) -> list[Prediction]:
        """Returns decoded answers as records, each passage with its prior and its posterior given the answer."""
        prior_BK = doc_log_prior(scores_BK, self.settings.temperature)
        output = self.generator.score(encoded, decoded.sequences_BT, scores_BK.shape[1])
        scored_B = output.target_mask_BT.any(dim=1)
        mask_BT = output.target_mask_BT | ~scored_B[:, None]  # an empty answer leaves the prior as it is
        posterior_BK = passage_log_posterior(output.token_log_probs_BKT, prior_BK, mask_BT)
        evidence = retriever.evidence(hits).passages if retriever is not None and hits is not None else None
        results = []
        for row, (record, answer) in enumerate(zip(records, self.answers(decoded), strict=True)):
            passages = []
            for place, passage in enumerate(evidence[row] if evidence is not None else ()):
                score, prior, posterior = (
                    float(values[row, place]) for values in (scores_BK, prior_BK.exp(), posterior_BK.exp())
                )
                passages.append(RetrievedPassage(passage.id, passage.title, passage.text, score, prior, posterior))
            likelihood = float(decoded.log_likelihood_B[row])
            results.append(Prediction(record.id, record.question, answer, likelihood, tuple(passages)))
        return results

    # ------------------------------------------------------------------ files

    def default_retriever(self) -> Retriever:
        """Returns the retriever that the model was saved with, opened once.

        Raises:
            ConfigError: None was saved, or a part that it needs is missing.
            MissingFileError: Its index or corpus has been moved.
            StaleIndexError: The index was made by another encoder or from another corpus.
        """
        if self._default_retriever is None:
            if self.retriever_source is None:
                raise ConfigError(
                    "this model was saved without an index: pass retriever=DenseRetriever(snapshot, corpus)"
                )
            self._default_retriever = open_retriever(self.retriever_source, encoder=self.encoder, fusion=self.fusion)
        return self._default_retriever

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the model: safetensors, JSON and tokenizers, nothing pickled.

        Args:
            directory: Where; replaced whole if it exists. :attr:`retriever_source` is kept relative to it, so a
                run's folder can be moved as a whole.
        """
        save_parts(self.parts(), Path(directory))

    def parts(self) -> RagParts:
        """Returns what the model is made of."""
        return RagParts(
            encoder=self.encoder,
            generator=self.generator,
            prompt=self.prompt,
            settings=self.settings,
            decoding_options=self.decoding_options,
            retriever_source=self.retriever_source,
            fusion=self.fusion,
        )

    @classmethod
    def from_parts(cls, parts: RagParts) -> "RagModel":
        """Assembles a model."""
        model = cls(
            encoder=parts.encoder,
            generator=parts.generator,
            prompt=parts.prompt,
            settings=parts.settings,
            decoding_options=parts.decoding_options,
            fusion=parts.fusion,
        )
        model.retriever_source = parts.retriever_source
        return model

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "RagModel":
        """Loads a model that this package saved, or a published RAG checkpoint such as ``facebook/rag-token-nq``.

        It comes in evaluation mode, as transformers' models do: call ``train()`` to train it.

        Args:
            source: A folder, a ``bundled:`` folder, or a hub id.

        Raises:
            CheckpointError: The folder is of neither layout, or of a newer format.
        """
        return cls.from_parts(load_parts(source)).eval()

    @classmethod
    def from_hf_rag(
        cls, hf_model: Any, *, question_tokenizer: Any = None, generator_tokenizer: Any = None
    ) -> "RagModel":
        """Wraps a transformers ``RagTokenForGeneration`` or ``RagSequenceForGeneration``; shares its weights.

        Args:
            hf_model: The model; its ``set_context_encoder_for_training`` encoder becomes the passage tower.
            question_tokenizer: For text input.
            generator_tokenizer: For text input and output.

        Raises:
            CheckpointError: The question encoder is not DPR's.
        """
        model = cls.from_parts(parts_of_hf_rag(hf_model, question_tokenizer, generator_tokenizer))
        return model.train(hf_model.training)
