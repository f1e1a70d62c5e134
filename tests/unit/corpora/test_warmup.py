import random
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rag_lightning.corpora.warmup import inverse_cloze, rare_words, span_copy, substitute_entities
from rag_lightning.errors import ConfigError, DataError
from rag_lightning.types import Passage

FILM = Passage(
    "1", "Kismet", "Kismet is a film of 1955. It was directed by Vincente Minnelli. J. Ford and Dr. No star in it!"
)
SENTENCES = ["Kismet is a film of 1955.", "It was directed by Vincente Minnelli.", "J. Ford and Dr. No star in it!"]
SEEDS = st.integers(0, 10_000)
TEXTS = st.lists(
    st.sampled_from(["ab", "Ford", "x1", "(Kay)", "1955,", "o'Brien", "--", "it.", "THE"]), min_size=1
).map(" ".join)


@settings(deadline=None)
@given(SEEDS)
def test_inverse_cloze_takes_one_sentence_out(seed):
    question, rest = inverse_cloze(FILM, random.Random(seed), keep_probability=0.0)
    assert question in SENTENCES
    assert rest == " ".join(sentence for sentence in SENTENCES if sentence != question)


def test_inverse_cloze_takes_every_sentence_at_times():
    rng = random.Random(0)
    assert {inverse_cloze(FILM, rng)[0] for _ in range(50)} == set(SENTENCES)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_inverse_cloze_keeps_the_sentence_as_often_as_asked(probability):
    rng = random.Random(0)
    kept = sum(question in rest for question, rest in (inverse_cloze(FILM, rng, probability) for _ in range(2000)))
    assert kept / 2000 == pytest.approx(probability, abs=0.03)


def test_a_single_sentence_is_kept():
    passage = Passage("1", "T", " Only one sentence. ")
    assert inverse_cloze(passage, random.Random(0), 0.0) == ("Only one sentence.", "Only one sentence.")


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_inverse_cloze_refuses_no_probability(probability):
    with pytest.raises(ConfigError, match=f"keep_probability between 0 and 1, came {probability}"):
        inverse_cloze(FILM, random.Random(0), probability)


@settings(deadline=None)
@given(TEXTS, SEEDS, st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.0, 0.5, 1.0]))
def test_span_copy_filled_in_is_a_run_of_the_passage(text, seed, max_words, context, salient):
    assume(re.search(r"\w", text))
    question, answer = span_copy(
        Passage("1", "T", text),
        random.Random(seed),
        mask="<mask>",
        max_span_words=max_words,
        context_words=context,
        salient_probability=salient,
    )
    assert question.count("<mask>") == 1
    assert question.replace("<mask>", answer) in text
    assert 1 <= len(answer.split()) <= max_words
    assert answer[0].isalnum()
    assert answer[-1].isalnum()
    before, after = question.split("<mask>")
    assert len(before.split()) <= context + 1  # a bracket or quote may stand at the hole
    assert len(after.split()) <= context + 1


def test_span_copy_asks_for_names_and_years_when_told():
    rng = random.Random(0)
    answers = {span_copy(FILM, rng, salient_probability=1.0)[1] for _ in range(200)}
    assert answers == {"Kismet", "1955", "It", "Vincente Minnelli", "J", "Ford", "Dr", "No"}


def test_span_copy_errors():
    with pytest.raises(DataError, match="expected a passage with words, came passage '9': '-- !'"):
        span_copy(Passage("9", "T", "-- !"), random.Random(0))
    with pytest.raises(ConfigError, match="at least 1, came 0 and 6"):
        span_copy(FILM, random.Random(0), max_span_words=0)


POOL = ["zulu", "yankee", "xray", "whisky", "victor", "uniform", "1901", "1902"]


def test_substitution_is_alike_in_all_three_and_keeps_the_form():
    passage = 'KISMET (1955) is "Kismet" by Vincente McDonald, the film.'
    rare = {"kismet", "mcdonald", "1955"}.__contains__
    new_passage, question, answer = substitute_entities(
        passage, "who made kismet?", "McDonald", rare, POOL, random.Random(3)
    )
    name = question.removeprefix("who made ").removesuffix("?")
    assert name in POOL[:6]
    assert answer.lower() in POOL[:6]
    assert answer.lower() != name
    year = new_passage.split("(")[1][:4]
    assert year in POOL[6:]
    assert (
        new_passage == f'{name.upper()} ({year}) is "{name.capitalize()}" by Vincente {answer.capitalize()}, the film.'
    )


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.sets(st.sampled_from(["ab", "ford", "kay", "brien", "x1", "it"])), SEEDS)
def test_substitution_is_one_mapping_of_words(passage, question, answer, rare, seed):
    texts = (passage, question, answer)
    renamed = substitute_entities(passage, question, answer, rare.__contains__, POOL, random.Random(seed))
    words = [re.findall(r"[A-Za-z0-9]+", text.lower()) for text in texts]
    names = [re.findall(r"[A-Za-z0-9]+", text.lower()) for text in renamed]
    pairs = {pair for old, new in zip(words, names, strict=True) for pair in zip(old, new, strict=True)}
    assert len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
    assert all((new in POOL) if old in rare else (new == old) for old, new in pairs)
    shapes = [[re.sub(r"[A-Za-z0-9]+", "w", text) for text in each] for each in (texts, renamed)]
    assert shapes[0] == shapes[1]


def test_a_name_never_occurs_in_the_texts_already():
    for seed in range(20):
        new, _, _ = substitute_entities(
            "kismet zulu", "", "", {"kismet"}.__contains__, ["zulu", "xray"], random.Random(seed)
        )
        assert new == "xray zulu"


def test_a_number_without_numbers_in_the_pool_stays():
    new = substitute_entities(
        "1955 ford", "q", "1955", lambda word: word in {"1955", "ford"}, ["zulu"], random.Random(0)
    )
    assert new == ("1955 zulu", "q", "1955")


@pytest.mark.parametrize("pool", [[], ["zulu", "Zulu"], ["1901", "zulu"]])
def test_a_pool_too_small_is_refused(pool):
    with pytest.raises(ConfigError, match=rf"each of 2 rare words .* came a pool of {len(pool)}"):
        substitute_entities("kismet ford", "", "", {"kismet", "ford"}.__contains__, pool, random.Random(0))


def test_equal_seeds_give_equal_examples():
    def draw():
        rng = random.Random(5)
        rare = {"kismet", "minnelli"}.__contains__
        return inverse_cloze(FILM, rng), span_copy(FILM, rng), substitute_entities(FILM.text, "q", "a", rare, POOL, rng)

    assert draw() == draw()


def test_rare_words_counts_without_case():
    texts = ["The cat, the CAT and the dog's 1955", "a dog"]
    assert rare_words(texts, 1) == ["1955", "a", "and", "s"]
    assert rare_words(texts, 2) == ["1955", "a", "and", "cat", "dog", "s"]
    with pytest.raises(ConfigError, match="max_count of at least 1, came 0"):
        rare_words(texts, 0)
