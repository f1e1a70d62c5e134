"""A decoder that reads the encoder's states equals one that projects them, in values and gradients."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

from rag_lightning.generators import absorbed_attention
from rag_lightning.generators.absorbed_attention import AbsorbedAttention
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.types import TokenBatch
from tests.unit.generators.test_seq2seq import VOCAB_SIZE, hf_model, random_contexts

TOLERANCE = {"atol": 1e-10, "rtol": 1e-10}
FAMILIES = ("bart", "t5", "bert_pair_of_one_width")
LENGTHS = (9, 2, 5, 9, 3, 6)


def make(family, dtype=torch.float64):
    if family != "bert_pair_of_one_width":
        return Seq2SeqGenerator(model=hf_model(family, dtype))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    one, other = (BertConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=32, **sizes) for _ in range(2))
    config = EncoderDecoderConfig.from_encoder_decoder_configs(one, other)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 2, 3
    return Seq2SeqGenerator(model=EncoderDecoderModel(config).eval().to(dtype))


def contexts_of(generator):
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, VOCAB_SIZE, mask.shape, generator=torch.Generator().manual_seed(3))
    return TokenBatch(ids.masked_fill(mask == 0, generator.pad_token_id), mask)


def labels_of(generator):
    """Two targets of three tokens and of one."""
    labels = torch.full((2, 5), generator.pad_token_id)
    labels[0, :4] = torch.tensor([generator.start_token_id, 7, 8, generator.eos_token_id])
    labels[1, :2] = torch.tensor([generator.start_token_id, generator.eos_token_id])
    return labels


def scored(generator, *, fused=False, keep_logits=False):
    """Scores and gradients."""
    encoded, labels = generator.encode(contexts_of(generator)), labels_of(generator)
    num_passages = 3
    if fused:
        encoded, num_passages = encoded.fused(torch.tensor([[True, True, False], [True, True, True]])), 1
    output = generator.score(encoded, labels, num_passages, vocab_mean=True, keep_logits=keep_logits)
    weights_T = torch.arange(1.0, labels.shape[1], dtype=output.token_log_probs_BKT.dtype)
    generator.zero_grad()
    mean_BKT = output.vocab_mean_BKT.masked_fill(~output.target_mask_BT[:, None], 0.0)
    ((output.token_log_probs_BKT + mean_BKT) * weights_T).sum().backward()
    return output.token_log_probs_BKT.detach(), {
        name: weight.grad.clone() for name, weight in generator.named_parameters() if weight.grad is not None
    }


def count_reads(generator, monkeypatch):
    """Lists the decoder's runs on states, once it is known what the model can do."""
    scored(generator)
    runs, reading = [], generator._absorbed.reading

    def counted(states_NLH):
        runs.append(tuple(states_NLH.shape))
        return reading(states_NLH)

    monkeypatch.setattr(generator._absorbed, "reading", counted)
    return runs


def works(generator):
    encoded = generator.encode(random_contexts(generator, 2))
    tokens = torch.full((2, 1), generator.start_token_id)
    return generator._absorbed.works(encoded.hidden_NLH, lambda: generator._decoder_output(encoded, tokens))


@pytest.mark.parametrize("overhead", [0.0, float("inf")], ids=["groups", "one run"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_equal_the_plain_way(family, fused, overhead, monkeypatch):
    generator = make(family)
    plain, plain_gradients = scored(generator, fused=fused, keep_logits=True)
    generator.group_overhead_tokens = overhead
    runs = count_reads(generator, monkeypatch)
    found, gradients = scored(generator, fused=fused)
    assert len(runs) == (2 if overhead == 0.0 else 1)
    torch.testing.assert_close(found, plain, **TOLERANCE)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], msg=name, **TOLERANCE)


def test_targets_of_like_length_run_together_on_contexts_no_wider_than_needed(monkeypatch):
    generator = make("bart")
    generator.group_overhead_tokens = 0.0
    runs = count_reads(generator, monkeypatch)
    scored(generator)
    assert runs == [(3, 9, 16), (3, 9, 16)]
    monkeypatch.undo()
    encoded = generator.encode(contexts_of(generator)).rows(torch.tensor([1, 2, 4, 0, 3, 5]))
    runs = count_reads(generator, monkeypatch)
    generator.score(encoded, labels_of(generator), 3)
    assert sorted(runs) == [(3, 5, 16), (3, 9, 16)]


def test_float32_differs_by_rounding():
    exact, _ = scored(make("bart"))
    plain, _ = scored(make("bart", torch.float32), keep_logits=True)
    found, _ = scored(make("bart", torch.float32))
    assert not torch.equal(found, plain)  # it was another way
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=0.0)


def test_the_bias_of_keys_has_a_gradient_of_zero():
    _, gradients = scored(make("bart"))
    zeros = [name for name, gradient in gradients.items() if "encoder_attn.k_proj.bias" in name and not gradient.any()]
    assert len(zeros) == 2


def test_it_pays_where_targets_are_shorter_than_heads_are_wide():
    absorbed = make("bart")._absorbed  # heads of 8
    assert absorbed.pays([10, 10], [7, 7])
    assert not absorbed.pays([10, 10], [8, 8])
    assert absorbed.pays([10, 10], [1, 14])
    assert not absorbed.pays([10, 1], [5, 5])  # half of what would be read is padding


def test_it_is_for_devices_that_it_was_measured_on(monkeypatch):
    monkeypatch.setattr(absorbed_attention, "_DEVICES", frozenset({"cuda"}))
    generator = make("bart")
    runs = count_reads(generator, monkeypatch)
    scored(generator)
    assert runs == []


def with_adapters(generator):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"]), generator.model)


def with_a_hook(generator):
    generator.model.model.decoder.layers[1].encoder_attn.v_proj.register_forward_hook(lambda *_: None)


def with_dropout(generator):
    generator.train()
    for layer in generator.model.model.decoder.layers:
        layer.encoder_attn.dropout = 0.1


def with_checkpoints_of_transformers(generator):
    generator.model.activation_checkpointing_enable()


def with_a_replaced_forward(generator):
    layer = generator.model.model.decoder.layers[0]
    object.__setattr__(layer, "forward", layer.forward)


def with_eager_attention(generator):
    generator.model.set_attn_implementation("eager")


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, attention_mask, states, **rest):
        return self.inner(hidden_states, attention_mask, 2 * states, **rest)


def with_states_that_the_decoder_changes(generator):
    decoder = generator.model.model.decoder
    decoder.layers = nn.ModuleList(Scaled(layer) for layer in decoder.layers)


@pytest.mark.parametrize(
    "change",
    [
        with_adapters,
        with_a_hook,
        with_dropout,
        with_checkpoints_of_transformers,
        with_a_replaced_forward,
        with_eager_attention,
        with_states_that_the_decoder_changes,
    ],
    ids=lambda change: change.__name__,
)
def test_a_decoder_that_does_more_than_project_is_left_alone(change):
    generator = make("bart")
    change(generator)
    assert not works(generator)


def test_what_can_change_is_asked_again_each_time():
    generator = make("bart")
    assert works(generator)
    with_dropout(generator)
    assert not works(generator)
    assert works(generator.eval())


def test_dropped_probabilities_are_exact_without_a_bias():
    generator = make("t5").train()
    assert works(generator)


def test_a_pair_of_two_widths_projects_its_states_first():
    assert not works(Seq2SeqGenerator(model=hf_model("bert_pair")))


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_half_precision_keeps_to_the_plain_way(half):
    generator = make("bart", torch.bfloat16 if half == "weights" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16) if half == "autocast" else nullcontext():
        assert not works(generator)


def test_trying_it_draws_no_random_numbers_and_leaves_the_model_as_it_was():
    generator = make("t5").train()
    before = torch.get_rng_state()
    generator_encoded = generator.encode(random_contexts(generator, 2))
    after_encoding = torch.get_rng_state()
    tokens = torch.full((2, 1), generator.start_token_id)
    assert generator._absorbed.works(
        generator_encoded.hidden_NLH, lambda: generator._decoder_output(generator_encoded, tokens)
    )
    assert not torch.equal(before, after_encoding)
    assert torch.equal(after_encoding, torch.get_rng_state())
    assert generator.model.config._attn_implementation == "sdpa"
    assert all(weight.grad is None for weight in generator.parameters())


def test_a_model_without_cross_attention_known_here_never_pays():
    assert not AbsorbedAttention(nn.Linear(2, 2)).pays([5], [1])
