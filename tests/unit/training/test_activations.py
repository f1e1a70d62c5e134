"""Layers that keep no activations: the same losses and gradients in less memory, and evaluation as ever."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

from rag_lightning.encoders.bi_encoder import BiEncoder, Tower
from rag_lightning.errors import ConfigError
from rag_lightning.generators.causal import CausalGenerator
from rag_lightning.generators.seq2seq import Seq2SeqGenerator
from rag_lightning.rag import RagModel
from rag_lightning.training.activations import backbones_of, checkpoint_activations, layers_of
from rag_lightning.training.objectives import Contrastive, MarginalObjective, PolicyGradient
from rag_lightning.types import TokenBatch

PARTS = ["query_encoder", "passage_encoder", "generator"]


@pytest.fixture
def layered(tiny_model):
    """Returns a builder of models whose towers have layers too."""

    def build(*, dropout=0.0, shared=False, layers=2):
        model = tiny_model(dropout=dropout, shared=shared)
        tokenizer = model.encoder.tokenizer

        def tower():
            config = BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=layers,
                num_attention_heads=2,
                intermediate_size=24,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
            )
            return Tower(backbone=BertModel(config), pooling="mean", normalise=True)

        torch.manual_seed(3)
        query = tower()
        model.encoder = BiEncoder(query=query, passage=query if shared else tower(), tokenizer=tokenizer)
        return model

    return build


def trained(layered, tiny_run, dropout, **optim):
    """A run in float64 of all parts, three steps; its losses and weights."""
    run = tiny_run(
        model=layered(dropout=dropout).double(),
        optim={"train_passage_encoder": True, **optim},
        max_steps=3,
    )
    return run.fit()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_runs_without_kept_activations_are_the_same(dropout, layered, tiny_run):
    one = trained(layered, tiny_run, dropout)
    other = trained(layered, tiny_run, dropout, checkpoint_activations=PARTS)
    assert other.recorder.losses == pytest.approx(one.recorder.losses, abs=1e-12)
    assert len(set(one.recorder.losses)) == 3
    for name, weight in one.weights().items():
        torch.testing.assert_close(other.weights()[name], weight, rtol=0, atol=1e-9, msg=name)
    assert one.weights().keys() == other.weights().keys()


def tokens(batch=6, length=20):
    ids = torch.randint(5, 30, (batch, length), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return TokenBatch(ids, mask)


def loss_of(model, batch=6, length=20):
    """A loss that both towers and the generator have a part in."""
    contexts = tokens(batch, length)
    labels = torch.randint(5, 30, (batch, 7), generator=torch.Generator().manual_seed(6))
    said = model.generator.score(model.generator.encode(contexts), labels, 1).token_log_probs_BKT.sum()
    near = (model.encoder.query(contexts) * model.encoder.passage(tokens(batch, length + 3))).sum()
    return near - said


def kept_bytes(model):
    """Returns the bytes that the backward pass of a loss keeps, weights not counted, each storage once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(model)
    return sum(size for size, _ in kept.values())


def test_each_part_named_keeps_less(layered):
    model = layered(layers=4).train()
    everything = kept_bytes(model)
    sizes = []
    for parts in ([], ["query_encoder"], ["query_encoder", "passage_encoder"], PARTS):
        checkpoint_activations(model, parts, PARTS)
        sizes.append(kept_bytes(model))
    assert sizes[0] == everything
    assert sorted(sizes, reverse=True) == sizes
    assert len(set(sizes)) == 4
    assert sizes[-1] < everything / 2


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_equal_in_training_and_in_evaluation_mode(training, layered):
    """A policy's likelihood has a gradient in evaluation mode; transformers' own switch keeps everything there."""
    model = layered(layers=3).double().train(training)
    loss_of(model).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    everything = kept_bytes(model)
    model.zero_grad()
    checkpoint_activations(model, PARTS, PARTS)
    assert kept_bytes(model) < everything
    loss_of(model).backward()
    assert len(plain) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=1e-12, msg=name)


def answers(model, contexts, **settings):
    encoded = model.generator.encode(contexts)
    return model.decode(encoded, torch.zeros(len(contexts.input_ids), 1), decoding="rag_token", **settings)


@pytest.mark.parametrize("training", [True, False])
def test_answers_are_the_same_and_a_step_reads_one_token(training, layered, monkeypatch):
    """transformers' own switch drops the cache of answers drawn in training mode: a token would forget the others."""
    model = layered().train(training)
    with torch.no_grad():
        before = answers(model, tokens())
        checkpoint_activations(model, PARTS, PARTS)
        lengths, whole = [], model.generator._decode

        def watched(encoded, input_ids_NT, cache=None):
            lengths.append((input_ids_NT.shape[1], cache.get_seq_length()))
            return whole(encoded, input_ids_NT, cache)

        monkeypatch.setattr(model.generator, "_decode", watched)
        after = answers(model, tokens())
    assert torch.equal(before.sequences_BT, after.sequences_BT)
    assert [length for length, _ in lengths] == [1] * len(lengths)
    assert [seen for _, seen in lengths] == list(range(len(lengths)))
    assert len(lengths) > 2


def test_a_layer_with_a_cache_runs_as_ever_even_with_gradient(layered):
    """Computing it again would write the cache twice."""
    model = layered()
    checkpoint_activations(model, ["generator"], PARTS)
    state = model.generator.start(model.generator.encode(tokens()))
    for _ in range(3):
        log_probs_NV, state = model.generator.step(torch.full((6,), 7), state)
    log_probs_NV.sum().backward()
    assert state.cache.cache.get_seq_length() == 3


TINY_RATES = {"lr_query_encoder": 1e-12, "lr_passage_encoder": 1e-12, "lr_generator": 1e-12}


def test_evaluation_is_unchanged(layered, tiny_run, tiny_world):
    figures = []
    for parts in ([], PARTS):
        run = tiny_run(
            model=layered(),
            # tiny rates, so that the step before moves nothing: it rounds otherwise, and Adam's first is as long as any
            optim={"train_passage_encoder": True, "checkpoint_activations": parts, **TINY_RATES},
            data={"test": str(tiny_world.test)},
            max_steps=1,
        ).fit()
        (measured,) = run.trainer.test(run.module, datamodule=run.data, verbose=False)
        figures.append((measured, [prediction.answer for prediction in run.module.predictions]))
    assert figures[0][1] == figures[1][1]
    assert figures[0][0] == pytest.approx(figures[1][0], abs=1e-6)


def test_a_deep_copy_computes_with_its_own_weights(layered):
    """Adapters are merged into a copy, and a policy's start is one."""
    model = layered()
    checkpoint_activations(model, PARTS, PARTS)
    before = float(loss_of(model).detach())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert float(loss_of(other).detach()) == pytest.approx(before)
    loss_of(other).backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_later_module_starts_from_plain_layers(layered):
    model = layered()
    checkpoint_activations(model, PARTS, PARTS)
    assert all("forward" in vars(layer) for part in backbones_of(model).values() for layer in layers_of(part))
    checkpoint_activations(model, [], PARTS)
    assert not any("forward" in vars(layer) for part in backbones_of(model).values() for layer in layers_of(part))


def test_shared_towers_may_be_named_by_either_name(layered):
    model = layered(shared=True)
    everything = kept_bytes(model)
    sizes = set()
    for parts in (["query_encoder"], ["passage_encoder"], ["query_encoder", "passage_encoder"]):
        checkpoint_activations(model, parts, PARTS)
        sizes.add(kept_bytes(model))
    assert len(sizes) == 1
    assert sizes.pop() < everything


@pytest.mark.parametrize("model_type", ["t5", "llama", "gpt2"])
def test_other_families_compute_the_same(model_type, tiny_world):
    settings = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
        "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    }[model_type]
    family = Seq2SeqGenerator if model_type == "t5" else CausalGenerator
    generator = family.from_config(model_type=model_type, settings=settings, tokenizer=str(tiny_world.tokenizer))
    model = RagModel(encoder=None, generator=generator.double().train())
    labels = torch.randint(5, 30, (6, 7), generator=torch.Generator().manual_seed(6))
    gradients = []
    for parts in ([], ["generator"]):
        checkpoint_activations(model, parts, ["generator"])
        generator.zero_grad()
        torch.manual_seed(2)
        generator.score(generator.encode(tokens()), labels, 1).token_log_probs_BKT.sum().backward()
        gradients.append([p.grad.clone() for p in generator.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("part", "optim", "message"),
    [
        ("passage_encoder", {}, "the passage encoder does not learn in this run.*query_encoder.*leave passage_encoder"),
        ("generator", {"train_generator": False}, "the generator does not learn in this run"),
    ],
)
def test_parts_that_do_not_learn_are_refused(part, optim, message, layered, tiny_run):
    with pytest.raises(ConfigError, match=f"optim.checkpoint_activations: {message}"):
        tiny_run(model=layered(), optim={**optim, "checkpoint_activations": [part]})


def test_parts_and_layers_that_are_not_there_are_refused(tiny_model, tiny_run, tiny_world):
    with pytest.raises(ConfigError, match="query encoder is no part of this model"):
        checkpoint_activations(tiny_model(num_passages=0), ["query_encoder"], ["generator"])
    message = "expected a query encoder made of transformers' layers .* came WordEmbeddingsModel, which has none"
    model = tiny_model()
    model.encoder = BiEncoder.from_config(
        model_type="rag_word_embeddings", settings={"hidden_size": 16}, tokenizer=str(tiny_world.tokenizer)
    )
    with pytest.raises(ConfigError, match=message):
        tiny_run(model=model, optim={"checkpoint_activations": ["query_encoder"]})


@pytest.mark.parametrize(
    "objective",
    [
        lambda: Contrastive(cache_chunk=2),
        lambda: PolicyGradient(
            objective=MarginalObjective(kind="rag_token"), policies=["generator"], reward=lambda _: 0.5, kl_weight=0.1
        ),
    ],
    ids=["contrastive", "policy"],
)
def test_other_objectives_train_the_same(objective, layered, tiny_run):
    losses = []
    for checkpointed in (False, True):
        made = objective()
        parts = [part for part in ("query_encoder", "generator") if part in made.trains] if checkpointed else []
        run = tiny_run(model=layered(dropout=0.2), objective=made, optim={"checkpoint_activations": parts}, max_steps=2)
        losses.append(run.fit().recorder.losses)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
