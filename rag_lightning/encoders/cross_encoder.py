"""The cross-encoder: one transformer reads question and passage together and gives one logit (Nogueira and Cho 2019).

More accurate than two towers and far dearer: nothing can be encoded in advance, so it re-scores what a retriever found
(:class:`rag_lightning.retrieval.rerank.CrossEncoderReranker`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rag_lightning.corpora.places import model_place
from rag_lightning.errors import CheckpointError, ConfigError, DataError
from rag_lightning.text.tokenizers import load_tokenizer
from rag_lightning.types import Passage
from rag_lightning.utils.memory import aligned


class CrossEncoder(nn.Module):
    """A transformers sequence classifier with one output, and how it reads a pair.

    Args:
        model: The classifier.
        tokenizer: Its tokenizer, which joins the two texts as the model was trained to read them.
        passage_template: How a passage is written; ``{title}``, ``{text}``.
        max_tokens: Longest pair, special tokens included; the longer of the two texts is cut first.

    Raises:
        ConfigError: More outputs than one, or pairs longer than the model can read.
    """

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        passage_template: str = "{title} {text}",
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        if model.config.num_labels != 1:
            raise ConfigError(
                f"cross-encoder: expected a classifier with one output, came {model.config.num_labels}. "
                "Give one trained to rank, such as those of the MS MARCO passage task."
            )
        longest = getattr(model.config, "max_position_embeddings", None)
        if max_tokens < 8 or (longest is not None and max_tokens > longest):
            raise ConfigError(f"cross-encoder max_tokens: expected 8 to {longest or 'any number'}, came {max_tokens}.")
        self.model = model
        self.tokenizer = tokenizer
        self.passage_template = passage_template
        self.max_tokens = max_tokens

    @classmethod
    def from_source(
        cls,
        *,
        source: str,
        tokenizer: str | None = None,
        passage_template: str = "{title} {text}",
        max_tokens: int = 256,
    ) -> "CrossEncoder":
        """Loads a cross-encoder from a folder or a hub id, in evaluation mode.

        Args:
            source: The model's place.
            tokenizer: The tokenizer's place; by default the model's.
            passage_template: See :class:`CrossEncoder`.
            max_tokens: See :class:`CrossEncoder`.

        Raises:
            MissingFileError: No such folder.
            CheckpointError: The checkpoint lacks weights, such as a plain encoder without a trained output.
            ConfigError: It has more outputs than one.
        """
        place = model_place(source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise CheckpointError(
                f"cross-encoder: {place} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}: "
                "they would stay random. Give a checkpoint trained to score pairs."
            )
        tokens = load_tokenizer(model_place(tokenizer) if tokenizer is not None else place)
        return cls(
            model=aligned(model), tokenizer=tokens, passage_template=passage_template, max_tokens=max_tokens
        ).eval()

    @classmethod
    def from_config(
        cls,
        *,
        model_type: str,
        settings: dict[str, Any],
        tokenizer: str,
        passage_template: str = "{title} {text}",
        max_tokens: int = 256,
    ) -> "CrossEncoder":
        """Builds a randomly initialised cross-encoder whose vocabulary is the tokenizer's.

        Args:
            model_type: A transformers model type (``bert``).
            settings: Fields of that type's configuration.
            tokenizer: Folder or hub id of the tokenizer.
            passage_template: See :class:`CrossEncoder`.
            max_tokens: See :class:`CrossEncoder`.
        """
        tokens = load_tokenizer(model_place(tokenizer))
        ids = {"vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id, "num_labels": 1}
        config = AutoConfig.for_model(model_type, **{**ids, **settings})
        model = AutoModelForSequenceClassification.from_config(config)
        return cls(model=model, tokenizer=tokens, passage_template=passage_template, max_tokens=max_tokens).eval()

    def forward(
        self,
        input_ids: Int[Tensor, "N L"],
        attention_mask: Int[Tensor, "N L"],
        token_type_ids: Int[Tensor, "N L"] | None = None,
    ) -> Float[Tensor, "N"]:
        """Returns one logit for each pair, in float32 at least; larger is more relevant."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **types)
        logits_N: Tensor = output.logits.squeeze(-1)
        return logits_N.to(torch.promote_types(logits_N.dtype, torch.float32))

    @torch.no_grad()
    def score(
        self, questions: Sequence[str], passages: Sequence[Passage], *, batch_size: int = 32
    ) -> Float[Tensor, "N"]:
        """Returns the logits of N pairs, on this model's device, with dropout off.

        Pairs are batched by length, so little is spent on padding.

        Args:
            questions: N texts.
            passages: N passages.
            batch_size: Pairs at a time.

        Raises:
            DataError: Unequal numbers of the two.
        """
        if len(questions) != len(passages):
            raise DataError(
                f"cross-encoder: expected one passage for each of {len(questions)} questions, came {len(passages)}."
            )
        device = next(self.parameters()).device
        logits_N = torch.empty(len(questions), device=device)
        texts = [self.passage_template.format(title=p.title, text=p.text).strip() for p in passages]
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        was_training = self.training
        self.eval()
        try:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                pairs = self.tokenizer(
                    [questions[place] for place in chosen],
                    [texts[place] for place in chosen],
                    truncation="longest_first",
                    max_length=self.max_tokens,
                    padding=True,
                    return_tensors="pt",
                ).to(device)
                names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in pairs]
                logits_N[torch.tensor(chosen, device=device)] = self(**{name: pairs[name] for name in names})
        finally:
            self.train(was_training)
        return logits_N
