"""RagModel: a query encoder, a generator, and the marginal likelihood that trains them together.

Read this page first. For a question x, the encoder gives a vector q; the index gives K passages z with their
similarities; ``p(z|x)`` is the softmax of the similarities (or of BM25, or of both fused: whatever document scores the
retriever gives, see :mod:`rag_lightning.retrieval`); the generator reads each passage joined to the question and gives
``p(y_t | x, z, y_<t)``; :mod:`rag_lightning.losses.marginal` sums the passages out. The gradient reaches the query
encoder through ``p(z|x)``: a passage that explains the answer better than its rivals is drawn nearer.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rag_lightning.corpora.questions import forbidden_rows
from rag_lightning.decoding.constraints import NO_RULES, OutputRules
from rag_lightning.decoding.decode import decode
from rag_lightning.decoding.options import Decoded, DecodingMode, DecodingOptions
from rag_lightning.decoding.text_rules import text_rules
from rag_lightning.decoding.texts import answer_texts
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import NO_FUSION, EncodedContexts
from rag_lightning.generators.pretrained import PretrainedGenerator
from rag_lightning.index.base import similarity
from rag_lightning.losses.marginal import (
    TokenPosteriorKind,
    doc_log_prior,
)
from rag_lightning.rag_answers import told
from rag_lightning.rag_parts import (
    MarginalKind,
    RagParts,
    RagSettings,
    RetrieverSource,
    load_parts,
    open_retriever,
    parts_of_hf_rag,
    save_parts,
)
from rag_lightning.rag_reading import Marginal, read_apart, read_together
from rag_lightning.retrieval.base import Retriever, even_where_empty, search
from rag_lightning.retrieval.contexts import ContextAssembler, pad_sequences
from rag_lightning.retrieval.fusion import ScoreFusion
from rag_lightning.retrieval.null import NullPassage, check_similarities
from rag_lightning.text.prompts import Prompt
from rag_lightning.text.tokenizers import continuation_ids, truncating
from rag_lightning.types import (
    Hits,
    Prediction,
    Question,
    RagBatch,
    TokenBatch,
)

logger = logging.getLogger(__name__)


class RagModel(nn.Module):
    """Encoder, generator and marginal.

    Args:
        encoder: The two towers; None for a closed-book model, or for one that retrieves by words alone.
        generator: The reader.
        prompt: How passage and question are written for the generator.
        settings: K, marginal, temperature, metric.
        decoding_options: Defaults for :meth:`generate`.
        fusion: How a hybrid retriever joins its scores; kept here, so that a learned gate is trained and saved too.
        null_passage: The choice of no passage, for ``settings.null_passage``; by default one that starts at the
            encoder's vector of an empty passage.
    """

    def __init__(
        self,
        *,
        encoder: BiEncoder | None,
        generator: PretrainedGenerator,
        prompt: Prompt | None = None,
        settings: RagSettings | None = None,
        decoding_options: DecodingOptions | None = None,
        fusion: ScoreFusion | None = None,
        null_passage: NullPassage | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.fusion = fusion
        self.generator = generator
        self.prompt = prompt if prompt is not None else Prompt()
        self.settings = settings if settings is not None else RagSettings()
        if "fid" in (self.settings.objective, self.settings.decoding) and not generator.can_fuse:
            raise ConfigError(NO_FUSION)
        if self.settings.null_passage and null_passage is None:
            if encoder is None:
                raise ConfigError("model.null_passage: expected an encoder, whose vectors weigh it; came none")
            null_passage = NullPassage.of(encoder)
        self.null_passage = null_passage if self.settings.null_passage else None
        if self.prompt.answer_prefix and not generator.continues_prompt:
            raise ConfigError(
                "model.prompt.answer_prefix: expected an empty one for an encoder-decoder, whose answers begin anew, "
                f"got {self.prompt.answer_prefix!r}"
            )
        self.decoding_options = decoding_options if decoding_options is not None else DecodingOptions()
        self.retriever_source: RetrieverSource | None = None
        self._default_retriever: Retriever | None = None
        self._told_of_cut_questions = False
        self._rules: tuple[DecodingOptions, OutputRules] | None = None

    # ------------------------------------------------------------------ scoring

    def retrieve(
        self,
        query: TokenBatch | None,
        questions: Sequence[str],
        retriever: Retriever,
        *,
        num_passages: int | None = None,
        reencode: Callable[[Int[Tensor, "B K"]], TokenBatch] | None = None,
        forbidden_ids: Int[Tensor, "B *F"] | None = None,
        query_vectors_BD: Float[Tensor, "B D"] | None = None,
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
            forbidden_ids: The passage, or the F passages, that must not be found for each question, ``-1`` for none.
            query_vectors_BD: The questions' vectors, where the caller has encoded them already.

        Returns:
            Hits and scores of K places; of K + 1 with a null passage, which stands last.

        Raises:
            ConfigError: The retriever searches by vectors, and there is no encoder or ``query`` to make them from; or
                its scores cannot weigh a null passage.
        """
        num_passages = num_passages if num_passages is not None else self.settings.num_passages
        device = next(self.parameters()).device
        if not retriever.needs_vectors:
            hits = search(retriever, questions, None, num_passages, forbidden_ids).to(device)
            self._check_null(retriever, hits)
            return hits, retriever.scores(hits, None, None)
        if self.encoder is None or query is None:
            what = "this model has no encoder" if self.encoder is None else "the questions came without encoder tokens"
            raise ConfigError(
                f"{what}, and the retriever searches by query vectors: give an encoder, retrieve by words "
                "(retriever kind sparse), or set num_passages=0 for a closed-book model"
            )
        if not retriever.gradient_to:
            with torch.no_grad():
                known_BD = query_vectors_BD if query_vectors_BD is not None else self.encoder.query(query)
                hits = search(retriever, questions, known_BD.detach(), num_passages, forbidden_ids).to(device)
            self._check_null(retriever, hits)
            return hits, retriever.scores(hits, None, None)
        queries_BD = query_vectors_BD if query_vectors_BD is not None else self.encoder.query(query)
        hits = search(retriever, questions, queries_BD.detach(), num_passages, forbidden_ids)
        self._check_null(retriever, hits)
        if reencode is None:
            passages_BKD = retriever.vectors(hits.ids_BK).to(queries_BD.device)
        else:
            passages_ND = self.encoder.passage_tower()(reencode(hits.ids_BK))
            passages_BKD = passages_ND.view(*hits.ids_BK.shape, passages_ND.shape[-1])
        similarities_BK = similarity(queries_BD, passages_BKD, self.settings.metric, hits.found_BK)
        scores_BK = retriever.scores(hits, similarities_BK, queries_BD)
        if self.null_passage is not None:
            hits, scores_BK = self.null_passage(hits, scores_BK, queries_BD, self.settings.metric)
        return hits, scores_BK if forbidden_ids is None else even_where_empty(scores_BK)

    def _check_null(self, retriever: Retriever, hits: Hits) -> None:
        if self.null_passage is not None:
            check_similarities(retriever, hits, "model.null_passage")

    def marginal(
        self,
        batch: RagBatch,
        *,
        encoded: EncodedContexts | None = None,
        objective: MarginalKind | None = None,
        label_smoothing: float = 0.0,
        hf_compat: bool | None = None,
        read_alone: bool = True,
        alone: EncodedContexts | None = None,
        keep_logits: bool = False,
    ) -> Marginal:
        """Returns the marginal likelihood of the batch's targets, or what a reader of all passages says of them.

        Args:
            batch: Contexts, similarities, labels.
            encoded: The contexts, if they are encoded already.
            objective: ``rag_token``, ``rag_sequence``, ``fid`` or ``stuffed`` (``batch.contexts`` are then one for each
                question, with all passages in it); the model's by default.
            label_smoothing: ε; see :func:`rag_lightning.losses.marginal.smoothing_penalty`.
            hf_compat: Prior placement and smoothing as in transformers; the model's setting by default.
            read_alone: With ``fid``, score the target from each passage alone too, without gradient.
            alone: With ``stuffed``, contexts of one passage each, ``B * K``, to do the same.
            keep_logits: Also return the logits, for losses that compare whole distributions.
        """
        kind = objective if objective is not None else self.settings.objective
        if kind not in get_args(MarginalKind):
            raise ConfigError(f"expected objective rag_token, rag_sequence, fid or stuffed, got {kind!r}")
        encoded = encoded if encoded is not None else self.generator.encode(batch.contexts)
        prior_BK = doc_log_prior(batch.doc_scores_BK, self.settings.temperature)
        if kind in ("fid", "stuffed"):
            together = encoded
            if kind == "fid":
                together, alone = encoded.fused(prior_BK > -torch.inf), encoded if read_alone else None
            return read_together(
                self.generator, batch.labels, prior_BK, together, alone, label_smoothing, keep_logits=keep_logits
            )
        return read_apart(
            self.generator,
            batch.labels,
            prior_BK,
            encoded,
            kind=kind,
            label_smoothing=label_smoothing,
            hf_compat=hf_compat if hf_compat is not None else self.settings.hf_compat,
            keep_logits=keep_logits,
        )

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
        if self.prompt.keep_question == "end":
            questions = self._query_ends(questions)
        texts = [self.encoder.query_template.format(question=question) for question in questions]
        with truncating(self.encoder.tokenizer, keep=self.prompt.keep_question):
            encoded = self.encoder.tokenizer(texts, truncation=True, max_length=self.encoder.max_query_tokens)
        return pad_sequences(encoded["input_ids"], self.encoder.tokenizer.pad_token_id)

    def _query_ends(self, questions: Sequence[str]) -> list[str]:
        """Returns questions cut from the left so that the query template around them stays whole."""
        assert self.encoder is not None
        tokenizer: Any = self.encoder.tokenizer
        room = self.encoder.max_query_tokens - len(
            tokenizer(self.encoder.query_template.format(question=""))["input_ids"]
        )
        ends = []
        for question in questions:
            spans = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            ends.append(question if len(spans) <= room else question[spans[len(spans) - max(room, 1)][0] :])
        return ends

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
        kept = [ids if len(ids) <= limit else self._cut_question(ids, limit) for ids in encoded]
        return pad_sequences(kept, self.generator.pad_token_id)

    def _cut_question(self, ids: list[int], limit: int) -> list[int]:
        """Returns the question's part within the limit, cut inside the question and not in the template around it."""
        from_end = self.prompt.keep_question == "end"
        around = self.prompt.before_question.rstrip() if from_end else self.prompt.after_question
        fixed = list(self._generator_tokenizer()(around, add_special_tokens=False)["input_ids"])[:limit]
        room = limit - len(fixed)
        return [*fixed, *ids[len(ids) - room :]] if from_end else [*ids[:room], *fixed]

    def target_tokens(self, answers: Sequence[str]) -> Int[Tensor, "B T1"]:
        """Returns labels: the decoder's start token, the answer as the tokenizer writes it, the end token, padding.

        A tokenizer that begins texts with a token of its own keeps it after the start token (BART: ``</s> <s> …``),
        so that training sees the prefix that decoding starts from.
        """
        generator = self.generator
        tokenizer = self._generator_tokenizer()
        rows = []
        if self.prompt.answer_prefix:
            texts = [self.prompt.answer_prefix + answer for answer in answers]
            before = self.prompt.after_question.split()[-1:] or [":"]
            written = continuation_ids(tokenizer, texts, before[0])
        else:
            written = tokenizer(list(answers))["input_ids"]
        for ids in written:
            body = [token for token in ids if token != generator.pad_token_id]
            body = body[:-1] if body and body[-1] == generator.eos_token_id else body
            body = body[1:] if body and body[0] == generator.start_token_id else body
            body = body[: self.settings.max_target_tokens - 2]
            rows.append([generator.start_token_id, *body, generator.eos_token_id])
        return pad_sequences(rows, generator.pad_token_id).input_ids

    def _generator_tokenizer(self) -> Any:
        return self.generator.text_tokenizer

    # ------------------------------------------------------------------ answers

    def decode(
        self,
        encoded: EncodedContexts,
        doc_scores_BK: Float[Tensor, "B K"],
        *,
        decoding: DecodingMode | None = None,
        options: DecodingOptions | None = None,
        rng: torch.Generator | None = None,
    ) -> Decoded:
        """Returns the answers' tokens, decoded over K passages at once; see :mod:`rag_lightning.decoding`."""
        mode = decoding if decoding is not None else self.settings.decoding
        options = options if options is not None else self.decoding_options
        prior_BK = doc_log_prior(doc_scores_BK, self.settings.temperature)
        rules = self.output_rules(options).to(prior_BK.device)
        return decode(self.generator, encoded, prior_BK, options, mode=mode, rules=rules, rng=rng)

    def output_rules(self, options: DecodingOptions) -> OutputRules:
        """Returns the rules of ``options.stop`` and ``options.allowed``; those of the last options are kept."""
        if not options.stop and options.allowed is None:
            return NO_RULES
        if self._rules is None or self._rules[0] != options:
            rules = text_rules(
                options,
                generator=self.generator,
                tokenizer=self._generator_tokenizer(),
                target_tokens=self.target_tokens,
                max_target_tokens=self.settings.max_target_tokens,
            )
            self._rules = (options, rules)
        return self._rules[1]

    def answers(self, decoded: Decoded) -> list[str]:
        """Returns the texts of decoded answers, cut before their stop strings."""
        return answer_texts(self._generator_tokenizer(), decoded.sequences_BT, decoded.stop)

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
        token_posteriors: bool = False,
        rng: torch.Generator | None = None,
    ) -> list[Prediction]:
        """Answers questions, with the passages behind each answer.

        Args:
            questions: Texts, or records with ids.
            retriever: Where to search; by default the snapshot and corpus that the model was saved with.
            decoding: The model's by default.
            num_passages: K; the model's by default.
            options: Beams, lengths, sampling; the model's by default.
            batch_size: Questions at a time.
            token_posteriors: Also say which passage each token comes from: of RAG-Token's decoding token by token, of
                any other for the answer so far (with ``fid``, as if each passage had been read alone).
            rng: For sampling; by default one seeded by ``options.seed``.

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
            affixes=self.generator.affixes(),
        )
        seed = (options if options is not None else self.decoding_options).seed
        rng = rng if rng is not None else torch.Generator(next(self.parameters()).device).manual_seed(seed)
        modes = {module: module.training for module in self.modules()}  # frozen parts may stand otherwise than the rest
        self.eval()
        try:
            predictions: list[Prediction] = []
            for start in range(0, len(records), batch_size):
                batch = records[start : start + batch_size]
                predictions += self._answer_batch(
                    batch, retriever, assembler, decoding, num_passages, options, token_posteriors, rng
                )
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
        token_posteriors: bool,
        rng: torch.Generator,
    ) -> list[Prediction]:
        device = next(self.parameters()).device
        texts = [record.question for record in records]
        prompt = self.prompt_tokens(texts).to(device)
        if retriever is None:
            hits, scores_BK = None, torch.zeros(len(records), 1, device=device)
            contexts = assembler.without_passage(prompt)
        else:
            query = self.query_tokens(texts).to(device) if retriever.needs_vectors else None
            forbidden_BF = torch.tensor(forbidden_rows(records, retriever.corpus), device=device)
            forbidden_ids = forbidden_BF if bool((forbidden_BF >= 0).any()) else None
            hits, scores_BK = self.retrieve(
                query, texts, retriever, num_passages=num_passages, forbidden_ids=forbidden_ids
            )
            stuffed = (decoding if decoding is not None else self.settings.decoding) == "stuffed"
            contexts = assembler.for_reading(hits.ids_BK.to(device), prompt, stuffed=stuffed)
        encoded = self.generator.encode(contexts)
        decoded = self.decode(encoded, scores_BK, decoding=decoding, options=options, rng=rng)
        by_token = (decoding if decoding is not None else self.settings.decoding) == "rag_token"
        kind: TokenPosteriorKind = "rag_token" if by_token else "rag_sequence"
        return self.predictions(
            records, decoded, encoded, scores_BK, hits, retriever, posterior_kind=kind if token_posteriors else None
        )

    def predictions(
        self,
        records: Sequence[Question],
        decoded: Decoded,
        encoded: EncodedContexts,
        scores_BK: Float[Tensor, "B K"],
        hits: Hits | None,
        retriever: Retriever | None,
        *,
        posterior_kind: TokenPosteriorKind | None = None,
    ) -> list[Prediction]:
        """Returns decoded answers as records, each passage with its prior and its posterior given the answer.

        With ``posterior_kind``, also token by token, where there are passages.
        """
        evidence = retriever.evidence(hits) if retriever is not None and hits is not None else None
        prior_BK = doc_log_prior(scores_BK, self.settings.temperature)
        return told(self.generator, records, decoded, encoded, scores_BK, prior_BK, evidence, posterior_kind)

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
            null_passage=self.null_passage,
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
            null_passage=parts.null_passage,
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
