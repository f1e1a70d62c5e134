"""Recall@k and mean reciprocal rank of retrieved passages.

Inputs: for each question, which of its K passages (best first) are relevant. Two notions of relevance are built here:
by gold passage id, where the dataset names them, and by answer string, where it does not (DPR §5.1, "top-k accuracy").
The second is laxer: a passage may hold the answer's words by chance. Recall@k is 1 where any of the first k passages
is relevant; it does not ask how many of the relevant ones were found.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.normalise import Language, contains_answer, matches_regex
from rag_lightning.types import Passage, Question


def recall_at(relevant_BK: Bool[Tensor, "B K"], k: int) -> Float[Tensor, "B"]:
    """Returns 1 where any of a question's first k passages is relevant, else 0.

    Raises:
        ConfigError: ``k`` is not between 1 and K.

    >>> recall_at(torch.tensor([[False, True, True], [False, False, True]]), k=2)
    tensor([1., 0.])
    """
    if not 1 <= k <= relevant_BK.shape[1]:
        raise ConfigError(f"recall@k needs 1 <= k <= K = {relevant_BK.shape[1]} passages, came k = {k}.")
    return relevant_BK[:, :k].any(dim=1).float()


def reciprocal_rank(relevant_BK: Bool[Tensor, "B K"]) -> Float[Tensor, "B"]:
    """Returns 1 / rank of the first relevant passage (ranks from 1), 0 where none of the K is relevant.

    >>> reciprocal_rank(torch.tensor([[False, True, True], [False, False, False]]))
    tensor([0.5000, 0.0000])
    """
    if relevant_BK.shape[1] == 0:
        return relevant_BK.new_zeros(relevant_BK.shape[0], dtype=torch.float32)
    ranks_K = torch.arange(1, relevant_BK.shape[1] + 1, device=relevant_BK.device)
    return (relevant_BK / ranks_K).amax(dim=1)


def relevant_by_gold(
    passages: Sequence[Sequence[Passage]], questions: Sequence[Question], *, num_passages: int | None = None
) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B"]]:
    """Marks passages whose id is among the question's gold passages.

    Args:
        passages: The passages found for each question, best first; shorter rows are filled up as not relevant.
        questions: The B questions.
        num_passages: K; the longest row where not given. Give it wherever an index may find fewer than asked for.

    Returns:
        ``relevant_BK``, and ``counted_B``: True on questions whose dataset names gold passages.

    Raises:
        DataError: Not as many rows as questions, or a row longer than ``num_passages``.
    """
    gold = [frozenset(question.positive_passage_ids) for question in questions]
    _check_rows(passages, len(gold))
    rows = [[passage.id in ids for passage in row] for row, ids in zip(passages, gold, strict=True)]
    return _padded(rows, num_passages), torch.tensor([len(ids) > 0 for ids in gold], dtype=torch.bool)


def relevant_by_answer(
    passages: Sequence[Sequence[Passage]],
    questions: Sequence[Question],
    *,
    num_passages: int | None = None,
    language: Language = "en",
) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B"]]:
    """Marks passages that hold an accepted answer, or what the answer's regular expression matches.

    The title or the text must hold it whole: an answer is not pieced together from the end of a title and the start
    of its text. Arguments, result and errors are those of :func:`relevant_by_gold`; every question counts. For
    ``language`` see :func:`~rag_lightning.text.normalise.contains_answer`.
    """
    _check_rows(passages, len(questions))
    rows = [
        [_holds_answer(passage, question, language) for passage in row]
        for row, question in zip(passages, questions, strict=True)
    ]
    return _padded(rows, num_passages), torch.ones(len(questions), dtype=torch.bool)


def _holds_answer(passage: Passage, question: Question, language: Language) -> bool:
    parts = (passage.title, passage.text)
    if question.answer_regex is not None:
        return any(matches_regex(part, question.answer_regex) for part in parts)
    return any(contains_answer(part, question.answers, language) for part in parts)


def _check_rows(passages: Sequence[Sequence[Passage]], num_questions: int) -> None:
    if len(passages) != num_questions:
        raise DataError(f"expected passages for each of {num_questions} questions, came {len(passages)} rows.")


def _padded(rows: Sequence[Sequence[bool]], num_passages: int | None) -> Bool[Tensor, "B K"]:
    longest = max((len(row) for row in rows), default=0)
    width = longest if num_passages is None else num_passages
    if longest > width:
        raise DataError(f"expected at most {width} passages for each question, came {longest}.")
    relevant_BK = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        relevant_BK[index, : len(row)] = torch.tensor(row, dtype=torch.bool)
    return relevant_BK


class RetrievalMetrics(Metric):
    """Means of recall@k and of the reciprocal rank over the counted questions.

    ``compute`` returns ``{"recall@1", …, "mrr"}`` as fractions of 1. A k larger than the K of some counted question is
    left out, and everything where no question counted. The rank is looked for among the K passages: MRR@K.

    Args:
        ks: Cut-offs, each positive and named once.

    Raises:
        ConfigError: ``ks`` holds none, one twice or one below 1.

    >>> metric = RetrievalMetrics(ks=(1, 5))
    >>> metric.update(torch.tensor([[False, True], [True, False]]), torch.tensor([True, True]))
    >>> metric.compute()
    {'recall@1': tensor(0.5000), 'mrr': tensor(0.7500)}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    num_counted: Tensor
    sum_reciprocal: Tensor
    num_eligible: Tensor
    num_recalled: Tensor

    def __init__(self, *, ks: Sequence[int] = (1, 5, 20)) -> None:
        super().__init__()
        if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
            raise ConfigError(f"ks: expected cut-offs of at least 1, each once, such as (1, 5, 20); came {tuple(ks)}.")
        self.ks = tuple(ks)
        self.add_state("num_counted", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sum_reciprocal", torch.tensor(0.0), dist_reduce_fx="sum")
        # for each k: counted questions with K >= k, and those of them with a relevant passage in the first k
        for name in ("num_eligible", "num_recalled"):
            self.add_state(name, torch.zeros(len(self.ks), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, relevant_BK: Bool[Tensor, "B K"], counted_B: Bool[Tensor, "B"]) -> None:
        """Adds questions.

        Args:
            relevant_BK: True on relevant passages, best passage first.
            counted_B: False on questions to leave out, such as those without a gold passage.

        Raises:
            DataError: The two speak of different numbers of questions.
        """
        if relevant_BK.shape[0] != counted_B.shape[0]:
            raise DataError(
                f"expected relevant_BK and counted_B of one number of questions, "
                f"came {relevant_BK.shape[0]} and {counted_B.shape[0]}."
            )
        relevant_BK = relevant_BK.to(self.num_counted.device)[counted_B.to(self.num_counted.device)]
        self.num_counted += relevant_BK.shape[0]
        self.sum_reciprocal += reciprocal_rank(relevant_BK).sum()
        for place, k in enumerate(self.ks):
            if k <= relevant_BK.shape[1]:
                self.num_eligible[place] += relevant_BK.shape[0]
                self.num_recalled[place] += recall_at(relevant_BK, k).sum().long()

    def compute(self) -> dict[str, Tensor]:
        """Returns the means over all questions counted."""
        if self.num_counted == 0:
            return {}
        figures = {
            f"recall@{k}": self.num_recalled[place] / self.num_counted
            for place, k in enumerate(self.ks)
            if self.num_eligible[place] == self.num_counted
        }
        return figures | {"mrr": self.sum_reciprocal / self.num_counted}
