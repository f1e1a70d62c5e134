"""Prompts: how a passage and a question become one generator input.

Inputs: passages and questions as text (to be tokenised once), or their ids (to be joined for a batch). Passage and
question are tokenised apart, without special tokens, and joined as ids, so no text is touched in a training step:

    prefix specials · passage · question · suffix specials        (or question first)

The second part starts with a space (or line break) of its own. Byte-level BPE, WordPiece and SentencePiece vocabularies
all cut before a space, so the joined ids are those of the joined string (before a line break some write other ids for
the same text), which is what Lewis et al. 2020 (as released in transformers:
``title / text // question``) feed to BART.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.types import Passage, TokenBatch


@dataclass(frozen=True)
class Prompt:
    """The words around a passage and a question, and how many tokens each may take.

    Attributes:
        passage_template: Fields ``{title}`` and ``{text}``, at least one of them.
        question_template: Field ``{question}``.
        question_first: Question before passage; the passage template then needs the leading space.
        answer_prefix: Stands before every answer that a model is trained on: the space between prompt and answer
            where a decoder-only model goes on from ``Answer:``. Empty for an encoder-decoder.
        passage_separator: Stands between the passages where one prompt holds them all (``objective=prompt_stuffing``).
        max_passage_tokens: Limit of the rendered passage, without special tokens.
        max_tokens: Limit of the whole input, special tokens included.
        keep_question: What is kept of a question that is longer than half of ``max_tokens``, or than the query encoder
            reads: its ``start``, or its ``end``, as of a dialogue, whose last turn asks.

    Raises:
        ConfigError: A template with an unknown or missing field or unbalanced braces, a second part without leading
            space, or limits below 1 or in the wrong order.

    >>> passage = Passage(id="1", title='"Kismet"', text="A film.")
    >>> Prompt().passage_text(passage) + Prompt().question_text("who made it?")
    'Kismet / A film. // who made it?'
    """

    passage_template: str = "{title} / {text}"
    question_template: str = " // {question}"
    question_first: bool = False
    answer_prefix: str = ""
    passage_separator: str = "\n"
    max_passage_tokens: int = 200
    max_tokens: int = 300
    keep_question: Literal["start", "end"] = "start"

    def __post_init__(self) -> None:
        if self.keep_question not in ("start", "end"):
            raise ConfigError(f"prompt: keep_question: expected start or end, came {self.keep_question!r}.")
        _check_template("passage_template", self.passage_template, ("title", "text"))
        _check_template("question_template", self.question_template, ("question",))
        name = "passage_template" if self.question_first else "question_template"
        if not getattr(self, name)[:1].isspace():
            raise ConfigError(
                f"prompt: with question_first={self.question_first}, expected {name} to start with a space, so that "
                f"joining ids equals tokenising the joined text, came {getattr(self, name)!r}. Put the separator there."
            )
        if self.max_passage_tokens < 1 or self.max_tokens < self.max_passage_tokens:
            raise ConfigError(
                f"prompt: expected 1 <= max_passage_tokens <= max_tokens, came max_passage_tokens="
                f"{self.max_passage_tokens} and max_tokens={self.max_tokens}. Raise max_tokens or lower the other."
            )

    @property
    def passage_key(self) -> str:
        """What decides the rendered passage text: part of the key of a token store."""
        return f"v1:{'second' if self.question_first else 'first'}:{self.passage_template}"

    def passage_text(self, passage: Passage) -> str:
        """Returns the passage's part of the input: title without surrounding double quotes, double spaces collapsed.

        When it comes first, trailing spaces are dropped: the question part brings the one that is wanted.
        """
        title = passage.title.removeprefix('"').removesuffix('"')
        text = _collapse(self.passage_template.format(title=title, text=passage.text))
        return text if self.question_first else text.rstrip(" ")

    @property
    def before_question(self) -> str:
        """What the question's part begins with, before the question."""
        return self.question_template.partition("{question}")[0].replace("{{", "{").replace("}}", "}")

    @property
    def after_question(self) -> str:
        """What the question's part ends in, behind the question."""
        return self.question_template.rpartition("{question}")[2].replace("{{", "{").replace("}}", "}")

    def question_text(self, question: str) -> str:
        """Returns the question's part of the input, double spaces collapsed."""
        text = _collapse(self.question_template.format(question=question))
        return text.rstrip(" ") if self.question_first else text


def join_contexts(
    passages: Sequence[np.ndarray],
    questions: TokenBatch,
    num_passages: int,
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    pad_id: int,
    max_tokens: int,
    question_first: bool = False,
) -> TokenBatch:
    """Joins token ids into generator inputs, padded on the right to the batch's longest.

    Where an input would pass ``max_tokens``, the end of its passage is cut; a question is never cut.

    Args:
        passages: Ids of ``B * K`` passages, those of one question adjacent; an empty array where none was found.
        questions: Ids of ``B`` questions, padded on either side, without special tokens.
        num_passages: K.
        prefix_ids: Ids put before each input, from :func:`~rag_lightning.text.tokenizers.special_affixes`.
        suffix_ids: Ids put after each input.
        pad_id: The padding id.
        max_tokens: The limit of an input, special tokens included.
        question_first: Question before passage.

    Returns:
        ``[B * K, L]`` with L at most ``max_tokens``, int64, on the questions' device.

    Raises:
        ConfigError: The number of passages is not ``B * K``.
        DataError: A question leaves no room within ``max_tokens``; names its row.
    """
    input_ids_BL = questions.input_ids.cpu().numpy()
    real_BL = questions.attention_mask.cpu().numpy().astype(bool)
    if num_passages < 1 or len(passages) != len(input_ids_BL) * num_passages:
        raise ConfigError(
            f"join_contexts: expected B * K passages for B={len(input_ids_BL)} questions and K={num_passages}, "
            f"came {len(passages)}. Give num_passages as it was retrieved."
        )
    question_rows = [ids[real] for ids, real in zip(input_ids_BL, real_BL, strict=True)]
    room_B = max_tokens - len(prefix_ids) - len(suffix_ids) - real_BL.sum(axis=1)
    if (room_B < 0).any():
        row = int(np.argmin(room_B))
        raise DataError(
            f"join_contexts: expected each question to fit into max_tokens={max_tokens} with {len(prefix_ids)} + "
            f"{len(suffix_ids)} special tokens, came one of {len(question_rows[row])} tokens in row {row} of the "
            "batch. Raise max_tokens or shorten the question."
        )
    prefix, suffix = np.asarray(prefix_ids, dtype=np.int64), np.asarray(suffix_ids, dtype=np.int64)
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    for row, passage in enumerate(passages):
        question = question_rows[row // num_passages]
        cut = passage[: int(room_B[row // num_passages])]
        pieces += (prefix, question, cut, suffix) if question_first else (prefix, cut, question, suffix)
        lengths.append(len(prefix) + len(cut) + len(question) + len(suffix))
    lengths_N = np.asarray(lengths, dtype=np.int64)
    mask_NL = np.arange(lengths_N.max(initial=0)) < lengths_N[:, None]
    ids_NL = np.full(mask_NL.shape, pad_id, dtype=np.int64)
    if pieces:
        ids_NL[mask_NL] = np.concatenate(pieces)  # row-major order on both sides
    device = questions.input_ids.device
    return TokenBatch(
        input_ids=torch.from_numpy(ids_NL).to(device),
        attention_mask=torch.from_numpy(mask_NL.astype(np.int64)).to(device),
        lengths=tuple(max(1, length) for length in lengths),
    )


def _collapse(text: str) -> str:
    return text.replace("  ", " ")


def _check_template(name: str, template: str, fields: tuple[str, ...]) -> None:
    wanted = " or ".join("{" + field + "}" for field in fields)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"prompt: {name}={template!r} is no template: {error}. Write {{{{ for a brace.") from error
    found = [(field, spec, conversion) for _, field, spec, conversion in parsed if field is not None]
    for field, spec, conversion in found:
        if field not in fields or spec or conversion:
            raise ConfigError(
                f"prompt: {name}: expected only the plain field {wanted}, came {{{field}}} in {template!r}. Remove it."
            )
    if not found:
        raise ConfigError(f"prompt: {name}: expected the field {wanted}, found none in {template!r}. Add it.")
