"""Decoding from shared contexts equals decoding from a copy for each output, in every family."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rag_lightning.decoding.decode import decode
from rag_lightning.decoding.options import DecodingOptions
from rag_lightning.generators import shared_contexts
from rag_lightning.generators.base import DecoderState
from rag_lightning.generators.causal import CausalGenerator
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.generators.shared_contexts import NAME, Sharing
from rag_lightning.types import TokenBatch
from tests.unit.generators.test_seq2seq import FAMILIES, VOCAB_SIZE, hf_model, random_contexts, random_labels

EXACT = {"atol": 1e-10, "rtol": 0.0}
MODES = ("rag_token", "rag_sequence_fast", "rag_sequence_thorough", "fid")


def plain_decoder(family, dtype=torch.float64):
    """A generator whose model takes its attention from elsewhere, so that each output has its own copy."""
    generator = Seq2SeqGenerator(model=hf_model(family, dtype))
    generator.model.set_attn_implementation("eager")
    return generator


class Rereading(Seq2SeqGenerator):
    """No cache, nothing reordered but tokens and contexts: each step reads everything anew."""

    def start(self, encoded):
        return DecoderState(encoded, encoded.attention_mask_NL.new_zeros(encoded.hidden_NLH.shape[0], 0))

    def step(self, tokens_N, state):
        written_NT = torch.cat([state.cache, tokens_N[:, None]], dim=1)
        log_probs_NV = self._decode(state.encoded, written_NT)[:, -1].log_softmax(dim=-1)
        return log_probs_NV, DecoderState(state.encoded, written_NT)

    def score_step(self, tokens_N, state, rows_P, next_P):
        log_probs_NV, state = self.step(tokens_N, state)
        return log_probs_NV[rows_P, next_P], state

    def fork(self, state):
        return state

    def reorder(self, state, rows_M):
        return DecoderState(state.encoded.rows(rows_M), state.cache[rows_M])


def lengths_of(decoded, generator):
    return (decoded.sequences_BT != generator.pad_token_id).sum(dim=1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("call_tokens", [0, 256], ids=["length groups", "one group"])
@pytest.mark.parametrize("num_passages", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_that_without_cache_and_sharing(family, mode, num_passages, call_tokens, monkeypatch):
    monkeypatch.setattr(shared_contexts, "_CALL_TOKENS", call_tokens)
    model = hf_model(family)
    shared, plain, naive = Seq2SeqGenerator(model=model), plain_decoder(family), Rereading(model=model)
    contexts = random_contexts(shared, 5 * num_passages)
    rng = torch.Generator().manual_seed(0)
    prior = torch.randn(5, num_passages, generator=rng, dtype=torch.float64)
    if num_passages > 1:
        prior[0, 1:] = -torch.inf  # all passages of a question but one are missing
    options = DecodingOptions(num_beams=3, num_return=3, max_new_tokens=6, no_repeat_ngram_size=2)
    groups, find = [], shared_contexts.adjacent_groups
    monkeypatch.setattr(shared_contexts, "adjacent_groups", lambda lengths: groups.append(find(lengths)) or groups[-1])
    found, *others = (
        decode(each, each.encode(contexts), prior.log_softmax(dim=1), options, mode=mode)
        for each in (shared, plain, naive)
    )
    assert max(map(len, groups)) > 1 if call_tokens == 0 else {*map(len, groups)} == {1}
    for other in others:
        assert found.nbest_BRT.tolist() == other.nbest_BRT.tolist()
        torch.testing.assert_close(found.nbest_log_likelihood_BR, other.nbest_log_likelihood_BR, **EXACT)


@torch.no_grad()
def ending_model(dtype=torch.float64):
    """A BART whose searches end at several lengths."""
    model = hf_model("bart", torch.float32, seed=3, init_std=0.6)
    config = model.config
    model.final_logits_bias[0, config.pad_token_id] = -20.0
    model.lm_head.weight = torch.nn.Parameter(0.5 * torch.randn_like(model.lm_head.weight))
    model.lm_head.weight[config.eos_token_id] *= 2
    model.model.decoder.embed_positions.weight *= 2
    return model.to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("num_beams", [1, 3])
def test_searches_that_end_leave_the_others_as_they_are(num_beams):
    model = ending_model()
    shared, naive = Seq2SeqGenerator(model=model), Rereading(model=model)
    contexts = random_contexts(shared, 24, length=12)
    prior = torch.randn(12, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(dim=1)
    options = DecodingOptions(num_beams=num_beams, max_new_tokens=10)
    num_rows = []
    step = shared.step
    shared.step = lambda tokens, state: num_rows.append(len(tokens)) or step(tokens, state)
    found, expected = (
        decode(each, each.encode(contexts), prior, options, mode="rag_token") for each in (shared, naive)
    )
    assert len(set(num_rows[1:])) > 1, "the case must have searches that end at several steps"
    assert sorted(num_rows[1:], reverse=True) == num_rows[1:]
    assert len(set(lengths_of(found, shared))) > 1
    assert torch.equal(found.sequences_BT, expected.sequences_BT)
    torch.testing.assert_close(found.log_likelihood_B, expected.log_likelihood_B, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_fast"])
def test_sampling_from_shared_contexts_draws_the_same(mode):
    model = ending_model()
    shared, naive = Seq2SeqGenerator(model=model), Rereading(model=model)
    contexts = random_contexts(shared, 6)
    prior = torch.tensor([[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    options = DecodingOptions(sample=True, num_return=4, max_new_tokens=6)
    found, expected = (decode(each, each.encode(contexts), prior, options, mode=mode) for each in (shared, naive))
    assert torch.equal(found.nbest_BRT, expected.nbest_BRT)
    torch.testing.assert_close(found.nbest_log_likelihood_BR, expected.nbest_log_likelihood_BR, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["rag_token", "rag_sequence_thorough"])
def test_a_decoder_only_model_decodes_as_its_own_scores_say(mode):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.6,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    generator = CausalGenerator(model=LlamaForCausalLM(config).eval().double())
    contexts = random_contexts(generator, 8)
    prior = torch.randn(4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(dim=1)
    options = DecodingOptions(num_beams=3, max_new_tokens=5)
    encoded = generator.encode(contexts)
    decoded = decode(generator, encoded, prior, options, mode=mode)
    scored_BKT = generator.score(encoded, decoded.sequences_BT, 2).token_log_probs_BKT
    if mode == "rag_token":
        expected_B = (scored_BKT + prior[..., None]).logsumexp(dim=1)
        expected_B = expected_B.masked_fill(decoded.sequences_BT[:, 1:] == generator.pad_token_id, 0.0).sum(dim=1)
    else:
        expected_B = (scored_BKT.sum(dim=2) + prior).logsumexp(dim=1)
    torch.testing.assert_close(decoded.log_likelihood_B, expected_B, **EXACT)


@torch.no_grad()
def test_half_precision_stays_within_its_rounding():
    model = ending_model(torch.bfloat16)
    shared, naive = Seq2SeqGenerator(model=model), Rereading(model=model)
    contexts = random_contexts(shared, 4)
    labels = random_labels(shared, [5, 5, 5, 5])
    states = [each.start(each.encode(contexts)) for each in (shared, naive)]
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    for place in range(4):
        tokens = labels[rows if place > 1 else slice(None), place]
        found, states[0] = shared.step(tokens, states[0])
        expected, states[1] = naive.step(tokens, states[1])
        torch.testing.assert_close(found, expected.float(), atol=0.15, rtol=0.05)
        if place == 1:
            states = [each.reorder(state, rows) for each, state in zip((shared, naive), states, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_contexts_are_kept_once_and_not_moved_by_a_reorder(family):
    generator = Seq2SeqGenerator(model=hf_model(family))
    usual = generator.model.config._attn_implementation
    state = generator.start(generator.encode(random_contexts(generator, 4)))
    _, state = generator.step(torch.full((4,), generator.start_token_id), state)
    assert state.cache.cache.cross_attention_cache.layers[0].keys.shape[0] == 4
    state = generator.reorder(state, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))  # contexts are put in order once
    keys = state.cache.cache.cross_attention_cache.layers[0].keys
    lengths = state.encoded.attention_mask_NL.sum(dim=1).tolist()
    assert lengths == sorted(lengths) == list(state.encoded.lengths)
    assert len(set(lengths)) > 1
    for rows in ([1, 1, 2, 3, 4, 4, 7, 6], [0, 1, 2, 3, 4, 5]):
        state = generator.reorder(state, torch.tensor(rows))
        _, state = generator.step(torch.full((len(rows),), 5), state)
        assert state.cache.cache.cross_attention_cache.layers[0].keys is keys
        assert generator.model.config._attn_implementation == usual != NAME
    state = generator.reorder(state, torch.tensor([4, 5]))  # of one context: most have no reader left
    assert state.cache.cache.cross_attention_cache.layers[0].keys.shape[0] == state.encoded.hidden_NLH.shape[0] == 1


def test_a_model_is_left_as_it_was_when_a_step_fails():
    generator = Seq2SeqGenerator(model=hf_model("bert_pair"))
    state = generator.start(generator.encode(random_contexts(generator, 2)))
    seen = []

    def fail(*arguments, **settings):
        seen.append(generator.model.decoder.config._attn_implementation)
        raise ZeroDivisionError

    generator.model.decoder.forward = fail
    with pytest.raises(ZeroDivisionError):
        generator.step(torch.tensor([2, 2]), state)
    assert seen == [NAME]
    implementations = {
        part.config._attn_implementation for part in generator.model.modules() if hasattr(part, "config")
    }
    assert implementations == {"sdpa"}


def test_outputs_of_a_context_may_be_few_or_none():
    sharing = Sharing.of(torch.tensor([2, 0, 2, 2]), lengths=[4, 4, 4])
    assert sharing.rows_CR.shape == (3, 3)
    assert sharing.groups == ((3, 4),)
    assert sharing.rows_CR.flatten()[sharing.slots_N].tolist() == [0, 1, 2, 3]
    assert (sharing.slots_N // 3).tolist() == [2, 0, 2, 2]


@torch.no_grad()
def test_a_context_of_padding_alone_is_read_as_by_a_copy_of_its_own():
    model = ending_model()
    shared, naive = Seq2SeqGenerator(model=model), Rereading(model=model)
    contexts = random_contexts(shared, 4)
    mask = contexts.attention_mask.clone()
    mask[1] = 0
    encoded = shared.encode(TokenBatch(contexts.input_ids, mask))
    prior = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64).log()
    options = DecodingOptions(num_beams=3, max_new_tokens=5)
    found, expected = (decode(each, encoded, prior, options, mode="rag_token") for each in (shared, naive))
    assert torch.equal(found.sequences_BT, expected.sequences_BT)
    torch.testing.assert_close(found.log_likelihood_B, expected.log_likelihood_B, **EXACT)
