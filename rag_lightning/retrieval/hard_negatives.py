"""Hard negatives: passages that a retriever takes for an answer and that hold none.

DPR trains best with one passage for each question that BM25 ranks high and that does not contain the answer (Karpukhin
et al. 2020, §3.2 and Table 3); ANCE mines with the retriever being trained, again and again (Xiong et al. 2020,
arXiv:2007.00808). Both are one search, one filter, and the file's next version. The filter is by gold passage and by
answer string, so a passage that answers in other words stays in: ``skip_top`` leaves out the ranks where such false
negatives are likeliest (Qu et al. 2021, RocketQA, arXiv:2010.08191, on unlabelled positives among the top passages).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from rich.progress import track
from torch import Tensor

from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.encoders.bi_encoder import BiEncoder
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.base import MISSING_ID, Index
from rag_lightning.retrieval.contexts import pad_sequences
from rag_lightning.text.normalise import contains_answer, matches_regex
from rag_lightning.types import Passage, Question
from rag_lightning.utils.io import write_json_lines

Search: TypeAlias = Callable[[Sequence[str], int], tuple[Float[Tensor, "B K"], Int[Tensor, "B K"]]]
"""Scores (larger is better, best first) and passage numbers of the K best passages of each question's text."""


@dataclass(frozen=True, slots=True)
class MinedQuestion:
    """A question with its hard negatives in ``question.negative_passage_ids``, and the miner's scores of them."""

    question: Question
    scores: tuple[float, ...]


def mine_hard_negatives(
    questions: Sequence[Question],
    search: Search,
    corpus: PassageCorpus,
    *,
    num_negatives: int,
    depth: int,
    skip_top: int = 0,
    batch_size: int = 64,
    progress: bool = False,
) -> list[MinedQuestion]:
    """Returns each question with the best-ranked passages that are neither gold nor hold an accepted answer.

    Every question is returned, in order; one may have fewer negatives than asked for, or none, where most of what is
    found answers it. Negatives that a question came with are replaced.

    Args:
        questions: The questions; their answers and gold passages decide what is no negative.
        search: For BM25, ``Bm25Index.search``; for the current dense index, :func:`dense_search`.
        corpus: What the passage numbers number.
        num_negatives: How many to keep of each question, the hardest ones.
        depth: How many passages to look through.
        skip_top: How many of the first ranks to leave out whatever they hold.
        batch_size: Questions searched for at a time.
        progress: Shows a bar.

    Raises:
        ConfigError: No negatives asked for, or a depth that cannot give them or exceeds the corpus.
    """
    if num_negatives < 1 or skip_top < 0:
        raise ConfigError(
            f"expected num_negatives of at least 1 and skip_top of at least 0, got {num_negatives} and {skip_top}"
        )
    if not skip_top + num_negatives <= depth <= len(corpus):
        raise ConfigError(
            f"depth: expected at least skip_top + num_negatives = {skip_top + num_negatives} and at most the "
            f"{len(corpus)} passages of {corpus.source}, got {depth}"
        )
    mined: list[MinedQuestion] = []
    starts = range(0, len(questions), batch_size)
    for start in track(starts, description="mining", transient=True, disable=not progress):
        batch = questions[start : start + batch_size]
        scores_BK, ids_BK = search([question.question for question in batch], depth)
        for question, scores, ids in zip(batch, scores_BK.tolist(), ids_BK.tolist(), strict=True):
            found = list(zip(scores, ids, strict=True))[skip_top:]
            mined.append(_hardest(question, found, corpus, num_negatives))
    return mined


def _hardest(
    question: Question, found: Iterable[tuple[float, int]], corpus: PassageCorpus, num_negatives: int
) -> MinedQuestion:
    known = {*question.positive_passage_ids, *question.excluded_passage_ids, question.source_passage_id}
    ids: list[str] = []
    scores: list[float] = []
    for score, row in found:
        if len(ids) == num_negatives or row == MISSING_ID:
            break
        passage = corpus[row]
        if passage.id not in known and not holds_answer(passage, question):
            ids.append(passage.id)
            scores.append(score)
    return MinedQuestion(replace(question, negative_passage_ids=tuple(ids)), tuple(scores))


def holds_answer(passage: Passage, question: Question) -> bool:
    """Whether a passage's title or text holds an accepted answer, or what the answer's regular expression matches.

    Where a question has both, either will do: what may be an answer is no negative.

    >>> holds_answer(Passage("7", "Kismet", "A film of 1955."), Question("q", "when did Kismet come out?", ("1955",)))
    True
    """
    parts = (passage.title, passage.text)
    if question.answer_regex is not None and any(matches_regex(part, question.answer_regex) for part in parts):
        return True
    return any(contains_answer(part, question.answers) for part in parts)


def dense_search(encoder: BiEncoder, index: Index) -> Search:
    """Returns the search of an index of passage vectors by an encoder's query tower, without gradient or dropout.

    Raises:
        ConfigError: The encoder has no tokenizer.
    """
    tokenizer = encoder.tokenizer
    if tokenizer is None:
        raise ConfigError("this encoder has no tokenizer: give one when loading it")

    def search(questions: Sequence[str], num_passages: int) -> tuple[Tensor, Tensor]:
        texts = [encoder.query_template.format(question=question) for question in questions]
        encoded = tokenizer(texts, truncation=True, max_length=encoder.max_query_tokens)["input_ids"]
        tokens = pad_sequences(encoded, tokenizer.pad_token_id).to(next(encoder.query.parameters()).device)
        was_training = encoder.query.training
        encoder.query.eval()
        try:
            with torch.no_grad():
                vectors_BD = encoder.query(tokens).float()
        finally:
            encoder.query.train(was_training)
        return index.search(vectors_BD, num_passages)

    return search


def write_mined(path: Path, records: Sequence[dict[str, Any]], mined: Sequence[MinedQuestion]) -> None:
    """Writes a question file with ``negative_passage_ids`` and ``negative_scores``, atomically.

    Args:
        path: A ``.jsonl`` or ``.jsonl.gz`` file.
        records: The lines of the file that the questions were read from; their other fields are kept.
        mined: What was mined for them, in the same order.

    Raises:
        DataError: Records and questions do not belong together.
    """
    ids = [record.get("id") for record in records], [one.question.id for one in mined]
    if ids[0] != ids[1]:
        raise DataError(
            f"expected the {len(records)} records that the questions were read from, in order, came {len(mined)} "
            "questions of other ids: read both from one file"
        )
    lines = (
        {
            **record,
            "negative_passage_ids": list(one.question.negative_passage_ids),
            "negative_scores": list(one.scores),
        }
        for record, one in zip(records, mined, strict=True)
    )
    write_json_lines(path, lines)
