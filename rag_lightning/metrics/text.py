"""Figures of longer texts that a model writes: translations, summaries, replies, questions.

Inputs: the text generated for each question, and the question with its accepted answers as references. BLEU and chrF
are sacreBLEU's (Post 2018) and lie in 0 to 100, as that package and the field give them; the others are fractions of 1.

================  ===================================================================================================
``bleu``          corpus BLEU (Papineni et al. 2002), sacreBLEU's tokenisation ``13a``, of Chinese ``zh``
``bleu1``         the same of single words
``chrf``          chrF2 over all texts (Popović 2015)
``rouge1``        ROUGE of single words, of pairs, of longest common subsequences (Lin 2004): F-measure, the best of
``rouge2``        several references, the mean over questions; the package rouge-score, with Porter's stemmer
``rougeL``        (Chinese: characters, unstemmed)
``distinct3``     different three-word sequences over all of them, in all texts together (Li et al. 2016)
``qbleu1``        Q-BLEU-1 of generated questions (Nema and Khapra 2018), see :func:`question_bleu`
``knowledge_f1``  shared words of the text and of the passages that it is to draw on (Shuster et al. 2021)
================  ===================================================================================================
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.text.normalise import Language, mixed_segments, words_of
from rag_lightning.types import Question

TextMetric = Literal["bleu", "bleu1", "chrf", "rouge1", "rouge2", "rougeL", "distinct3", "qbleu1", "knowledge_f1"]
RougeKind = Literal["rouge1", "rouge2", "rougeL"]
WordKind = Literal["entity", "question", "content", "function"]

ANSWERABILITY_WEIGHTS: Mapping[WordKind, float] = {"entity": 0.6, "question": 0.2, "content": 0.1, "function": 0.1}
"""What the authors' script is run with on SQuAD, as is ``delta = 0.7``."""
_WORD = re.compile(r"\w+(?:['\u2019]\w+)?")
_QUESTION_WORDS = frozenset(("what", "which", "why", "who", "whom", "whose", "where", "when", "how", "is"))
_FUNCTION_TEXT = """
    a about above after again against all am an and any are as at be because been before being below between both
    but by can did do does doing don down during each few for from further had has have having he her here hers
    herself him himself his i if in into it its itself just me more most my myself no nor not now of off on once
    only or other our ours ourselves out over own s same she should so some such t than that the their theirs them
    themselves then there these they this those through to too under until up very was we were while will with you
    your yours yourself yourselves
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_TEXT.split())


class Written(NamedTuple):
    """A generated text beside what it is compared with.

    Attributes:
        text: What was generated.
        references: What might have been written; none where an answer is only known by its form.
        knowledge: The passages that it is to draw on, as one text; None where none are known.
    """

    text: str
    references: tuple[str, ...]
    knowledge: str | None = None


def corpus_bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], *, max_order: int = 4, tokenize: str = "13a"
) -> float:
    """Returns sacreBLEU's corpus BLEU, from 0 to 100; questions may have different numbers of references.

    Raises:
        DataError: No text, or one without a reference.

    >>> round(corpus_bleu(["a small red house by the sea"], [["the small red house by the sea"]]), 1)
    80.9
    """
    from sacrebleu.metrics import BLEU

    _check_pairs(texts, references)
    score = BLEU(tokenize=tokenize, max_ngram_order=max_order, force=True).corpus_score(
        list(texts), _streams(references)
    )
    return float(score.score)


def bleu_signature(tokenize: str = "13a") -> str:
    """Returns what sacreBLEU asks to state beside a BLEU score: case, tokenisation, smoothing, version."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenize, force=True)
    metric.corpus_score(["a b c d"], [["a b c d"]])
    return str(metric.get_signature()).partition("|")[2]  # the number of references is the data's


def chrf(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Returns sacreBLEU's chrF2 over all texts, from 0 to 100.

    Raises:
        DataError: No text, or one without a reference.

    >>> chrf(["a red house"], [["a red house", "one house"]])
    100.0
    """
    from sacrebleu.metrics import CHRF

    _check_pairs(texts, references)
    return float(CHRF().corpus_score(list(texts), _streams(references)).score)


def rouge(text: str, references: Sequence[str], kind: RougeKind, language: Language = "en") -> float:
    """Returns the F-measure of ROUGE with the best of the references, as the package rouge-score computes it.

    >>> round(rouge("the cats sat", ["a cat sat down"], "rouge1"), 3)
    0.571
    """
    return float(_rouge_scorer(kind, language).score_multi(list(references), text)[kind].fmeasure)


class _Segments:
    """The tokeniser that rouge-score is given for Chinese; its own drops all but ASCII letters."""

    def tokenize(self, text: str) -> list[str]:
        return mixed_segments(text)


@lru_cache(maxsize=8)
def _rouge_scorer(kind: RougeKind, language: Language) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Segments()) if language == "zh" else RougeScorer([kind], use_stemmer=True)


def distinct_share(texts: Sequence[str], n: int = 3, language: Language = "en") -> float | None:
    """Returns how many different n-word sequences there are for each that stands in the texts; None where none does.

    >>> distinct_share(["this old town", "this old town", "this old house"])
    0.6666666666666666
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.lower().split() if language == "en" else mixed_segments(text)
        counts.update(zip(*(words[place:] for place in range(n)), strict=False))
    return len(counts) / counts.total() if counts else None


def unigram_f1(text: str, other: str, language: Language = "en") -> float:
    """Returns the F1 of the words of two texts, each counted as often as it occurs, without articles and punctuation.

    With the passage that a reply is grounded in, it is knowledge F1 (Shuster et al. 2021, "Retrieval augmentation
    reduces hallucination in conversation").

    >>> round(unigram_f1("it was made in 1955", "Kismet, made in 1955"), 3)
    0.667
    """
    left, right = Counter(words_of(text, language)), Counter(words_of(other, language))
    total = left.total() + right.total()
    return 2 * (left & right).total() / total if total else 1.0


def question_bleu(
    text: str,
    references: Sequence[str],
    *,
    weights: Mapping[WordKind, float] = ANSWERABILITY_WEIGHTS,
    delta: float = 0.7,
) -> float:
    """Returns Q-BLEU-1 of a generated question: ``delta`` answerability + (1 − ``delta``) BLEU-1; the best reference.

    Answerability (Nema and Khapra 2018, §4) is 2PR / (P + R), where precision P and recall R are weighted means over
    four kinds of words, each the share that both questions have: named entities, question words (with the word behind
    ``what`` and ``which``), content words and function words. As in the authors' script, a capitalised word stands for
    a named entity, and weights are those for SQuAD.

    Left open there and settled here: a word is of one kind only, in the order question, function, entity, content; a
    kind that neither question has does not count, so that equal questions score 1; words are runs of letters and
    digits, compared in lower case; their relevance lists for other data sets are not used.

    >>> question_bleu("Who wrote Dune?", ["Who wrote Dune?"])
    1.0
    >>> round(question_bleu("Who wrote it?", ["Who wrote Dune?"]), 3)
    0.41
    """
    return max(_question_bleu(text, reference, weights, delta) for reference in references)


def _question_bleu(text: str, reference: str, weights: Mapping[WordKind, float], delta: float) -> float:
    ours, theirs = _words_by_kind(text), _words_by_kind(reference)
    counted = {kind: weight for kind, weight in weights.items() if ours[kind] or theirs[kind]}
    total = sum(counted.values())
    if total == 0:
        return 1.0
    shared = {kind: (ours[kind] & theirs[kind]).total() for kind in counted}
    precision, recall = (
        sum(weight * shared[kind] / max(1, side[kind].total()) for kind, weight in counted.items()) / total
        for side in (ours, theirs)
    )
    answerability = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return delta * answerability + (1 - delta) * _sentence_bleu1(text, reference)


def _words_by_kind(question: str) -> dict[WordKind, Counter[str]]:
    kinds: dict[WordKind, Counter[str]] = {kind: Counter() for kind in get_args(WordKind)}
    before = ""
    for word in _WORD.findall(question):
        lower = word.lower()
        if lower in _QUESTION_WORDS or before in ("what", "which"):
            kinds["question"][lower] += 1
        elif lower in _FUNCTION_WORDS:
            kinds["function"][lower] += 1
        else:
            kinds["entity" if word[0].isupper() else "content"][lower] += 1
        before = lower
    return kinds


def _sentence_bleu1(text: str, reference: str) -> float:
    ours, theirs = (Counter(word.lower() for word in _WORD.findall(one)) for one in (text, reference))
    if not ours:
        return float(not theirs)
    brevity = min(1.0, float(torch.exp(torch.tensor(1 - theirs.total() / ours.total()))))
    return brevity * (ours & theirs).total() / ours.total()


def _check_pairs(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not texts or len(texts) != len(references) or not all(references):
        raise DataError(
            f"expected at least one text and references for each, came {len(texts)} texts and {len(references)} lists "
            "of references. Give each text at least one."
        )


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Returns the first reference of all, the second of all …, as sacreBLEU takes them, None where one has no more."""
    most = max(len(row) for row in references)
    return [[row[place] if place < len(row) else None for row in references] for place in range(most)]


class TextMetrics(Metric):
    """Figures of generated texts over all questions, whatever the batches and processes.

    ``compute`` returns a figure for each name asked for; one for which no question counts (no references, no known
    knowledge, no text of three words) is left out. It keeps the texts, as bytes, since BLEU and its like are no means
    over questions; so every figure is its library's over all texts together.

    Args:
        metrics: Which figures; see the module's table.
        language: How texts fall into words.

    Raises:
        ConfigError: An unknown name, or one twice.

    >>> metric = TextMetrics(metrics=["bleu", "rougeL"])
    >>> metric.update(["the red house by the sea"], [Question("1", "?", ("the red house by the sea",))])
    >>> {name: round(float(value), 3) for name, value in metric.compute().items()}
    {'bleu': 100.0, 'rougeL': 1.0}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    lines: list[Tensor]

    def __init__(self, *, metrics: Sequence[str], language: Language = "en") -> None:
        super().__init__()
        known = get_args(TextMetric)
        wrong = [name for name in metrics if name not in known]
        if wrong or len(set(metrics)) != len(metrics):
            raise ConfigError(f"text_metrics: expected each once, of {', '.join(known)}; came {', '.join(metrics)}.")
        if language not in get_args(Language):
            raise ConfigError(f"language: expected one of {', '.join(get_args(Language))}, came {language!r}.")
        self.names = tuple(metrics)
        self.language: Language = language
        self.add_state("lines", default=[], dist_reduce_fx="cat")

    @property
    def tokenize(self) -> str:
        """SacreBLEU's name of how BLEU parts words."""
        return "zh" if self.language == "zh" else "13a"

    def update(
        self, predictions: Sequence[str], questions: Sequence[Question], knowledge: Sequence[str | None] | None = None
    ) -> None:
        """Adds texts, one for each question.

        Args:
            predictions: What was generated.
            questions: With their answers.
            knowledge: What each text is to draw on; None where not known.

        Raises:
            DataError: Not as many texts as questions.
        """
        known: Sequence[str | None] = knowledge if knowledge is not None else [None] * len(questions)
        if not len(predictions) == len(questions) == len(known):
            raise DataError(
                f"expected one text and one piece of knowledge for each question, came {len(predictions)} and "
                f"{len(known)} for {len(questions)} questions."
            )
        records = [
            [text, question.answers, knows] for text, question, knows in zip(predictions, questions, known, strict=True)
        ]
        # a blank line first: a process without texts has something to send too
        data = "\n".join(["", *map(json.dumps, records), ""]).encode()
        self.lines.append(torch.tensor(list(data), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """Returns the figures over all texts added."""
        data = bytes(dim_zero_cat(self.lines).tolist()) if len(self.lines) else b""
        written = [
            Written(text, tuple(answers), knows)
            for text, answers, knows in map(json.loads, filter(None, data.splitlines()))
        ]
        figures = {name: self._figure(name, written) for name in self.names}
        return {
            name: torch.tensor(value, dtype=torch.float64).float()
            for name, value in figures.items()
            if value is not None
        }

    def _figure(self, name: str, written: Sequence[Written]) -> float | None:
        if name == "distinct3":
            return distinct_share([one.text for one in written], 3, self.language)
        if name == "knowledge_f1":
            return _mean([unigram_f1(one.text, one.knowledge, self.language) for one in written if one.knowledge])
        compared = [one for one in written if one.references]
        if not compared:
            return None
        texts, references = [one.text for one in compared], [one.references for one in compared]
        whole: dict[str, Callable[[], float]] = {
            "bleu": lambda: corpus_bleu(texts, references, tokenize=self.tokenize),
            "bleu1": lambda: corpus_bleu(texts, references, max_order=1, tokenize=self.tokenize),
            "chrf": lambda: chrf(texts, references),
        }
        if name in whole:
            return whole[name]()
        if name == "qbleu1":
            return _mean([question_bleu(one.text, one.references) for one in compared])
        kind: RougeKind = name  # type: ignore[assignment]
        return _mean([rouge(one.text, one.references, kind, self.language) for one in compared])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
