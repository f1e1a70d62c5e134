"""The decoders return what transformers returns on tiny random models, and differ where the docstrings say."""

from typing import Any

import pytest
import torch

from rag_lightning.decoding.options import Decoded, DecodingOptions
from rag_lightning.decoding.rag_sequence import decode_rag_sequence
from rag_lightning.decoding.rag_token import decode_rag_token
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.types import TokenBatch
from tests.parity.hf_rag import (
    FAMILIES,
    Family,
    RagInputs,
    answers,
    hf_rag_model,
    tiny_bart_config,
    tiny_t5_config,
)

NUM_QUESTIONS, NUM_PASSAGES, MAX_NEW_TOKENS = 4, 3, 8
# (seed, eos_shift) of models whose answers have several lengths
MODELS = {"bart": ((0, 1.0), (1, 0.0), (4, 0.0)), "t5": ((0, 1.0), (2, 1.0), (3, 3.0))}
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 4},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "min_new_tokens": 3},
    {"num_beams": 2, "no_repeat_ngram_size": 2},
]
FORCED: dict[str, list[dict[str, int]]] = {
    "bart": [{}, {"forced_bos_token_id": 0, "forced_eos_token_id": 2}],
    "t5": [{}, {"forced_eos_token_id": 1}],
}
CASES = [(family, search, forced) for family in FAMILIES for search in SEARCHES for forced in FORCED[family]]


def config_of(family: Family) -> Any:
    return tiny_bart_config() if family == "bart" else tiny_t5_config()


def ours(model: Any, inputs: RagInputs, options: DecodingOptions, sequence: bool) -> Decoded:
    generator = Seq2SeqGenerator(model=model.generator)
    prior = doc_log_prior(inputs.doc_scores)
    with torch.no_grad():
        encoded = generator.encode(TokenBatch(inputs.context_input_ids, inputs.context_attention_mask))
    if sequence:
        return decode_rag_sequence(generator, encoded, prior, options, thorough=True)
    return decode_rag_token(generator, encoded, prior, options)


def hf_options(options: dict[str, Any]) -> dict[str, Any]:
    # transformers' RAG-Token knows only max_length, which counts the start token
    return {**options, "max_length": 1 + MAX_NEW_TOKENS}


def mend_search(model: Any) -> None:
    """Makes transformers' inner search mask the contexts' padding, and pad T5's beams with padding."""
    config = model.generator.config
    search = model.generator.generate

    def generate(context_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        options["attention_mask"] = context_ids.ne(config.pad_token_id).long()
        found = search(context_ids, **options)
        ends = (found[:, 1:] == config.eos_token_id).long()
        found[:, 1:] = found[:, 1:].masked_fill(ends.cumsum(1) - ends > 0, config.pad_token_id)
        return found

    model.generator.generate = generate


def assert_same_answers(
    family: Family, options: dict[str, Any], sequence: bool, dtype: torch.dtype = torch.float64
) -> None:
    config = config_of(family)
    lengths = set()
    for seed, eos_shift in MODELS[family]:
        model = hf_rag_model(sequence, config, num_passages=NUM_PASSAGES, seed=seed, eos_shift=eos_shift, dtype=dtype)
        if sequence:
            mend_search(model)
        inputs = RagInputs.random(
            batch_size=NUM_QUESTIONS,
            num_passages=NUM_PASSAGES,
            pad_token_id=config.pad_token_id,
            seed=seed,
            dtype=dtype,
        )
        expected = answers(inputs.generate(model, **hf_options(options)), config.pad_token_id, config.eos_token_id)
        decoded = ours(model, inputs, DecodingOptions(max_new_tokens=MAX_NEW_TOKENS, **options), sequence)
        assert answers(decoded.sequences_BT, config.pad_token_id, config.eos_token_id) == expected
        lengths |= {len(tokens) for tokens in expected}
    assert len(lengths) > 1, "the case must have answers of several lengths"


@pytest.mark.parametrize(("family", "search", "forced"), CASES)
def test_rag_token_equals_transformers(family, search, forced):
    assert_same_answers(family, {**search, **forced}, sequence=False)


@pytest.mark.parametrize(("family", "search", "forced"), CASES)
def test_rag_sequence_thorough_equals_transformers(family, search, forced):
    # an answer of one scored token is judged without its prior there; see the test of that difference
    min_new_tokens = max(search.get("min_new_tokens", 0), 1 + ("forced_bos_token_id" in forced))
    assert_same_answers(family, {**search, **forced, "min_new_tokens": min_new_tokens}, sequence=True)


@pytest.mark.parametrize("sequence", [False, True], ids=["rag_token", "rag_sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_precision_gives_the_same_answers_too(family, sequence):
    assert_same_answers(family, {"num_beams": 4, "min_new_tokens": 1}, sequence, dtype=torch.float32)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_thorough_equals_transformers_as_it_is_where_contexts_have_no_padding(num_beams):
    config = tiny_bart_config()
    for seed, eos_shift in MODELS["bart"]:
        model = hf_rag_model(True, config, num_passages=NUM_PASSAGES, seed=seed, eos_shift=eos_shift)
        padded = RagInputs.random(batch_size=3, num_passages=NUM_PASSAGES, pad_token_id=1, seed=seed)
        ids = padded.context_input_ids.masked_fill(padded.context_attention_mask == 0, 7)
        inputs = RagInputs(ids, torch.ones_like(ids), padded.doc_scores)
        options = {"num_beams": num_beams, "min_new_tokens": 1}
        expected = answers(inputs.generate(model, **hf_options(options)), 1, 2)
        decoded = ours(model, inputs, DecodingOptions(max_new_tokens=MAX_NEW_TOKENS, **options), True)
        assert answers(decoded.sequences_BT, 1, 2) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_thorough_likelihood_equals_transformers_loss(family):
    config = config_of(family)
    model = hf_rag_model(True, config, num_passages=NUM_PASSAGES, seed=1, eos_shift=2.0)
    inputs = RagInputs.random(
        batch_size=NUM_QUESTIONS, num_passages=NUM_PASSAGES, pad_token_id=config.pad_token_id, seed=1
    )
    options = DecodingOptions(num_beams=3, min_new_tokens=1, max_new_tokens=MAX_NEW_TOKENS)
    decoded = ours(model, inputs, options, True)
    loss = model(
        context_input_ids=inputs.context_input_ids,
        context_attention_mask=inputs.context_attention_mask,
        doc_scores=inputs.doc_scores,
        labels=decoded.sequences_BT,
    ).loss
    torch.testing.assert_close(decoded.log_likelihood_B, -loss, atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_likelihood_equals_transformers_loss(family):
    config = config_of(family)
    model = hf_rag_model(False, config, num_passages=NUM_PASSAGES, seed=1, eos_shift=2.0)
    inputs = RagInputs.random(
        batch_size=NUM_QUESTIONS, num_passages=NUM_PASSAGES, pad_token_id=config.pad_token_id, seed=1
    )
    decoded = ours(model, inputs, DecodingOptions(num_beams=3, max_new_tokens=MAX_NEW_TOKENS), False)
    loss = model(
        context_input_ids=inputs.context_input_ids,
        context_attention_mask=inputs.context_attention_mask,
        doc_scores=inputs.doc_scores,
        labels=decoded.sequences_BT,
    ).loss
    torch.testing.assert_close(decoded.log_likelihood_B, -loss, atol=1e-10, rtol=0)


def test_difference_transformers_judges_one_scored_token_without_the_prior():
    config = tiny_bart_config()
    differing = 0
    for seed in (3, 9, 11):
        model = hf_rag_model(True, config, num_passages=2, seed=seed, eos_shift=3.0)
        mend_search(model)
        inputs = RagInputs.random(batch_size=4, num_passages=2, pad_token_id=1, seed=seed)
        expected = answers(inputs.generate(model, **hf_options({"num_beams": 1})), 1, 2)
        found = answers(ours(model, inputs, DecodingOptions(max_new_tokens=MAX_NEW_TOKENS), True).sequences_BT, 1, 2)
        for theirs, mine in zip(expected, found, strict=True):
            if theirs != mine:
                differing += 1
                assert theirs == [2], "only an answer of the end token alone may be preferred there"
    assert differing == 3


def test_difference_transformers_searches_over_the_padding_of_contexts():
    config = tiny_bart_config()
    model = hf_rag_model(True, config, num_passages=NUM_PASSAGES, seed=1, eos_shift=2.0)
    inputs = RagInputs.random(batch_size=4, num_passages=NUM_PASSAGES, pad_token_id=1, seed=1)
    ids, mask = inputs.context_input_ids, inputs.context_attention_mask
    as_called = model.generator.generate(ids, attention_mask=None, max_length=9, num_beams=1)
    unmasked = model.generator.generate(ids, attention_mask=torch.ones_like(mask), max_length=9, num_beams=1)
    masked = model.generator.generate(ids, attention_mask=mask, max_length=9, num_beams=1)
    assert answers(as_called, 1, 2) == answers(unmasked, 1, 2)
    assert answers(as_called, 1, 2) != answers(masked, 1, 2)


def test_difference_transformers_pads_the_beams_of_t5_with_the_end_token():
    config = tiny_t5_config()
    model = hf_rag_model(False, config, num_passages=NUM_PASSAGES, seed=2, eos_shift=2.0)
    inputs = RagInputs.random(batch_size=4, num_passages=NUM_PASSAGES, pad_token_id=0, seed=2)
    theirs = inputs.generate(model, num_beams=4, max_length=9)
    mine = ours(model, inputs, DecodingOptions(num_beams=4, max_new_tokens=8), False).sequences_BT
    short = (theirs == 1).sum(dim=1) > 1
    assert short.any()
    assert ((mine == 1).sum(dim=1) <= 1).all()
    assert theirs.masked_fill(theirs == 1, 0).tolist() == mine.masked_fill(mine == 1, 0).tolist()
