"""The place of the right passage among all of them, in validation and test: recommendation beside its baselines."""

from collections.abc import Sequence
from typing import Literal, get_args

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from rag_lightning.corpora.questions import read_questions
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.index.bm25 import Bm25Index, open_or_build
from rag_lightning.metrics.ranking import RankMetrics
from rag_lightning.retrieval.ranking import bm25_scores, dense_scores, gold_counts, rank_of
from rag_lightning.training.datamodule import RagDataModule
from rag_lightning.training.module import RagLightningModule
from rag_lightning.types import Question, QuestionBatch

Ranking = Literal["dense", "dense_popularity", "popularity", "bm25"]
LEARNED: tuple[Ranking, ...] = ("dense", "dense_popularity")


class RankingCallback(L.Callback):
    """Ranks all passages for each question and logs hit@k, nDCG@k and MRR of its one gold passage.

    A question's ``excluded_passage_ids`` are left out, and equal scores count against the gold passage. The test
    measures all rankings on the same questions in the same way, as ``test/bm25_hit@10``, ``test/bm25_ndcg@10`` and
    ``test/bm25_mrr``; validation those that change while the encoder learns, as ``val/dense_ndcg@10``:

    - ``dense``: the similarity s(x, z) of the query encoder as it is and the live index's vectors, exact, whatever else
      the retriever fuses or reranks.
    - ``popularity``: count(z), how often a passage is gold for a training question.
    - ``bm25``: the whole question against titles and texts.
    - ``dense_popularity``: s(x, z) / temperature + w log(1 + count(z)). In-batch negatives are drawn by popularity, so
      that training with them makes s / temperature tend to ``log p(z|x) - log p(z)``; w = 1 puts the second term back
      (Yi et al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", correct the same
      in training).

    Args:
        ks: Cut-offs.
        rankings: Which of them.
        popularity_weight: w.

    Raises:
        ConfigError: An unknown or repeated ranking, a weight that is not above 0, or bad cut-offs.
    """

    def __init__(
        self,
        *,
        ks: Sequence[int] = (1, 5, 10),
        rankings: Sequence[str] = ("dense", "dense_popularity", "popularity", "bm25"),
        popularity_weight: float = 1.0,
    ) -> None:
        if not rankings or set(rankings) - {*get_args(Ranking)} or len(set(rankings)) != len(rankings):
            raise ConfigError(
                f"ranking.rankings: expected some of {', '.join(get_args(Ranking))}, each once, came {list(rankings)}."
            )
        if not 0 < popularity_weight < float("inf"):
            raise ConfigError(f"ranking.popularity_weight: expected a number above 0, came {popularity_weight}.")
        self.rankings = tuple(name for name in get_args(Ranking) if name in rankings)
        self.learned = tuple(name for name in LEARNED if name in rankings)
        self.popularity_weight = popularity_weight
        self.metrics = {name: RankMetrics(ks=ks) for name in self.rankings}
        self._bm25: Bm25Index | None = None
        self._counts_N: Float[Tensor, "N"] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks what ranking needs, and makes the baselines, before anything trains.

        Raises:
            ConfigError: A run without passage vectors, or without training questions to count popularity in.
            DataError: A validation or test question without exactly one gold passage.
            MissingExtraError: bm25s is not installed, and its baseline is wanted.
        """
        data = data_of(pl_module)
        if data.index is None and self.learned:
            raise ConfigError(
                f"ranking: expected a run that searches passage vectors, as {self.learned[0]} compares them; came one "
                "without. Use retriever=dense with an objective that retrieves, or set callbacks.ranking.rankings."
            )
        for split in ("validation", "test"):
            for question in data.questions.get(split, ()):
                _check_one_gold(question, split)
        if self._counts_N is None and any(name.endswith("popularity") for name in self.rankings):
            self._counts_N = gold_counts(_training_questions(data), data.corpus).float()
        if self._bm25 is None and "bm25" in self.rankings:
            self._bm25 = data.bm25 or open_or_build(data.corpus, cache_dir=data.cache_dir)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch."""
        self._start(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forgets the last epoch."""
        self._start(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: QuestionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ranks by what learns."""
        self._rank(pl_module, batch, self.learned)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: QuestionBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Ranks in every way."""
        self._rank(pl_module, batch, self.rankings)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs ``val/dense_hit@k``, …."""
        self._log(pl_module, "val", self.learned)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs ``test/dense_hit@k``, …, ``test/bm25_mrr``."""
        self._log(pl_module, "test", self.rankings)

    def _start(self, pl_module: L.LightningModule) -> None:
        for metric in self.metrics.values():
            metric.reset()
            metric.to(pl_module.device)
            metric.update(torch.zeros(0, dtype=torch.long))  # a process without questions deserves no warning

    @torch.no_grad()
    def _rank(self, pl_module: L.LightningModule, batch: QuestionBatch, rankings: Sequence[Ranking]) -> None:
        data = data_of(pl_module)
        rows = [row for row, weight in enumerate(batch.weights_B.tolist()) if weight > 0]
        if not rows:
            return
        questions = [batch.questions[row] for row in rows]
        target_B = torch.tensor([data.corpus.row_of(question.positive_passage_ids[0]) for question in questions])
        excluded = [[data.corpus.row_of(one) for one in question.excluded_passage_ids] for question in questions]
        dense_BN = self._dense(pl_module, batch, data)[rows] if self.learned else None
        for name in rankings:
            scores_BN = self._scores(name, pl_module, questions, dense_BN)
            self.metrics[name].update(rank_of(scores_BN, target_B.to(scores_BN.device), excluded))

    def _dense(self, pl_module: L.LightningModule, batch: QuestionBatch, data: RagDataModule) -> Float[Tensor, "B N"]:
        assert isinstance(pl_module, RagLightningModule)
        encoder, dense = pl_module.model.encoder, data.dense
        assert encoder is not None
        assert batch.query is not None
        assert dense is not None
        return dense_scores(encoder.query(batch.query), dense.snapshot.vectors_ND, dense.metric)

    def _scores(
        self, name: Ranking, pl_module: L.LightningModule, questions: Sequence[Question], dense_BN: Tensor | None
    ) -> Float[Tensor, "B N"]:
        if name == "bm25":
            assert self._bm25 is not None
            return bm25_scores(self._bm25, [question.question for question in questions])
        if name == "popularity":
            assert self._counts_N is not None
            return self._counts_N.expand(len(questions), -1)
        assert dense_BN is not None
        if name == "dense":
            return dense_BN
        assert self._counts_N is not None
        assert isinstance(pl_module, RagLightningModule)
        prior_N = self.popularity_weight * self._counts_N.to(dense_BN).log1p()
        return dense_BN / pl_module.model.settings.temperature + prior_N

    def _log(self, pl_module: L.LightningModule, stage: str, rankings: Sequence[Ranking]) -> None:
        figures = {
            f"{stage}/{name}_{figure}": value
            for name in rankings
            for figure, value in self.metrics[name].compute().items()
        }
        pl_module.log_dict(figures, sync_dist=True)  # the same in all processes already


def data_of(pl_module: L.LightningModule) -> RagDataModule:
    """Returns the run's data module.

    Raises:
        ConfigError: The run trains heads, which rank nothing.
    """
    if not isinstance(pl_module, RagLightningModule):
        raise ConfigError("ranking: expected a run that retrieves for questions, came one of heads.")
    return pl_module.data


def _training_questions(data: RagDataModule) -> Sequence[Question]:
    path = data.paths["train"]
    if path is None:
        raise ConfigError(
            "ranking: expected data.train, as popularity is counted in the training questions, came none. Name it, or "
            "set callbacks.ranking.rankings without popularity."
        )
    read = data.questions.get("train")
    return read if read is not None else read_questions(path, corpus=data.corpus)


def _check_one_gold(question: Question, split: str) -> None:
    if len(question.positive_passage_ids) != 1:
        raise DataError(
            f"ranking: expected one gold passage of each {split} question, as one place is measured, came "
            f"{len(question.positive_passage_ids)} of {question.id!r}. Write one question for each, or leave the "
            "callback out."
        )
