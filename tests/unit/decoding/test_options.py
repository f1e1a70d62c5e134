import json
from dataclasses import asdict

import pytest
import torch

from rag_lightning.decoding.options import DecodingOptions, check_inputs, trimmed
from rag_lightning.errors import ConfigError
from tests.unit.decoding.table_generator import TableGenerator


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected 0 to"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "expected 0 to max_new_tokens = 4, got 5"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a finite number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected 0 or more"),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id: expected a token id"),
        ({"forced_bos_token_id": 0, "max_new_tokens": 1}, "at least 2 where forced_bos_token_id is set"),
        ({"temperature": 0.0}, r"temperature: expected a number > 0 \(greedy search is sample=false\), got 0\.0"),
        ({"sample": True, "temperature": -0.5}, "temperature: expected a number > 0"),
        ({"sample": True, "temperature": float("inf")}, "temperature: expected a number > 0"),
        ({"sample": True, "top_p": 0.0}, "top_p: expected more than 0 and at most 1"),
        ({"sample": True, "top_p": 1.5}, r"top_p: .*, got 1\.5"),
        ({"sample": True, "top_k": -1}, "top_k: expected 0"),
        ({"seed": -1}, "seed: expected 0 or more"),
        ({"num_return": 0}, "num_return: expected at least 1"),
        ({"num_return": 3, "num_beams": 2}, "num_return: expected at most num_beams = 2 answers of a search, got 3"),
        ({"sample": True, "num_beams": 4}, "sample and num_beams exclude each other: got sample=True, num_beams=4"),
        ({"temperature": 0.7}, r"temperature=0\.7, top_k=0, top_p=1\.0: expected them with sample=true"),
        ({"top_k": 5}, "expected them with sample=true, got sample=False, where they would do nothing"),
        ({"top_p": 0.9}, "expected them with sample=true"),
        ({"stop": "."}, r"stop: expected a list of non-empty strings, got '\.'"),
        ({"stop": (".", "")}, "stop: expected a list of non-empty strings"),
        ({"stop": (".",), "allowed": "f.txt"}, "allowed and stop exclude each other: a stop string would cut"),
    ],
)
def test_impossible_options_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DecodingOptions(**settings)


def test_zero_is_a_token_id():
    assert DecodingOptions(forced_bos_token_id=0).forced_bos_token_id == 0


def test_lists_of_a_file_become_tuples():
    options = DecodingOptions(stop=[".", "!"])
    assert options.stop == (".", "!")
    assert options == DecodingOptions(**json.loads(json.dumps(asdict(options))))
    assert hash(options) == hash(DecodingOptions(stop=(".", "!")))


def test_many_answers_may_be_drawn_though_no_beam_holds_them():
    assert DecodingOptions(sample=True, num_return=9).num_return == 9


def test_trimming_keeps_two_columns():
    assert trimmed(torch.tensor([[1, 0, 0]]), pad_token_id=0).tolist() == [[1, 0]]


@pytest.fixture
def generator():
    return TableGenerator.random(num_contexts=6, vocab_size=5, max_tokens=1, seed=0)


def test_contexts_that_are_not_questions_times_passages_are_refused(generator):
    with pytest.raises(ConfigError, match=r"expected 2 questions x 2 passages = 4 contexts, got 6"):
        check_inputs(generator, generator.contexts, torch.full((2, 2), 0.5).log(), DecodingOptions())


@pytest.mark.parametrize("scores", [torch.full((2, 3), 75.0), torch.full((2, 3), -torch.inf)])
def test_raw_scores_are_not_a_prior(generator, scores):
    with pytest.raises(ConfigError, match=r"pass losses\.marginal\.doc_log_prior"):
        check_inputs(generator, generator.contexts, scores, DecodingOptions())


def test_a_nan_prior_is_refused(generator):
    with pytest.raises(ConfigError, match="log of a distribution"):
        check_inputs(generator, generator.contexts, torch.full((2, 3), torch.nan), DecodingOptions())


def test_forced_tokens_must_be_in_the_vocabulary(generator):
    prior = torch.full((2, 3), 1 / 3).log()
    check_inputs(generator, generator.contexts, prior, DecodingOptions(forced_eos_token_id=4))
    with pytest.raises(ConfigError, match="forced_eos_token_id = 5 is outside the generator's vocabulary of 5"):
        check_inputs(generator, generator.contexts, prior, DecodingOptions(forced_eos_token_id=5))
