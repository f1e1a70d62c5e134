"""Decoding within a set of allowed answers, against the best of the set by enumeration."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rag_lightning.decoding.constraints import OutputRules
from rag_lightning.decoding.decode import decode
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.decoding.trie import TokenTrie, read_allowed
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from tests.unit.decoding.table_generator import EOS, START, TableGenerator, answer, random_prior

VOCAB, MAX_TOKENS = 7, 4
ENTITIES = [(3, 4, EOS), (3, EOS), (3, 4, 5, EOS), (6, 6, EOS), (5, EOS), (6, 3, 3, EOS)]
ANY_ANSWERS = st.lists(
    st.lists(st.integers(3, VOCAB - 1), max_size=5).map(lambda body: (*body, EOS)), min_size=1, max_size=12
)


def trie_of(entities):
    return TokenTrie.from_tokens([[START, *tokens] for tokens in entities], VOCAB)


@settings(max_examples=60, deadline=None)
@given(answers=ANY_ANSWERS, others=ANY_ANSWERS)
def test_what_may_follow_equals_a_set_of_prefixes(answers, others):
    trie = trie_of(answers)
    for tokens in [*answers, *others]:
        for length in range(len(tokens)):
            prefix = tokens[:length]
            expected = {y[length] for y in answers if len(y) > length and y[:length] == prefix}
            found = trie.next_tokens(torch.tensor([[START, *prefix]]), VOCAB)[0]
            assert set(found.nonzero().flatten().tolist()) == expected


def test_rows_of_a_batch_are_looked_up_each_for_itself():
    prefixes = torch.tensor([[START, 3], [START, 4], [START, 6], [EOS, 3]])
    found = trie_of(ENTITIES).next_tokens(prefixes, VOCAB)
    assert [set(row.nonzero().flatten().tolist()) for row in found] == [{4, EOS}, set(), {6, 3}, set()]


def test_many_answers_cost_one_edge_for_each_new_prefix():
    answers = [(START, 3 + i // 100, 3 + i // 10 % 10, 3 + i % 10, EOS) for i in range(1000)]
    trie = TokenTrie.from_tokens(answers, vocab_size=20)
    assert len(trie.edges_E) == 1 + 10 + 100 + 1000 + 1000
    assert bool((trie.edges_E.diff() > 0).all())


def log_prob(generator, mode, contexts, prior, tokens):
    of_sequence = mode in ("rag_sequence_fast", "rag_sequence_thorough")
    return getattr(generator, "rag_sequence_log_prob" if of_sequence else "rag_token_log_prob")(contexts, prior, tokens)


@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_fast", "rag_sequence_thorough"])
@pytest.mark.parametrize("seed", range(5))
def test_a_beam_over_all_entities_returns_them_in_the_order_of_enumeration(mode, seed):
    generator = TableGenerator.random(num_contexts=6, vocab_size=VOCAB, max_tokens=MAX_TOKENS, seed=seed)
    prior = random_prior(2, 3, seed)
    options = DecodingOptions(num_beams=6, max_new_tokens=MAX_TOKENS, num_return=6, length_penalty=0.0)
    rules = OutputRules(allowed=trie_of(ENTITIES))
    decoded = decode(generator, generator.contexts, prior, options, mode=mode, rules=rules)
    for question in range(2):
        contexts = range(3 * question, 3 * question + 3)
        true = {y: log_prob(generator, mode, contexts, prior[question], y) for y in ENTITIES}
        ranked = sorted(true, key=true.get, reverse=True)
        assert [answer(row) for row in decoded.nbest_BRT[question]] == ranked
        assert answer(decoded.sequences_BT[question]) == ranked[0]
        expected = [true[y] for y in ranked]
        assert decoded.nbest_log_likelihood_BR[question].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_fast", "rag_sequence_thorough"])
def test_greedy_and_narrow_beams_stay_within_the_set(mode, num_beams):
    for seed in range(8):
        generator = TableGenerator.random(num_contexts=4, vocab_size=VOCAB, max_tokens=MAX_TOKENS, seed=seed)
        options = DecodingOptions(num_beams=num_beams, max_new_tokens=MAX_TOKENS, num_return=num_beams)
        rules = OutputRules(allowed=trie_of(ENTITIES))
        prior = random_prior(2, 2, seed)
        decoded = decode(generator, generator.contexts, prior, options, mode=mode, rules=rules)
        assert {answer(row) for row in decoded.sequences_BT} <= set(ENTITIES)
        assert decoded.log_likelihood_B.isfinite().all()


@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_thorough", "fid"])
def test_samples_stay_within_the_set_and_reach_all_of_it(mode):
    generator = TableGenerator.random(num_contexts=2, vocab_size=VOCAB, max_tokens=MAX_TOKENS, seed=1, sharpness=0.5)
    options = DecodingOptions(sample=True, max_new_tokens=MAX_TOKENS, num_return=200)
    rules = OutputRules(allowed=trie_of(ENTITIES))
    decoded = decode(generator, generator.contexts, random_prior(1, 2, 1), options, mode=mode, rules=rules)
    found = {answer(row) for row in decoded.nbest_BRT[0]}
    assert found == {*ENTITIES, ()}, "every entity, and the places that repeats left empty"


def test_a_forced_first_token_does_not_lead_out_of_the_set():
    generator = TableGenerator.random(num_contexts=1, vocab_size=VOCAB, max_tokens=MAX_TOKENS, seed=0)
    rules = OutputRules(allowed=trie_of(ENTITIES))
    options = DecodingOptions(max_new_tokens=MAX_TOKENS, forced_bos_token_id=6)
    decoded = decode(generator, generator.contexts, torch.zeros(1, 1), options, mode="rag_token", rules=rules)
    assert answer(decoded.sequences_BT[0]) in [(6, 6, EOS), (6, 3, 3, EOS)]
    options = DecodingOptions(max_new_tokens=MAX_TOKENS, forced_bos_token_id=4)  # begins none of them
    decoded = decode(generator, generator.contexts, torch.zeros(1, 1), options, mode="rag_token", rules=rules)
    assert answer(decoded.sequences_BT[0]) == ()
    assert decoded.log_likelihood_B.tolist() == [-math.inf]


def test_a_trie_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="expected a trie of the generator's vocabulary of 9 tokens, came one of 7"):
        trie_of(ENTITIES).next_tokens(torch.tensor([[START]]), 9)


# ---------------------------------------------------------------------- from texts

WORDS = {"ada": 3, "ash": 4, "eve": 5}


def words(texts):
    rows = [[WORDS[word] for word in text.split() if word in WORDS] for text in texts]
    return [[START, *row, EOS] if row else [] for row in rows]


def from_texts(texts, max_new_tokens=3):
    return TokenTrie.from_texts(texts, words, vocab_size=VOCAB, max_new_tokens=max_new_tokens, source="names.txt")


def test_texts_become_their_tokens():
    built = from_texts(["ada ash", "eve", "ada ash"])
    assert torch.equal(built.edges_E, trie_of([(3, 4, EOS), (5, EOS)]).edges_E)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ada", "  "], r"names\.txt, line 2: expected an allowed answer, came '  '\. Remove the line"),
        (
            ["ada", "eve", "zzz"],
            r"names\.txt, line 3: expected an answer that .* came 'zzz', of which it knows no token",
        ),
        (["ada ash eve"], r"line 1: expected at most max_new_tokens = 3 tokens, came 'ada ash eve' of 4\. Raise"),
        ([], r"names\.txt: expected one allowed answer on each line, came none"),
    ],
)
def test_an_entry_that_cannot_be_written_is_named(texts, message):
    with pytest.raises(DataError, match=message):
        inspect.unwrap(from_texts)(texts)


def test_a_file_of_answers_is_its_lines(tmp_path):
    place = tmp_path / "names.txt"
    place.write_bytes("\ufeffAda Ash\r\nZoë\u2028Y\n\nEve".encode())
    assert read_allowed(place) == ["Ada Ash", "Zoë\u2028Y", "", "Eve"]
    place.write_bytes(b"Ada\nZo\xeb\n")
    with pytest.raises(DataError, match=r"names\.txt: expected UTF-8 text, .* came byte 0xeb at offset 6"):
        read_allowed(place)
    with pytest.raises(MissingFileError, match=r"decoding\.allowed"):
        read_allowed(tmp_path / "none.txt")
