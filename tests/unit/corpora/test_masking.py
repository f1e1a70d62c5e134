"""Questions made by masking: what is taken out fits back in."""

import random
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rag_lightning.corpora.masking import corrupt_spans, mask_salient_span
from rag_lightning.errors import ConfigError
from rag_lightning.types import Passage

TEXT = "Kismet is a film of 1955. It was made by Vincente Minnelli. J. Ford stars, and J. Ford sings."
FILM = Passage("1", "Kismet", TEXT)
QUESTIONS = {
    ("<mask> is a film of 1955.", "Kismet"),
    ("Kismet is a film of <mask>.", "1955"),
    ("It was made by <mask>.", "Vincente Minnelli"),
    ("<mask> stars, and <mask> sings.", "J. Ford"),
}
SEEDS = st.integers(0, 10_000)


def test_one_salient_span_is_masked_and_all_are_met():
    rng = random.Random(0)
    assert {mask_salient_span(FILM, rng) for _ in range(100)} == QUESTIONS


@given(SEEDS)
def test_the_answer_in_the_hole_is_a_sentence_of_the_passage(seed):
    question, answer = mask_salient_span(FILM, random.Random(seed), mask="[HOLE]")
    assert question.replace("[HOLE]", answer) in TEXT
    assert answer not in question


def test_the_title_goes_before_a_sentence_that_does_not_ask_for_it():
    rng = random.Random(0)
    met = {mask_salient_span(FILM, rng, with_title=True)[0] for _ in range(100)}
    assert "<mask> is a film of 1955." in met
    assert "Kismet: It was made by <mask>." in met
    assert len(met) == 4


def test_kinds_choose_and_a_passage_without_any_gives_none():
    rng = random.Random(0)
    assert {mask_salient_span(FILM, rng, kinds=["date"])[1] for _ in range(20)} == {"1955"}
    assert mask_salient_span(Passage("2", "", "nothing to see here."), rng) is None
    assert mask_salient_span(Passage("2", "", "John <mask> Ford."), rng) is None
    numbered = Passage("3", "", "it has 12 songs.")
    assert mask_salient_span(numbered, rng, kinds=["number"]) == ("it has <mask> songs.", "12")


WORDS = st.lists(st.sampled_from(["a", "Ford,", "x1", "(Kay)", "—", "it."]), min_size=2, max_size=60)


@given(WORDS, st.sampled_from([" ", "  ", "\n"]), SEEDS, st.floats(0.01, 0.99), st.floats(1.0, 8.0))
def test_the_spans_in_the_holes_give_the_text_back(words, space, seed, share, mean):
    text = f"{space}{space.join(words)}{space}"
    question, answer = corrupt_spans(text, random.Random(seed), mask="<m>", mask_share=share, mean_span_words=mean)
    holes, spans = question.split("<m>"), answer.split(" <m> ")
    assert len(holes) == len(spans) + 1
    filled = holes[0] + "".join(span + rest for span, rest in zip(spans, holes[1:], strict=True))
    assert filled == text
    assert all(re.search(r"\S", kept) for kept in holes[1:-1])  # a word at least between two holes
    masked = sum(len(span.split()) for span in spans)
    assert masked == min(max(1, round(share * len(words))), len(words) - 1)
    assume(masked < len(words) / 2)
    assert len(spans) == max(1, round(masked / mean))


def test_lengths_and_places_are_drawn_evenly():
    rng, starts, lengths = random.Random(0), [0] * 20, []
    text = " ".join(f"w{place}" for place in range(20))
    for _ in range(4000):
        _, answer = corrupt_spans(text, rng, mask_share=0.3, mean_span_words=3.0)
        for span in answer.split(" <mask> "):
            lengths.append(len(span.split()))
            for word in span.split():
                starts[int(word[1:])] += 1
    assert sum(lengths) / len(lengths) == 3.0
    assert {*lengths} == {1, 2, 3, 4, 5}
    shares = [count / 4000 for count in starts]
    assert min(shares[2:-2]) > 0.25  # every word is met, inner ones about as often as asked
    assert min(shares) > 0.1


def test_texts_without_room_give_none_and_settings_are_checked():
    rng = random.Random(0)
    assert corrupt_spans("word", rng) is None
    assert corrupt_spans("a <mask> b", rng) is None
    with pytest.raises(ConfigError, match="expected mask_share between 0 and 1, came 1"):
        corrupt_spans("a b", rng, mask_share=1.0)
    with pytest.raises(ConfigError, match="mean_span_words of at least 1, came 0.5"):
        corrupt_spans("a b", rng, mean_span_words=0.5)
    for make in (lambda: corrupt_spans("a b", rng, mask=" "), lambda: mask_salient_span(FILM, rng, mask="")):
        with pytest.raises(ConfigError, match="expected a sign that stands for a hole"):
            make()
    with pytest.raises(ConfigError, match="expected kinds among .* came"):
        mask_salient_span(FILM, rng, kinds=())
