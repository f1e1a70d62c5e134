"""Decoder-only generators: Llama, Qwen, GPT-2 and any other model that continues a text.

The context is a prompt and the answer its continuation; only the answer's tokens are scored. Under RAG-Token and
RAG-Sequence each passage makes a prompt of its own, so that the K continuations are summed out as those of an
encoder-decoder are; REPLUG (Shi et al. 2024) is that mixture with a reader that learns nothing; prompt stuffing (Ram et
al. 2023, "In-context retrieval-augmented language models") writes all passages into one prompt.

Prompts are padded on the left, so that all answers of a batch begin in the same column and the output layer runs on the
answer's columns alone. A chat template is no more than ids before and after the context: see :meth:`affixes`.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rag_lightning.corpora.places import model_place
from rag_lightning.errors import ConfigError
from rag_lightning.generators.base import DecoderState, EncodedContexts
from rag_lightning.generators.pretrained import Forward, PretrainedGenerator, check_rows, forked, upcast
from rag_lightning.text.tokenizers import chat_affixes, chat_end_id, load_tokenizer, special_affixes
from rag_lightning.types import GeneratorOutput, TokenBatch
from rag_lightning.utils.lengths import LengthGroup, real_lengths


@dataclass
class Continuation:
    """What a decoder-only model keeps of N partial outputs.

    Attributes:
        cache: Keys and values of prompt and output so far.
        attention_mask_NL: 1 on what was read, 0 on the padding to the left of the prompt.
        first_NV: Log-probabilities of the first token, until it is asked for.
    """

    cache: DynamicCache
    attention_mask_NL: Int[Tensor, "N L"]
    first_NV: Float[Tensor, "N V"] | None


class CausalGenerator(PretrainedGenerator):
    """Any transformers decoder-only language model.

    Args:
        model: An ``AutoModelForCausalLM``; it has to take input embeddings, as all but a few do.
        tokenizer: Its tokenizer; needed to read and write text, not to score ids.
        pad_token: The padding token, for a tokenizer without one: a token of the vocabulary that no text uses, or a new
            one, for which a row is added to the embeddings.
        chat: Write contexts as a user's turn of the tokenizer's chat template.
        system: The system message before it.

    Attributes:
        start_token_id: Stands first in every target and is not read: the prompt's last token predicts the first token
            of the answer.

    Raises:
        ConfigError: No padding token, or one that is the end token too; ``chat`` without a chat template.
    """

    auto_class = AutoModelForCausalLM
    kind = "causal"
    continues_prompt = True
    can_fuse = False

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        pad_token: str | None = None,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        if system is not None and not chat:
            raise ConfigError("generator.system: expected generator.chat=true with it, only a chat has such a message")
        if tokenizer is not None and pad_token is not None:
            _give_padding(tokenizer, model, pad_token)
        source: Any = tokenizer if tokenizer is not None else model.config
        super().__init__(
            model=model,
            tokenizer=tokenizer,
            pad_token_id=_padding(source),
            start_token_id=_first_known(source, "bos_token_id", "cls_token_id", "eos_token_id"),
            eos_token_id=_end_of_answer(tokenizer, chat, source),
            vocab_size=model.get_output_embeddings().weight.shape[0],
        )
        model.config.pad_token_id = self.pad_token_id  # some families look for it in their attention
        self.chat = chat
        self.system = system
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def from_source(
        cls,
        source: str,
        tokenizer: str | None = None,
        pad_token: str | None = None,
        chat: bool = False,
        system: str | None = None,
    ) -> "CausalGenerator":
        """Loads a folder, a hub id, or a ``bundled:`` folder in the transformers layout.

        Args:
            source: Where the model is.
            tokenizer: Where its tokenizer is, if not in the same place.
            pad_token: See the class.
            chat: See the class.
            system: See the class.
        """
        model, tokens = cls.read(source, tokenizer)
        return cls(model=model, tokenizer=tokens, pad_token=pad_token, chat=chat, system=system)

    @classmethod
    def from_config(
        cls, *, model_type: str, settings: dict[str, Any], tokenizer: str, pad_token: str | None = None
    ) -> "CausalGenerator":
        """Builds a randomly initialised model whose vocabulary and special tokens are the tokenizer's.

        Args:
            model_type: A transformers model type such as ``llama`` or ``gpt2``.
            settings: Fields of that type's configuration (layers, dimensions, dropout).
            tokenizer: Folder, hub id or ``bundled:`` folder of the tokenizer.
            pad_token: See the class.
        """
        tokens = load_tokenizer(model_place(tokenizer))
        return cls(model=cls.model_from_config(model_type, settings, tokens), tokenizer=tokens, pad_token=pad_token)

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments besides model and tokenizer, as they are saved with a model."""
        return {"chat": self.chat, "system": self.system}

    def affixes(self) -> tuple[list[int], list[int]]:
        """Returns the ids before and after every context: those of the chat template, or the token that begins texts.

        An end token that the tokenizer would put behind a text is left out: the answer follows.
        """
        if self.chat:
            return chat_affixes(self.text_tokenizer, self.system)
        before, _ = special_affixes(self.text_tokenizer)
        return before, []

    def encode(self, contexts: TokenBatch) -> EncodedContexts:
        """Returns the embedded contexts, padded on the left; see :class:`rag_lightning.generators.base.Generator`."""
        order_NL = contexts.attention_mask.argsort(dim=1, stable=True)
        ids_NL, mask_NL = contexts.input_ids.gather(1, order_NL), contexts.attention_mask.gather(1, order_NL)
        lengths = contexts.lengths or tuple(mask_NL.sum(dim=1).clamp(min=1).tolist())
        return EncodedContexts(self._embed(ids_NL), mask_NL, can_fuse=False, lengths=lengths)

    def score(
        self,
        encoded: EncodedContexts,
        labels_BT1: Int[Tensor, "B T1"],
        num_passages: int,
        *,
        vocab_mean: bool = False,
        keep_logits: bool = False,
    ) -> GeneratorOutput:
        """Scores each target after each of its K contexts; see :class:`rag_lightning.generators.base.Generator`."""
        check_rows(encoded.hidden_NLH.shape[0], labels_BT1.shape[0], num_passages)
        prompts_NL, num_targets = encoded.attention_mask_NL, labels_BT1.shape[1] - 1
        answers_NTH = self._embed(labels_BT1[:, 1:-1].repeat_interleave(num_passages, dim=0))

        def run(group: LengthGroup) -> Float[Tensor, "rows positions V"]:
            inputs_NXH = torch.cat([encoded.hidden_NLH[:, -group.length :], answers_NTH], dim=1)
            # what stands behind the end of an answer is seen by no scored token, so it needs no mask
            mask_NX = torch.cat([prompts_NL[:, -group.length :], prompts_NL.new_ones(answers_NTH.shape[:2])], dim=1)
            if group.rows_M is not None:
                rows_M = group.rows_M.to(mask_NX.device)
                inputs_NXH, mask_NX = inputs_NXH.index_select(0, rows_M), mask_NX.index_select(0, rows_M)
            logits: Tensor = self._forward(inputs_NXH, mask_NX, logits_to_keep=num_targets, use_cache=False).logits
            return logits

        if keep_logits:
            logits_NTV = run(LengthGroup(None, prompts_NL.shape[1]))[:, -num_targets:]
            return self.scored(logits_NTV, labels_BT1, vocab_mean=vocab_mean, keep_logits=True)
        lengths = encoded.lengths if encoded.lengths is not None else real_lengths(prompts_NL.flip(1))
        groups = self.length_groups(lengths, prompts_NL.shape[1])
        return self.scored_in_groups(run, groups, labels_BT1, num_passages, vocab_mean=vocab_mean)

    def attention(self, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"]) -> Float[Tensor, "B L"]:
        """Refuses: there is no cross-attention to look at.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "attention distillation: expected an encoder-decoder, which shows what its decoder takes from each "
            "passage, came a decoder-only generator. Use another retriever loss (pdist, loop, emdr2, replug)."
        )

    def start(self, encoded: EncodedContexts) -> DecoderState:
        """Reads the prompts; see :class:`rag_lightning.generators.base.Generator`."""
        cache = DynamicCache(config=self.model.config)
        mask_NL = encoded.attention_mask_NL
        output = self._forward(encoded.hidden_NLH, mask_NL, past_key_values=cache, logits_to_keep=1, use_cache=True)
        first_NV = self._without_padding(upcast(output.logits[:, -1]).log_softmax(dim=-1))
        return _state(Continuation(output.past_key_values, mask_NL, first_NV))

    def step(self, tokens_N: Int[Tensor, "N"], state: DecoderState) -> tuple[Float[Tensor, "N V"], DecoderState]:
        """Feeds one token to each row; the first, the start token, is not read: the prompt has been.

        See :class:`rag_lightning.generators.base.Generator`.
        """
        so_far: Continuation = state.cache
        if so_far.first_NV is not None:
            return so_far.first_NV, _state(replace(so_far, first_NV=None))
        so_far = _one_longer(so_far)
        return self._without_padding(self.next_log_probs(*self._forwards(tokens_N, so_far))), _state(so_far)

    def score_step(
        self, tokens_N: Int[Tensor, "N"], state: DecoderState, rows_P: Int[Tensor, "P"], next_P: Int[Tensor, "P"]
    ) -> tuple[Float[Tensor, "P"], DecoderState]:
        """Like :meth:`step`, for P known tokens; see :class:`rag_lightning.generators.base.Generator`."""
        so_far: Continuation = state.cache
        if so_far.first_NV is not None:
            log_probs_NV, state = self.step(tokens_N, state)
            return log_probs_NV[rows_P, next_P], state
        so_far = _one_longer(so_far)
        found_P = self.known_log_probs(*self._forwards(tokens_N, so_far), rows_P, next_P)
        return found_P.masked_fill(next_P == self.pad_token_id, -torch.inf), _state(so_far)

    def reorder(self, state: DecoderState, rows_M: Int[Tensor, "M"]) -> DecoderState:
        """Returns the state of the given rows; see :class:`rag_lightning.generators.base.Generator`."""
        so_far: Continuation = state.cache
        so_far.cache.reorder_cache(rows_M)
        first_MV = so_far.first_NV[rows_M] if so_far.first_NV is not None else None
        return _state(Continuation(so_far.cache, so_far.attention_mask_NL[rows_M], first_MV))

    def fork(self, state: DecoderState) -> DecoderState:
        """Returns a copy; see :class:`rag_lightning.generators.base.Generator`."""
        so_far: Continuation = state.cache
        return replace(state, cache=replace(so_far, cache=forked(so_far.cache)))

    def _forwards(self, tokens_N: Int[Tensor, "N"], so_far: Continuation) -> tuple[Forward, Forward]:
        """Returns what :meth:`next_log_probs` takes."""

        def trial() -> Float[Tensor, "rows positions V"]:
            return self._next_logits(tokens_N, replace(so_far, cache=forked(so_far.cache)))

        return trial, lambda: self._next_logits(tokens_N, so_far)

    def _next_logits(self, tokens_N: Int[Tensor, "N"], so_far: Continuation) -> Float[Tensor, "rows positions V"]:
        """Feeds one token to each row, whose mask counts it already; the cache grows by it."""
        embedded_N1H, mask_NL = self._embed(tokens_N[:, None]), so_far.attention_mask_NL
        cache = so_far.cache
        output = self._forward(embedded_N1H, mask_NL, past_key_values=cache, logits_to_keep=1, use_cache=True)
        logits: Tensor = output.logits
        return logits

    def _without_padding(self, log_probs_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Returns log-probabilities without padding, which is never next: no target scores it, so none teaches it."""
        log_probs_NV[:, self.pad_token_id] = -torch.inf
        return log_probs_NV

    def _embed(self, ids_NL: Int[Tensor, "N L"]) -> Float[Tensor, "N L H"]:
        embedded_NLH: Tensor = self.model.get_input_embeddings()(ids_NL)
        return embedded_NLH

    def _forward(self, inputs_NLH: Float[Tensor, "N L H"], mask_NX: Int[Tensor, "N X"], **settings: Any) -> Any:
        """Runs the model over inputs that end where the mask ends; positions count what is not padding."""
        self.check_length(mask_NX.shape[1])
        if self._takes_positions:
            positions_NX = (mask_NX.cumsum(dim=1) - 1).clamp(min=0)
            settings["position_ids"] = positions_NX[:, -inputs_NLH.shape[1] :]
        return self.model(inputs_embeds=inputs_NLH, attention_mask=mask_NX, return_dict=True, **settings)


def _state(so_far: Continuation) -> DecoderState:
    """Returns a decoder state whose contexts are in the cache, and nowhere else."""
    mask_NL = so_far.attention_mask_NL
    return DecoderState(EncodedContexts(torch.zeros(*mask_NL.shape, 0, device=mask_NL.device), mask_NL), so_far)


def _one_longer(so_far: Continuation) -> Continuation:
    mask_NL = so_far.attention_mask_NL
    return replace(so_far, attention_mask_NL=torch.cat([mask_NL, mask_NL.new_ones(mask_NL.shape[0], 1)], dim=1))


def _end_of_answer(tokenizer: PreTrainedTokenizerBase | None, chat: bool, source: Any) -> int:
    """Returns what ends an answer: of a chat, what its template writes behind an assistant's turn."""
    written = chat_end_id(tokenizer) if chat and tokenizer is not None else None
    return written if written is not None else _first_known(source, "eos_token_id", "sep_token_id")


def _padding(source: Any) -> int:
    if source.pad_token_id is None:
        raise ConfigError(
            "the generator's tokenizer has no padding token, and prompts of different lengths need one: give "
            "generator.pad_token, a token of its vocabulary that no text uses (such as <|finetune_right_pad_id|>), or "
            "a new one (such as <|pad|>), for which a row is added to the embeddings"
        )
    return int(source.pad_token_id)


def _first_known(source: Any, *names: str) -> int:
    for name in names:
        value = getattr(source, name, None)
        value = value[0] if isinstance(value, list) else value  # some configurations have several end tokens
        if value is not None:
            return int(value)
    raise ConfigError(f"the generator has no {names[0]}: set it, targets cannot be built without it")


def _give_padding(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, pad_token: str) -> None:
    if pad_token in tokenizer.get_vocab():
        tokenizer.pad_token = pad_token
        return
    tokenizer.add_special_tokens({"pad_token": pad_token})
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
