"""What all generators made of a transformers model share: its files, its special tokens, how targets are scored."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from rag_lightning.corpora.places import model_place
from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.generators.base import EncodedContexts, Generator
from rag_lightning.generators.lora import merged
from rag_lightning.generators.output_layer import OutputLayer
from rag_lightning.text.tokenizers import load_tokenizer, special_affixes
from rag_lightning.types import GeneratorOutput
from rag_lightning.utils.lengths import LengthGroup, model_length_groups, ordered_rows, widened
from rag_lightning.utils.memory import aligned

Forward = Callable[[], Float[Tensor, "rows positions V"]]
"""Runs a model; one position or row less where what its output layer is given has been replaced."""
GeneratorT = TypeVar("GeneratorT", bound="PretrainedGenerator")

_DECODER_RUN = 6
"""A decoder's run, against what a context's token costs it: two projections for each layer instead of twelve."""


class PretrainedGenerator(nn.Module, Generator):
    """The base of the generator families: a transformers model with its tokenizer.

    What a family adds is :class:`rag_lightning.generators.base.Generator`, and ``attention``.

    Args:
        model: The model.
        tokenizer: Its tokenizer; needed to read and write text, not to score ids.
        pad_token_id: Padding in contexts and targets.
        start_token_id: First token of every target.
        eos_token_id: Last token of every target.
        vocab_size: Rows of the output layer.

    Attributes:
        group_overhead_tokens: What a further run of the model costs, in tokens, see :mod:`rag_lightning.utils.lengths`;
            None estimates it from the model's size. ``math.inf`` keeps every batch in one padded block.

    Raises:
        ConfigError: The end of an answer could not be told from padding.
        CheckpointError: The tokenizer has tokens that the output layer has not.
    """

    auto_class: ClassVar[Any]
    kind: ClassVar[str]
    continues_prompt: ClassVar[bool]  # whether an answer is the continuation of its context
    can_fuse: ClassVar[bool]  # whether a decoder can attend to contexts that were encoded apart (fusion-in-decoder)

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        pad_token_id: int,
        start_token_id: int,
        eos_token_id: int,
        vocab_size: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self.start_token_id = start_token_id
        self.eos_token_id = eos_token_id
        self.vocab_size = vocab_size
        self.output_layer = OutputLayer(model)
        self.group_overhead_tokens: float | None = None
        reads = getattr(model.config, "encoder", None) or model.config
        self.max_positions: int | None = getattr(reads, "max_position_embeddings", None)
        if pad_token_id == eos_token_id:
            raise ConfigError(
                f"the generator's padding and end token are both {eos_token_id}: the end of an answer would never "
                "be scored, and the model never learn to stop. Give its config another pad_token_id, or a decoder-only "
                "model generator.pad_token (a token of its vocabulary that texts do not use, or a new one)."
            )
        if tokenizer is not None and len(tokenizer) > vocab_size:
            raise CheckpointError(
                f"the tokenizer has {len(tokenizer)} tokens but the generator's output layer only {vocab_size}: "
                "they belong to different models. Give the tokenizer that the generator was trained with."
            )

    @property
    def fixed_parameters(self) -> frozenset[str]:
        """Names of the parameters that never learn: those of the model under its adapters."""
        return getattr(self, "_fixed_parameters", frozenset())

    @fixed_parameters.setter
    def fixed_parameters(self, names: frozenset[str]) -> None:
        self._fixed_parameters = names

    def settings(self) -> dict[str, Any]:
        """Returns the constructor's arguments besides model and tokenizer, as they are saved with a model."""
        return {}

    def affixes(self) -> tuple[list[int], list[int]]:
        """Returns the ids that stand before and after every context."""
        return special_affixes(self.text_tokenizer)

    @property
    def text_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ConfigError: There is none.
        """
        if self.tokenizer is None:
            raise ConfigError("this model has no generator tokenizer: give one when loading it")
        return self.tokenizer

    @classmethod
    def read(cls, source: str, tokenizer: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
        """Returns the model and the tokenizer of a folder, a hub id, or a ``bundled:`` folder in transformers' layout.

        Args:
            source: Where the model is.
            tokenizer: Where its tokenizer is, if not in the same place.
        """
        place = model_place(source)
        model = aligned(cls.auto_class.from_pretrained(place, dtype=torch.float32))
        return model, load_tokenizer(model_place(tokenizer) if tokenizer is not None else place)

    @classmethod
    def load(cls: type[GeneratorT], directory: Path, settings: dict[str, Any] | None = None) -> GeneratorT:
        """Reads what :meth:`save` wrote.

        Args:
            directory: Where.
            settings: What :meth:`settings` said.
        """
        model = aligned(cls.auto_class.from_pretrained(model_place(str(directory)), dtype=torch.float32))
        has_tokenizer = (directory / "tokenizer_config.json").is_file()
        tokens = load_tokenizer(directory) if has_tokenizer else None
        arguments: dict[str, Any] = {**(settings or {}), "tokenizer": tokens}
        return cls(model=model, **arguments)

    def save(self, directory: Path) -> None:
        """Writes the model, adapters merged, and the tokenizer if there is one, in the transformers layout."""
        merged(self.model).save_pretrained(directory)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    @classmethod
    def model_from_config(cls, model_type: str, settings: dict[str, Any], tokens: PreTrainedTokenizerBase) -> Any:
        """Returns a randomly initialised model whose vocabulary and special tokens are the tokenizer's."""
        config = AutoConfig.for_model(model_type, **{**_special_ids(tokens), "vocab_size": len(tokens), **settings})
        return cls.auto_class.from_config(config)

    @abstractmethod
    def attention(self, encoded: EncodedContexts, labels_BT1: Int[Tensor, "B T1"]) -> Float[Tensor, "B L"]:
        """Returns how much the decoder takes from each token of its context; refuses where it cannot be known."""

    def check_length(self, num_tokens: int) -> None:
        """Refuses inputs that are longer than the model has positions.

        Raises:
            ConfigError: Says how long, and what to lower.
        """
        if self.max_positions is not None and num_tokens > self.max_positions:
            raise ConfigError(
                f"expected inputs within the generator's {self.max_positions} positions, came {num_tokens} tokens: "
                "lower model.prompt.max_tokens (or, for a decoder-only generator, model.max_target_tokens)"
            )

    def scored(
        self,
        logits_NTV: Float[Tensor, "N T V"],
        labels_BT1: Int[Tensor, "B T1"],
        *,
        vocab_mean: bool,
        keep_logits: bool,
    ) -> GeneratorOutput:
        """Returns what all logits say of the targets: the plain way, for losses that look at the logits themselves.

        Args:
            logits_NTV: Logits of the T tokens after the start token; ``N = B * K`` rows, K adjacent ones for a target.
            labels_BT1: The targets.
            vocab_mean: Also the vocabulary's mean log-probability.
            keep_logits: Also the logits.
        """
        targets_BT = labels_BT1[:, 1:]
        num_passages = logits_NTV.shape[0] // targets_BT.shape[0]
        mask_BT = targets_BT != self.pad_token_id
        logits_NTV = upcast(logits_NTV)
        targets_NT = targets_BT.repeat_interleave(num_passages, dim=0)
        log_probs_NT, mean_NT = picked_log_probs(logits_NTV, targets_NT, vocab_mean=vocab_mean)
        shape_BKT = (targets_BT.shape[0], num_passages, targets_BT.shape[1])
        return GeneratorOutput(
            token_log_probs_BKT=log_probs_NT.view(shape_BKT).masked_fill(~mask_BT[:, None], 0.0),
            target_mask_BT=mask_BT,
            vocab_mean_BKT=mean_NT.view(shape_BKT) if mean_NT is not None else None,
            logits_BKTV=logits_NTV.view(*shape_BKT, -1) if keep_logits else None,
        )

    def scored_in_groups(
        self,
        run: Callable[[LengthGroup], Float[Tensor, "rows positions V"]],
        groups: Sequence[LengthGroup],
        labels_BT1: Int[Tensor, "B T1"],
        num_passages: int,
        *,
        vocab_mean: bool,
    ) -> GeneratorOutput:
        """Returns what the model says of the targets; the output layer runs on scored positions alone.

        Args:
            run: Runs the decoder on a group of the ``B * K`` rows and returns its logits, the last T of which are those
                of the targets; fewer than T, the first ones, where all targets of the group are shorter.
            groups: The rows.
            labels_BT1: The targets.
            num_passages: K.
            vocab_mean: Also the vocabulary's mean log-probability.
        """
        targets_BT = labels_BT1[:, 1:]
        batch_size, num_targets = targets_BT.shape
        mask_BT = targets_BT != self.pad_token_id
        rows_N = ordered_rows(groups, batch_size * num_passages, targets_BT.device)
        mask_NT, targets_NT = mask_BT[rows_N // num_passages], targets_BT[rows_N // num_passages]
        targets_S = targets_NT[mask_NT]
        if self.output_layer.is_linear(partial(run, groups[0])):
            found = (self.output_layer.states(partial(run, group))[:, -num_targets:] for group in groups)
            states = [widened(states, num_targets) for states in found]
            log_probs_S, mean_S = self.output_layer.log_probs(
                torch.cat(states)[mask_NT], targets_S, vocab_mean=vocab_mean
            )
        else:
            sizes = [len(mask_NT) if group.rows_M is None else len(group.rows_M) for group in groups]
            masks = torch.split(mask_NT, sizes)
            pairs = zip(groups, masks, strict=True)
            logits = [self.output_layer.logits_at(partial(run, group), mask) for group, mask in pairs]
            log_probs_S, mean_S = picked_log_probs(upcast(torch.cat(logits)), targets_S, vocab_mean=vocab_mean)
        columns_T = torch.arange(num_targets, device=rows_N.device)
        places_S = (rows_N[:, None] * num_targets + columns_T)[mask_NT]
        shape_BKT = (batch_size, num_passages, num_targets)
        return GeneratorOutput(
            token_log_probs_BKT=_placed(log_probs_S, places_S, shape_BKT),
            target_mask_BT=mask_BT,
            vocab_mean_BKT=_placed(mean_S, places_S, shape_BKT) if mean_S is not None else None,
        )

    def next_log_probs(self, trial: Forward, forward: Forward) -> Float[Tensor, "N V"]:
        """Returns the log-probabilities of the next token, in float32 at least.

        Args:
            trial: Runs the model like ``forward``, on copies of what it changes; called at most once for a model.
            forward: Feeds one token to each of N rows.
        """
        if torch.is_grad_enabled() or self.model.device.type != "cpu" or not self.output_layer.is_linear(trial):
            return upcast(forward()[:, -1]).log_softmax(dim=-1)
        return self.output_layer.log_probs_of_all(self.output_layer.states(forward)[:, -1])

    def known_log_probs(
        self,
        trial: Forward,
        forward: Forward,
        rows_P: Int[Tensor, "P"],
        next_P: Int[Tensor, "P"],
    ) -> Float[Tensor, "P"]:
        """Returns the log-probabilities of known tokens; where the output layer is linear, their logits alone are kept.

        Args:
            trial: See :meth:`next_log_probs`.
            forward: The same.
            rows_P: Behind which row each known token stands.
            next_P: The known tokens.
        """
        if torch.is_grad_enabled() or not self.output_layer.is_linear(trial):
            return upcast(forward()[:, -1]).log_softmax(dim=-1)[rows_P, next_P]
        return self.output_layer.log_probs_of_pairs(self.output_layer.states(forward)[:, -1], rows_P, next_P)

    def length_groups(self, lengths: Sequence[int], width: int, *, decoder: bool = False) -> list[LengthGroup]:
        """Returns rows of like length, to be run together; all in one where more runs would cost more than padding.

        In one group too where the model is spread over processes: each run gathers, so all must run equally often.

        Args:
            lengths: Tokens of each row.
            width: Of the padded block.
            decoder: Whether it is the decoder that runs, to which a token of the context costs two projections.
        """
        overhead, num_runs = self.group_overhead_tokens, _DECODER_RUN if decoder else 1
        return model_length_groups(self.model, lengths, width, overhead_tokens=overhead, num_runs=num_runs)


def check_rows(num_contexts: int, num_targets: int, num_passages: int) -> None:
    """Refuses contexts that are not those of the targets.

    Raises:
        ConfigError: Not B x K contexts.
    """
    if num_contexts != num_targets * num_passages:
        raise ConfigError(
            f"expected {num_targets} targets x {num_passages} passages = {num_targets * num_passages} contexts, "
            f"got {num_contexts}: num_passages must be the K that retrieval used"
        )


def forked(cache: DynamicCache) -> DynamicCache:
    """Returns a cache that goes on from the same keys and values; growing either leaves the other as it is."""
    # attention's layers put new tensors in place of theirs; others (of recurrent models) may write into them
    layers = [copy(layer) if isinstance(layer, DynamicLayer) else deepcopy(layer) for layer in cache.layers]
    other = copy(cache)
    other.layers = layers
    return other


def upcast(logits: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
    """Returns logits in float32, or as they are in float64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def picked_log_probs(
    logits: Float[Tensor, "*rows V"], targets: Int[Tensor, "*rows"], *, vocab_mean: bool
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"] | None]:
    """Returns the log-probability of each target and, if asked, the vocabulary's mean."""
    with torch.autocast(logits.device.type, enabled=False):
        normaliser = logits.logsumexp(dim=-1)
        log_probs = logits.gather(-1, targets[..., None]).squeeze(-1) - normaliser
        return log_probs, logits.mean(dim=-1) - normaliser if vocab_mean else None


def _placed(values_S: Float[Tensor, "S"], places_S: Int[Tensor, "S"], shape: tuple[int, ...]) -> Float[Tensor, "B K T"]:
    """Returns values at their places, zeros elsewhere."""
    return values_S.new_zeros(math.prod(shape)).index_copy(0, places_S, values_S).view(shape)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": start,
        "eos_token_id": end,
        "decoder_start_token_id": start if start is not None else tokenizer.pad_token_id,
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
