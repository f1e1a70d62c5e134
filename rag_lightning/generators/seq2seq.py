"""Encoder-decoder generators: BART, T5, or any pair of encoders joined by cross-attention."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from rag_lightning.corpora.places import model_place
from rag_lightning.errors import ConfigError
from rag_lightning.generators.absorbed_attention import AbsorbedAttention
from rag_lightning.generators.base import DecoderState, EncodedContexts
from rag_lightning.generators.mimetic import start_mimetic
from rag_lightning.generators.pretrained import Forward, PretrainedGenerator, check_rows, forked
from rag_lightning.generators.shared_contexts import Reading, Sharing, shared_contexts
from rag_lightning.generators.shrink import keep_layers
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import GeneratorOutput, TokenBatch
from rag_lightning.utils.lengths import LengthGroup, embedded_once, lengths_of, real_lengths, restored, widened
from rag_lightning.utils.memory import aligned

_CROSS_VALUES = ("encoder_attn.v_proj", "EncDecAttention.v", "crossattention.self.value")
"""Where BART-like, T5-like and BERT-like decoders project the values of their cross-attention."""


@dataclass
class Progress:
    """What an encoder-decoder keeps of N partial outputs.

    Attributes:
        cache: Keys and values of the tokens so far, and of the contexts.
        contexts_N: Which context each output reads; equal numbers are the same context.
        can_share: Whether outputs can read one copy of a context; known after the first step.
        sharing: Who reads which of the contexts that are kept; None where each output has its own, in its place.
    """

    cache: EncoderDecoderCache
    contexts_N: Int[Tensor, "N"]
    can_share: bool = False
    sharing: Sharing | None = None

    @classmethod
    def start(cls, encoded: EncodedContexts) -> "Progress":
        """Returns that of outputs without a token, one for each context."""
        mask_NL = encoded.attention_mask_NL
        numbers_N = torch.arange(mask_NL.shape[0], device=mask_NL.device)
        return cls(EncoderDecoderCache(DynamicCache(), DynamicCache()), numbers_N)


class Seq2SeqGenerator(PretrainedGenerator):
    """Any transformers encoder-decoder with a language-model head.

    Args:
        model: BART, T5, ``EncoderDecoderModel`` or another ``AutoModelForSeq2SeqLM``.
        tokenizer: Its tokenizer; needed to read and write text, not to score ids.
    """

    auto_class = AutoModelForSeq2SeqLM
    kind = "seq2seq"
    continues_prompt = False
    can_fuse = True

    def __init__(self, *, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if isinstance(model, EncoderDecoderModel) and getattr(model.encoder, "pooler", None) is not None:
            model.encoder.pooler = None  # its output is not used; idle parameters would stall distributed training
        config = model.config
        decoder = getattr(config, "decoder", None) or config
        super().__init__(
            model=model,
            tokenizer=tokenizer,
            pad_token_id=_required_id(config, decoder, "pad_token_id"),
            start_token_id=_required_id(config, decoder, "decoder_start_token_id"),
            eos_token_id=_required_id(config, decoder, "eos_token_id"),
            vocab_size=decoder.vocab_size,
        )
        self._absorbed = AbsorbedAttention(model)

    @classmethod
    def from_source(
        cls,
        source: str,
        tokenizer: str | None = None,
        *,
        encoder_layers: Sequence[int] | None = None,
        decoder_layers: Sequence[int] | None = None,
    ) -> "Seq2SeqGenerator":
        """Loads a folder, a hub id, or a ``bundled:`` folder in the transformers layout.

        Args:
            source: Where the model is.
            tokenizer: Where its tokenizer is, if not in the same place.
            encoder_layers: Keep these layers only, see :mod:`rag_lightning.generators.shrink`.
            decoder_layers: The same of the decoder.
        """
        model, tokens = cls.read(source, tokenizer)
        if encoder_layers is not None or decoder_layers is not None:
            keep_layers(model, encoder=encoder_layers, decoder=decoder_layers)
        return cls(model=model, tokenizer=tokens)

    @classmethod
    def from_config(
        cls, *, model_type: str, settings: dict[str, Any], tokenizer: str, mimetic_init: bool = False
    ) -> "Seq2SeqGenerator":
        """Builds a randomly initialised model whose vocabulary and special tokens are the tokenizer's.

        Args:
            model_type: A transformers model type such as ``bart`` or ``t5``.
            settings: Fields of that type's configuration (layers, dimensions, dropout).
            tokenizer: Folder, hub id or ``bundled:`` folder of the tokenizer.
            mimetic_init: Start ready to copy, see :mod:`rag_lightning.generators.mimetic`; for BART's shape.
        """
        tokens = load_tokenizer(model_place(tokenizer))
        model = cls.model_from_config(model_type, settings, tokens)
        if mimetic_init:
            start_mimetic(model)
        return cls(model=model, tokenizer=tokens)

    @classmethod
    def from_encoders(cls, *, encoder: str, decoder: str, tokenizer: str | None = None) -> "Seq2SeqGenerator":
        """Joins two pretrained encoders (MiniLM → MiniLM); the decoder's cross-attention starts at random.

        Rothe et al. 2020, "Leveraging pre-trained checkpoints for sequence generation tasks".
        """
        tokens = load_tokenizer(model_place(tokenizer if tokenizer is not None else decoder))
        model = EncoderDecoderModel.from_encoder_decoder_pretrained(
            model_place(encoder), model_place(decoder), encoder_add_pooling_layer=False
        )
        model.config.pad_token_id = tokens.pad_token_id
        model.config.decoder_start_token_id = tokens.cls_token_id
        model.config.eos_token_id = tokens.sep_token_id
        return cls(model=aligned(model), tokenizer=tokens)

    def encode(self, contexts: TokenBatch) -> EncodedContexts:
        """Runs the encoder over N contexts, those of like length together; trailing padding of all is dropped.

        See :class:`rag_lightning.generators.base.Generator`.
        """
        lengths = lengths_of(contexts)
        groups = self.length_groups(lengths, contexts.input_ids.shape[1])
        longest = max(group.length for group in groups)
        self.check_length(longest)
        parts, encoder = [], self.model.get_encoder()
        embedded = embedded_once(encoder, contexts.input_ids[:, :longest]) if len(groups) > 1 else None
        for group in groups:
            part = group.of(contexts)
            with nullcontext() if embedded is None else embedded(group):
                output = encoder(input_ids=part.input_ids, attention_mask=part.attention_mask, return_dict=True)
            parts.append(widened(output.last_hidden_state, longest))
        return EncodedContexts(restored(parts, groups), contexts.attention_mask[:, :longest], lengths=lengths)

    def score(
        self,
        encoded: EncodedContexts,
        labels_BT1: Int[Tensor, "B T1"],
        num_passages: int,
        *,
        vocab_mean: bool = False,
        keep_logits: bool = False,
    ) -> GeneratorOutput:
        """Scores each target under each of its K contexts; see :class:`rag_lightning.generators.base.Generator`."""
        check_rows(encoded.hidden_NLH.shape[0], labels_BT1.shape[0], num_passages)
        inputs_NT = labels_BT1[:, :-1].repeat_interleave(num_passages, dim=0)
        if keep_logits:
            return self.scored(self._decode(encoded, inputs_NT), labels_BT1, vocab_mean=vocab_mean, keep_logits=True)
        lengths = encoded.lengths if encoded.lengths is not None else real_lengths(encoded.attention_mask_NL)
        target_lengths = self._targets_to_absorb(encoded, labels_BT1, lengths)
        absorbs = target_lengths is not None
        if target_lengths is not None:
            groups = self.length_groups(target_lengths, inputs_NT.shape[1])
        else:
            groups = self.length_groups(lengths, encoded.hidden_NLH.shape[1], decoder=True)
        embedded = embedded_once(self.model.get_decoder(), labels_BT1[:, :-1], repeats=num_passages)

        def run(group: LengthGroup) -> Float[Tensor, "rows positions V"]:
            if absorbs:
                rows = range(len(lengths)) if group.rows_M is None else group.rows_M.tolist()
                inputs, contexts = group, LengthGroup(group.rows_M, max(lengths[row] for row in rows))
            else:
                inputs, contexts = LengthGroup(group.rows_M, inputs_NT.shape[1]), group
            read = encoded.group(contexts)
            inputs_MT = inputs_NT[:, : inputs.length]
            inputs_MT = inputs_MT if inputs.rows_M is None else inputs_MT[inputs.rows_M]
            with embedded(inputs), self._absorbed.reading(read.hidden_NLH) if absorbs else nullcontext() as cache:
                output = self._decoder_output(read, inputs_MT, past_key_values=cache, use_cache=absorbs)
            logits: Tensor = output.logits
            return logits

        return self.scored_in_groups(run, groups, labels_BT1, num_passages, vocab_mean=vocab_mean)

    def _targets_to_absorb(
        self, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"], lengths: Sequence[int]
    ) -> list[int] | None:
        """Returns the tokens of each context's target if the decoder should read the encoder's states themselves.

        None if it should project them, see :mod:`rag_lightning.generators.absorbed_attention`.
        """
        if not self._absorbed.may_pay:
            return None
        num_targets_B = (labels_BT1[:, 1:] != self.pad_token_id).sum(dim=1).clamp(min=1)
        target_lengths: list[int] = num_targets_B.repeat_interleave(len(lengths) // labels_BT1.shape[0]).tolist()
        first = encoded.group(LengthGroup(torch.zeros(1, dtype=torch.long), lengths[0]))
        absorbs = self._absorbed.pays(lengths, target_lengths) and self._absorbed.works(
            first.hidden_NLH, lambda: self._decoder_output(first, labels_BT1[:1, :-1])
        )
        return target_lengths if absorbs else None

    @torch.no_grad()
    def attention(self, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"]) -> Float[Tensor, "B L"]:
        """Returns how much the decoder takes from each token of its context, a constant.

        It is ``α_n ‖v_n‖``, attention times the length of the value attended to (Kobayashi et al. 2020), averaged over
        heads, layers and the scored positions of the target (Izacard et al. 2022, §2.2). Costs one decoder pass with
        transformers' plain attention, which is the one that shows its weights.

        Args:
            encoded: One context for each target.
            labels_BT1: The targets, as in :meth:`score`.

        Raises:
            ConfigError: The model does not show its cross-attention, or its values are not known here.
        """
        values: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: values.append(output))
            for name, module in self.model.named_modules()
            if name.endswith(_CROSS_VALUES)
        ]
        usual = self.model.config._attn_implementation
        try:
            self.model.set_attn_implementation("eager")
            output = self._decoder_output(encoded, labels_BT1[:, :-1], output_attentions=True)
        finally:
            self.model.set_attn_implementation(usual)
            for hook in hooks:
                hook.remove()
        weights = output.cross_attentions or ()
        if not weights or len(weights) != len(values):
            raise ConfigError(
                f"attention distillation: expected {type(self.model).__name__} to show the weights and values of its "
                f"cross-attention, came {len(weights)} layers of weights and {len(values)} of values. Use a BART, T5 "
                "or BERT decoder, or another retriever loss (pdist, loop, emdr2)."
            )
        scored_BT = (labels_BT1[:, 1:] != self.pad_token_id).float()
        total_BL = torch.zeros_like(encoded.attention_mask_NL, dtype=torch.float32)
        for weights_BHTL, values_BLD in zip(weights, values, strict=True):
            batch_size, num_heads, _, num_tokens = weights_BHTL.shape
            norms_BLH = values_BLD.float().view(batch_size, num_tokens, num_heads, -1).norm(dim=-1)
            mean_BHL = torch.einsum(
                "bhtl,bt->bhl", weights_BHTL.float(), scored_BT / scored_BT.sum(dim=1, keepdim=True)
            )
            total_BL += torch.einsum("bhl,blh->bl", mean_BHL, norms_BLH) / num_heads
        return total_BL / len(values)

    def start(self, encoded: EncodedContexts) -> DecoderState:
        """Returns the state before the first token; see :class:`rag_lightning.generators.base.Generator`."""
        return DecoderState(encoded, Progress.start(encoded))

    def step(self, tokens_N: Int[Tensor, "N"], state: DecoderState) -> tuple[Float[Tensor, "N V"], DecoderState]:
        """Feeds one token to each row; see :class:`rag_lightning.generators.base.Generator`."""
        return self.next_log_probs(*self._forwards(tokens_N, state)), state

    def score_step(
        self, tokens_N: Int[Tensor, "N"], state: DecoderState, rows_P: Int[Tensor, "P"], next_P: Int[Tensor, "P"]
    ) -> tuple[Float[Tensor, "P"], DecoderState]:
        """Like :meth:`step`, for P known tokens; see :class:`rag_lightning.generators.base.Generator`."""
        return self.known_log_probs(*self._forwards(tokens_N, state), rows_P, next_P), state

    def reorder(self, state: DecoderState, rows_M: Int[Tensor, "M"]) -> DecoderState:
        """Returns the state of the given rows; see :class:`rag_lightning.generators.base.Generator`.

        The contexts stay where they are once they stand by length, unless most of them have no reader left.
        """
        so_far: Progress = state.cache
        so_far.cache.self_attention_cache.reorder_cache(rows_M)
        contexts_M = so_far.contexts_N[rows_M]
        if torch.equal(contexts_M, so_far.contexts_N):
            return state
        if not so_far.can_share:
            so_far.cache.cross_attention_cache.reorder_cache(rows_M)
            return DecoderState(state.encoded.rows(rows_M), Progress(so_far.cache, contexts_M))
        encoded, num_contexts = state.encoded, state.encoded.hidden_NLH.shape[0]
        known = encoded.lengths if encoded.lengths is not None else real_lengths(encoded.attention_mask_NL)
        read_U, inverse_M = torch.unique(contexts_M, return_inverse=True)
        if 2 * len(read_U) > num_contexts:
            read_U, inverse_M = torch.arange(num_contexts, device=contexts_M.device), contexts_M
        if so_far.sharing is None or len(read_U) < num_contexts:  # contexts move, those of like length side by side
            lengths = [known[row] for row in read_U.tolist()]
            order_C = torch.tensor(sorted(range(len(lengths)), key=lengths.__getitem__), device=contexts_M.device)
            so_far.cache.cross_attention_cache.reorder_cache(read_U[order_C])
            known, contexts_M = tuple(sorted(lengths)), order_C.argsort()[inverse_M]
            encoded = replace(encoded.rows(read_U[order_C]), lengths=known)
        sharing = Sharing.of(contexts_M, known)
        return DecoderState(encoded, Progress(so_far.cache, contexts_M, can_share=True, sharing=sharing))

    def fork(self, state: DecoderState) -> DecoderState:
        """Returns a copy; see :class:`rag_lightning.generators.base.Generator`."""
        so_far: Progress = state.cache
        cache = EncoderDecoderCache(
            forked(so_far.cache.self_attention_cache), forked(so_far.cache.cross_attention_cache)
        )
        return replace(state, cache=replace(so_far, cache=cache))

    def _forwards(self, tokens_N: Int[Tensor, "N"], state: DecoderState) -> tuple[Forward, Forward]:
        """Returns what :meth:`next_log_probs` takes."""
        return lambda: self._next_logits(tokens_N, self.fork(state)), lambda: self._next_logits(tokens_N, state)

    def _next_logits(self, tokens_N: Int[Tensor, "N"], state: DecoderState) -> Float[Tensor, "rows positions V"]:
        """Feeds one token to each row; the state's cache grows by it."""
        so_far: Progress = state.cache
        reading = Reading(so_far.cache, so_far.sharing)
        with shared_contexts(self.model, reading):
            logits = self._decode(state.encoded, tokens_N[:, None], cache=so_far.cache)
        so_far.can_share = 0 < reading.num_shared == len(so_far.cache.cross_attention_cache.layers)
        return logits

    def _decode(
        self, encoded: EncodedContexts, input_ids_NT: Int[Tensor, "N T"], cache: EncoderDecoderCache | None = None
    ) -> Float[Tensor, "rows positions V"]:
        logits: Tensor = self._decoder_output(
            encoded, input_ids_NT, past_key_values=cache, use_cache=cache is not None
        ).logits
        return logits

    def _decoder_output(self, encoded: EncodedContexts, input_ids_NT: Int[Tensor, "N T"], **settings: Any) -> Any:
        return self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_NLH),
            attention_mask=encoded.attention_mask_NL,
            decoder_input_ids=input_ids_NT,
            return_dict=True,
            **{"use_cache": False, **settings},
        )


def _required_id(config: Any, decoder: Any, name: str) -> int:
    value = getattr(config, name, None)
    if value is None:
        value = getattr(decoder, name, None)
    if value is None and name == "decoder_start_token_id":
        value = getattr(decoder, "bos_token_id", None)
    if value is None:
        raise ConfigError(f"the generator's config has no {name}: set it, targets cannot be built without it")
    return int(value)
