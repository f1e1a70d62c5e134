"""Figures of texts against sacreBLEU, rouge-score and sums done by hand; batches and processes change nothing."""

import inspect
import itertools

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.metrics.text import (
    TextMetrics,
    bleu_signature,
    chrf,
    corpus_bleu,
    distinct_share,
    question_bleu,
    rouge,
    unigram_f1,
)
from rag_lightning.types import Question

WORDS = "the a red house stands sat by sea town old new , . Dune".split()
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
pairs = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=1, max_size=6)
ALL = ["bleu", "bleu1", "chrf", "rouge1", "rouge2", "rougeL", "distinct3", "qbleu1", "knowledge_f1"]


def streams(references):
    return [list(stream) for stream in itertools.zip_longest(*references)]


def measured(examples, metrics=ALL, language="en", sizes=None, knowledge=None):
    metric = TextMetrics(metrics=metrics, language=language)
    sizes = sizes if sizes is not None else [len(examples)]
    places = list(itertools.accumulate(sizes, initial=0))
    for start, end in itertools.pairwise(places):
        part = examples[start:end]
        questions = [Question(str(n), "?", tuple(references)) for n, (_, references) in enumerate(part)]
        metric.update([text for text, _ in part], questions, None if knowledge is None else knowledge[start:end])
    return {name: float(value) for name, value in metric.compute().items()}


@given(pairs)
@settings(max_examples=30)
def test_bleu_and_chrf_are_sacrebleus(examples):
    texts, references = [text for text, _ in examples], [list(row) for _, row in examples]
    figures = measured(examples, ["bleu", "bleu1", "chrf"])
    assert figures["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams(references)).score, rel=1e-6)
    assert figures["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams(references)).score, rel=1e-6)
    one = sacrebleu.metrics.BLEU(max_ngram_order=1).corpus_score(texts, streams(references)).score
    assert figures["bleu1"] == pytest.approx(one, rel=1e-6)


@given(pairs)
@settings(max_examples=30)
def test_rouge_is_the_best_reference_of_rouge_score(examples):
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    figures = measured(examples, kinds)
    for kind in kinds:
        best = [max(scorer.score(one, text)[kind].fmeasure for one in references) for text, references in examples]
        assert figures[kind] == pytest.approx(sum(best) / len(best), rel=1e-6)


@given(pairs, st.data())
@settings(max_examples=20)
def test_neither_batches_nor_processes_change_a_figure(examples, data):
    cut = data.draw(st.integers(0, len(examples)))
    knowledge = [references[0] for _, references in examples]
    whole = measured(examples, knowledge=knowledge)
    assert measured(examples, sizes=[cut, len(examples) - cut], knowledge=knowledge) == whole
    parts = []
    for part, known in ((examples[:cut], knowledge[:cut]), (examples[cut:], knowledge[cut:])):
        metric = TextMetrics(metrics=ALL)
        metric.update([t for t, _ in part], [Question("1", "?", tuple(r)) for _, r in part], known)
        parts.append(metric)
    gathered = TextMetrics(metrics=ALL)
    gathered.lines = torch.cat([line for metric in parts for line in metric.lines])  # as a synchronisation leaves it
    gathered._update_count = 1
    assert {name: float(value) for name, value in gathered.compute().items()} == pytest.approx(whole)


def test_chinese_is_parted_into_characters():
    texts, references = ["安娜导演了雪。", "它在2004年上映"], [["安娜导演过雪。"], ["它于2004年上映"]]
    expected = sacrebleu.corpus_bleu(texts, streams(references), tokenize="zh").score
    assert expected > 0
    examples = list(zip(texts, references, strict=True))
    figures = measured(examples, ["bleu", "rouge1", "rougeL", "distinct3"], language="zh")
    assert figures["bleu"] == pytest.approx(expected, rel=1e-6)
    assert figures["rouge1"] == pytest.approx((5 / 6 + 5 / 6) / 2)
    assert rouge("安娜", ["安娜"], "rouge1", "en") == 0.0  # the package alone drops what is not ASCII
    assert "tok:zh" in bleu_signature("zh")
    assert "tok:13a" in bleu_signature()


def test_distinct_trigrams_are_counted_over_all_texts():
    assert distinct_share(["a b c d", "a b c"]) == 2 / 3
    assert distinct_share(["a b", ""]) is None
    assert distinct_share(["a a a a"], n=1) == 1 / 4


def test_knowledge_f1_counts_words_of_what_is_known_alone():
    assert unigram_f1("The year was 1955.", "made in 1955") == pytest.approx(2 * 1 / 6)
    assert unigram_f1("安娜导演", "导演：安娜", "zh") == 1.0
    known = ["made in 1955", None]
    figures = measured([("the year was 1955", ["x"]), ("no", ["x"])], ["knowledge_f1"], knowledge=known)
    assert figures["knowledge_f1"] == pytest.approx(2 * 1 / 6)
    assert measured([("no", ["x"])], ["knowledge_f1"]) == {}


def test_question_bleu_weighs_entities_most():
    reference = ["Who directed the film Kismet in 1955?"]
    assert question_bleu(reference[0], reference) == pytest.approx(1.0)
    without_name = question_bleu("Who directed the film Dune in 1955?", reference)
    without_the = question_bleu("Who directed a film Kismet in 1955?", reference)
    assert without_name < without_the < 1.0
    # question 1/1 0.2; function (the, in) 2/2 0.1; entity 0/1 0.6; content (directed, film, 1955) 3/3 0.1; BLEU-1 6/7
    assert without_name == pytest.approx(0.7 * 0.4 + 0.3 * 6 / 7)
    assert question_bleu("", reference) == 0.0
    assert question_bleu("dogs", ["Who?", "dogs"]) == 1.0


def test_what_follows_what_and_which_is_of_the_question_word():
    # counted: question (what, year) and entity (Kismet) of the reference; the text lacks the entity
    assert question_bleu("What year?", ["What year Kismet?"], delta=1.0) == pytest.approx(0.25)


def test_figures_for_which_no_question_counts_are_left_out():
    metric = TextMetrics(metrics=ALL)
    metric.update([], [])
    assert metric.compute() == {}
    metric.update(["one two three"], [Question("1", "?", (), answer_regex="one")])
    assert set(metric.compute()) == {"distinct3"}


def test_wrong_settings_and_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"text_metrics: expected each once, of bleu, .*; came bleu, blue"):
        TextMetrics(metrics=["bleu", "blue"])
    with pytest.raises(ConfigError, match="each once"):
        TextMetrics(metrics=["bleu", "bleu"])
    initialise = inspect.unwrap(TextMetrics.__init__)  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match="language: expected one of en, zh, came 'fr'"):
        initialise(TextMetrics.__new__(TextMetrics), metrics=["bleu"], language="fr")
    with pytest.raises(DataError, match="came 1 and 0 for 0 questions"):
        TextMetrics(metrics=["bleu"]).update(["a"], [])
    for wrong in (lambda: corpus_bleu([], []), lambda: chrf(["a"], [[]])):
        with pytest.raises(DataError, match="expected at least one text and references for each"):
            wrong()
