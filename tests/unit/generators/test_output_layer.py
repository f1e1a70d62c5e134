import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BartForConditionalGeneration,
)

from rag_lightning.generators import output_layer
from rag_lightning.generators.output_layer import OutputLayer, linear_log_probs
from rag_lightning.generators.pretrained import picked_log_probs
from rag_lightning.types import TokenBatch
from tests.unit.generators import test_causal, test_seq2seq

EXACT = {"atol": 1e-12, "rtol": 0.0}


def plain(states_MH, weight_VH, bias_V, targets_M):
    log_probs_MV = nn.functional.linear(states_MH, weight_VH, bias_V).log_softmax(dim=-1)
    return log_probs_MV.gather(1, targets_M[:, None])[:, 0], log_probs_MV.mean(dim=1)


def tensors(dtype=torch.float64, num_states=7):
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((num_states, 5), (11, 5), (11,))]
    return [part.to(dtype).requires_grad_() for part in parts], torch.randint(0, 11, (num_states,), generator=rng)


@pytest.mark.parametrize("vocab_mean", [False, True])
@pytest.mark.parametrize("max_block_elements", [1, 22, 33, 10_000], ids=["rows", "pairs", "uneven", "kept"])
def test_values_and_gradients_equal_the_log_softmax(vocab_mean, max_block_elements):
    inputs, targets_M = tensors()
    ours = linear_log_probs(*inputs, targets_M, vocab_mean=vocab_mean, max_block_elements=max_block_elements)
    theirs = plain(*inputs, targets_M)
    weights_M = torch.arange(7.0, dtype=torch.float64) - 2
    torch.testing.assert_close(ours[0], theirs[0], **EXACT)
    our_loss, their_loss = (weights_M * ours[0]).sum(), (weights_M * theirs[0]).sum()
    if vocab_mean:
        torch.testing.assert_close(ours[1], theirs[1], **EXACT)
        our_loss, their_loss = our_loss + (ours[1] ** 2).sum(), their_loss + (theirs[1] ** 2).sum()
    else:
        assert ours[1] is None
    for mine, reference in zip(
        torch.autograd.grad(our_loss, inputs), torch.autograd.grad(their_loss, inputs), strict=True
    ):
        torch.testing.assert_close(mine, reference, **EXACT)


@pytest.mark.parametrize("max_block_elements", [1, 9, 10_000])
def test_narrow_blocks_of_the_vocabulary_change_nothing(max_block_elements, monkeypatch):
    monkeypatch.setattr(output_layer, "_CPU_BLOCK_WIDTH", 4)
    test_values_and_gradients_equal_the_log_softmax(vocab_mean=True, max_block_elements=max_block_elements)


@pytest.mark.parametrize("bias", [-torch.inf, -1e30, 1e4])
@pytest.mark.parametrize("width", [4, 100])
def test_tokens_that_a_model_forbids_or_forces(bias, width, monkeypatch):
    """A block's normaliser is exact whatever its first logit: all of a block may be forbidden."""
    monkeypatch.setattr(output_layer, "_CPU_BLOCK_WIDTH", width)
    (states_MH, weight_VH, bias_V), targets_M = tensors(torch.float32)
    bias_V = bias_V.detach().clone()
    bias_V[:4] = bias
    targets_M = torch.where(targets_M < 4, 5, targets_M)
    found_M, _ = linear_log_probs(states_MH, weight_VH, bias_V, targets_M)
    expected_M, _ = plain(states_MH.double(), weight_VH.double(), bias_V.double(), targets_M)
    torch.testing.assert_close(found_M.double(), expected_M, atol=1e-5 if bias < 0 else 2e-3, rtol=1e-6)


def test_all_tokens_and_chosen_pairs_equal_the_models_own(monkeypatch):
    monkeypatch.setattr(output_layer, "_CPU_BLOCK_WIDTH", 4)
    monkeypatch.setattr(output_layer, "MAX_BLOCK_ELEMENTS", 9)
    model = causal("llama").double()
    layer, rng = OutputLayer(model), torch.Generator().manual_seed(0)
    states_NH = torch.randn(5, 16, generator=rng, dtype=torch.float64)
    expected_NV = model.lm_head(states_NH).log_softmax(dim=1)
    rows_P, tokens_P = torch.randint(0, 5, (12,), generator=rng), torch.randint(0, 19, (12,), generator=rng)
    torch.testing.assert_close(layer.log_probs_of_all(states_NH), expected_NV, **EXACT)
    torch.testing.assert_close(
        layer.log_probs_of_pairs(states_NH, rows_P, tokens_P), expected_NV[rows_P, tokens_P], **EXACT
    )


def test_the_gradient_can_be_taken_twice():
    inputs, targets_M = tensors()
    log_probs_M, _ = linear_log_probs(*inputs, targets_M)
    first = torch.autograd.grad(log_probs_M.sum(), inputs, retain_graph=True)
    again = torch.autograd.grad(log_probs_M.sum(), inputs)
    for one, other in zip(first, again, strict=True):
        torch.testing.assert_close(one, other, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("learning", ["states", "weight", "nothing"])
def test_what_rests_gets_no_gradient(learning):
    (states, weight, _), targets_M = tensors()
    states.requires_grad_(learning == "states")
    weight.requires_grad_(learning == "weight")
    log_probs_M, _ = linear_log_probs(states, weight, None, targets_M, max_block_elements=22)
    assert log_probs_M.requires_grad == (learning != "nothing")
    if learning != "nothing":
        log_probs_M.sum().backward()
        assert (states.grad is None, weight.grad is None) == (learning != "states", learning != "weight")


def test_no_position_at_all():
    (states, weight, bias), targets_M = tensors(num_states=0)
    log_probs_M, _ = linear_log_probs(states, weight, bias, targets_M)
    assert log_probs_M.shape == (0,)
    log_probs_M.sum().backward()
    assert weight.grad.abs().sum() == 0


def test_bfloat16_is_as_near_as_the_plain_way():
    inputs, targets_M = tensors()
    exact = plain(*inputs, targets_M)[0]
    halves, _ = tensors(torch.bfloat16)
    ours, _ = linear_log_probs(*halves, targets_M, max_block_elements=22)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, atol=0.1, rtol=0.05)
    ours.sum().backward()
    exact.sum().backward()
    for half, full in zip(halves, inputs, strict=True):
        assert half.grad.dtype == torch.bfloat16
        torch.testing.assert_close(half.grad.double(), full.grad, atol=0.1, rtol=0.1)


def test_autocast_casts_the_product_and_keeps_the_sum_in_float32():
    inputs, targets_M = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, _ = linear_log_probs(*inputs, targets_M)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain(*inputs, targets_M)[0], atol=0.1, rtol=0.05)
    ours.sum().backward()
    assert all(part.grad is not None and part.grad.dtype == torch.float32 for part in inputs)


def test_memory_is_one_chunk_whatever_the_number_of_positions():
    """What is kept for backward grows with the states, not with states times vocabulary."""

    def kept_elements(num_states):
        states, weight = torch.randn(num_states, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            targets_M = torch.zeros(num_states, dtype=torch.long)
            linear_log_probs(states, weight, None, targets_M, max_block_elements=8000)
        return sum(kept)

    weight_elements = 4000
    assert kept_elements(8) == weight_elements + 8 * (4 + 1 + 1) + 8 * 1000  # one chunk: its softmax is kept
    assert kept_elements(64) == weight_elements + 64 * (4 + 1 + 1)


# ---------------------------------------------------------------------- what is linear


def causal(family, **own):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    more = {"num_key_value_heads": 2, "vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **more, **own)).eval()


@pytest.mark.parametrize(
    ("family", "own", "linear"),
    [
        ("llama", {}, True),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
        ("cohere", {"logit_scale": 0.0625}, False),
    ],
)
def test_capped_and_scaled_logits_are_noticed(family, own, linear):
    model = causal(family, **own)
    ids = torch.tensor([[3, 4, 5]])
    assert OutputLayer(model).is_linear(lambda: model(input_ids=ids).logits) == linear


def test_a_bias_beside_the_layer_is_part_of_it():
    config = BartConfig(vocab_size=19, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    config.decoder_ffn_dim, config.encoder_attention_heads, config.decoder_attention_heads = 16, 2, 2
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias.normal_()
    layer, ids = OutputLayer(model), torch.tensor([[3, 4, 5]])

    def forward():
        return model(input_ids=ids, decoder_input_ids=ids).logits

    assert layer.is_linear(forward)
    expected = forward()[0].log_softmax(dim=-1)[torch.arange(3), torch.tensor([6, 7, 8])]
    found, _ = layer.log_probs(layer.states(forward)[0], torch.tensor([6, 7, 8]))
    torch.testing.assert_close(found, expected)


def test_trying_it_draws_no_random_numbers_and_leaves_no_gradient():
    model = causal("llama", attention_dropout=0.5).train()
    before = torch.get_rng_state()
    assert OutputLayer(model).is_linear(lambda: model(input_ids=torch.tensor([[3, 4]])).logits)
    assert torch.equal(before, torch.get_rng_state())
    assert all(weight.grad is None for weight in model.parameters())


# ---------------------------------------------------------------------- the fast path is the plain one


def both_ways(generator, contexts, labels_BT1, num_passages, vocab_mean):
    """Scores and gradients of groups and scored positions alone, and of one padded block with all logits."""
    found = []
    for overhead, keep_logits in ((0.0, False), (float("inf"), True)):
        generator.group_overhead_tokens = overhead
        encoded = generator.encode(contexts)
        output = generator.score(encoded, labels_BT1, num_passages, vocab_mean=vocab_mean, keep_logits=keep_logits)
        weights_T = torch.arange(1.0, labels_BT1.shape[1], dtype=output.token_log_probs_BKT.dtype)
        loss = (output.token_log_probs_BKT * weights_T).sum()
        if output.vocab_mean_BKT is not None:
            mask_B1T = output.target_mask_BT[:, None]
            loss = loss + (output.vocab_mean_BKT.masked_fill(~mask_B1T, 0.0) * weights_T).sum()
        generator.zero_grad()
        loss.backward()
        gradients = {
            name: weight.grad.clone() for name, weight in generator.named_parameters() if weight.grad is not None
        }
        found.append((output.token_log_probs_BKT.detach(), loss.detach(), gradients))
    return found


def assert_same(found, **tolerance):
    (fast, fast_loss, fast_gradients), (slow, slow_loss, slow_gradients) = found
    torch.testing.assert_close(fast, slow, **tolerance)
    torch.testing.assert_close(fast_loss, slow_loss, **tolerance)
    assert fast_gradients.keys() == slow_gradients.keys()
    for name, gradient in fast_gradients.items():
        torch.testing.assert_close(gradient, slow_gradients[name], msg=name, **tolerance)


def ragged_contexts(lengths, vocab_size, pad_token_id):
    rng = torch.Generator().manual_seed(3)
    mask = (torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]).long()  # two columns that nobody needs
    ids = torch.randint(4, vocab_size, mask.shape, generator=rng)
    return TokenBatch(ids.masked_fill(mask == 0, pad_token_id), mask)


@pytest.mark.parametrize("vocab_mean", [False, True])
@pytest.mark.parametrize("family", test_seq2seq.FAMILIES)
def test_encoder_decoders_in_groups_equal_one_block_with_all_logits(family, vocab_mean):
    generator = test_seq2seq.Seq2SeqGenerator(model=test_seq2seq.hf_model(family))
    contexts = ragged_contexts([9, 2, 5, 9, 3, 6], test_seq2seq.VOCAB_SIZE, generator.pad_token_id)
    labels = torch.full((2, 5), generator.pad_token_id)
    labels[0, :5] = torch.tensor([generator.start_token_id, 7, 8, 9, generator.eos_token_id])
    labels[1, :3] = torch.tensor([generator.start_token_id, 7, generator.eos_token_id])
    assert len(generator_groups(generator, contexts)) > 1
    assert_same(both_ways(generator, contexts, labels, 3, vocab_mean), atol=1e-10, rtol=1e-10)


def test_in_bfloat16_groups_differ_from_one_block_by_rounding():
    generator = test_seq2seq.Seq2SeqGenerator(model=test_seq2seq.hf_model("bart", torch.float32))
    contexts = ragged_contexts([9, 2, 5, 9], test_seq2seq.VOCAB_SIZE, generator.pad_token_id)
    labels = torch.tensor([[2, 7, 8, 2], [2, 9, 2, 1]])
    exact, _, _ = both_ways(generator, contexts, labels, 2, False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (fast, _, gradients), (slow, _, _) = both_ways(generator, contexts, labels, 2, False)
    assert fast.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    error_of_slow = (slow - exact).abs().max()
    assert 0 < error_of_slow < 0.5
    assert (fast - exact).abs().max() < 2 * error_of_slow


@pytest.mark.parametrize("family", [*test_causal.FAMILIES, "gemma2"])
def test_decoder_only_models_in_groups_equal_one_block_with_all_logits(family):
    model = causal("gemma2", head_dim=8) if family == "gemma2" else test_causal.hf_model(family)
    generator = test_causal.CausalGenerator(model=model)
    contexts = ragged_contexts([9, 2, 5, 9, 3, 6], test_causal.VOCAB_SIZE, 0)
    labels = test_causal.labels_of([7, 8, 9], [5])
    assert len(generator_groups(generator, contexts)) > 1
    assert_same(both_ways(generator, contexts, labels, 3, False), atol=1e-4, rtol=1e-4)


def test_an_encoder_that_widens_its_input_to_whole_windows_reads_in_groups_too():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 4, "init_std": 0.5}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("led", vocab_size=23, **sizes, **heads)).eval()
    generator = test_seq2seq.Seq2SeqGenerator(model=model.double())
    contexts = ragged_contexts([9, 2, 5, 9], 23, generator.pad_token_id)
    labels = torch.tensor([[2, 7, 8, 2], [2, 9, 2, 1]])
    (grouped, _, _), (whole, _, _) = both_ways(generator, contexts, labels, 2, False)
    torch.testing.assert_close(grouped, whole, atol=1e-8, rtol=0.0)  # LED's gradient of masked windows is not a number


def test_a_model_that_gives_its_output_layer_more_than_states_is_scored_all_the_same():
    sizes = {"hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "ngram": 2}
    heads = {"num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "encoder_ffn_dim": 16}
    config = AutoConfig.for_model("prophetnet", vocab_size=23, decoder_ffn_dim=16, **sizes, **heads)
    torch.manual_seed(0)
    generator = test_seq2seq.Seq2SeqGenerator(model=AutoModelForSeq2SeqLM.from_config(config).eval())
    contexts = ragged_contexts([9, 2, 5, 9], 23, generator.pad_token_id)
    labels = torch.tensor([[1, 7, 8, 2], [1, 9, 2, generator.pad_token_id]])
    assert_same(both_ways(generator, contexts, labels, 2, False), atol=1e-5, rtol=1e-4)


def generator_groups(generator, contexts):
    generator.group_overhead_tokens = 0.0
    return generator.length_groups(contexts.attention_mask.sum(dim=1).tolist(), contexts.input_ids.shape[1])


def test_small_models_run_in_one_block_and_large_ones_in_groups():
    """A further run costs time, not tokens: for a small model that is many tokens."""
    generator = test_seq2seq.Seq2SeqGenerator(model=test_seq2seq.hf_model("bart"))
    assert len(generator.length_groups([150, 20] * 20, 150)) == 1
    generator.model.further = nn.ParameterList([torch.zeros(3000, 3000), torch.zeros(3000, 3000)])
    assert len(generator.length_groups([150, 20] * 20, 150)) == 2


def test_a_model_spread_over_processes_runs_once_for_all_rows():
    generator = test_seq2seq.Seq2SeqGenerator(model=test_seq2seq.hf_model("bart"))
    generator.group_overhead_tokens = 0.0
    assert len(generator.length_groups([9, 2], 9)) == 2
    next(generator.model.parameters())._fsdp_flattened = True
    (group,) = generator.length_groups([9, 2], 12)
    assert (group.rows_M, group.length) == (None, 12)


def test_a_layer_spread_over_processes_runs_by_its_own_code():
    generator = test_seq2seq.Seq2SeqGenerator(model=test_seq2seq.hf_model("bart"))
    contexts = ragged_contexts([9, 2, 5, 9], test_seq2seq.VOCAB_SIZE, generator.pad_token_id)
    labels = torch.tensor([[2, 7, 8, 2], [2, 9, 2, 1]])
    direct = generator.score(generator.encode(contexts), labels, 2).token_log_probs_BKT
    generator.output_layer._layer.weight._fsdp_flattened = True
    within = generator.score(generator.encode(contexts), labels, 2).token_log_probs_BKT
    torch.testing.assert_close(within, direct, **EXACT)
    assert not generator.output_layer.is_linear(lambda: pytest.fail("the weights must not be used directly"))


def test_picked_log_probs_are_those_of_the_log_softmax():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    log_probs, mean = picked_log_probs(logits, targets, vocab_mean=True)
    expected = logits.log_softmax(dim=-1)
    torch.testing.assert_close(log_probs, expected.gather(2, targets[..., None])[..., 0])
    torch.testing.assert_close(mean, expected.mean(dim=-1))
