"""Reinforcement in the objective: unbiased by enumeration, who moves, what is logged, and what is refused."""

import inspect
import itertools
from dataclasses import replace

import pytest
import torch

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.losses.marginal import doc_log_prior
from rag_lightning.losses.policy import ordered_log_prob
from rag_lightning.training.objectives import (
    ClosedBook,
    Contrastive,
    MarginalObjective,
    PerplexityDistillation,
    PolicyGradient,
    Sources,
)
from rag_lightning.training.objectives import policy_gradient as place

NUM_CANDIDATES = 4


def by_length(attempt):
    """A reward that differs between all answers and cited passages, of no shape that an estimator could lean on."""
    return (sum(map(ord, attempt.answer + attempt.cited_passage_id)) % 17) / 16


def reinforced(kind="rag_token", **settings):
    retrieves = "retriever" in settings.get("policies", ["retriever"])
    candidates = {"num_candidates": NUM_CANDIDATES} if retrieves else {}
    settings = {"reward": by_length, "likelihood_weight": 0.0, **candidates, **settings}
    return PolicyGradient(objective=MarginalObjective(kind=kind), **settings)


@pytest.fixture
def ready(tiny_run, tiny_model):
    """Returns ``ready(objective)``: a run with a live index and a batch of its first question alone."""

    def build(objective, *, rows=1, model=None, **optim):
        run = tiny_run(model=model if model is not None else tiny_model(), objective=objective, optim=optim)
        run.data.setup("fit")
        run.data.ensure_index(step=0)
        run.data.trainer = None
        run.module.double()
        batch = next(iter(run.data.train_dataloader()))
        return run, first_rows(batch, rows)

    return build


def first_rows(batch, rows):
    return replace(
        batch,
        questions=batch.questions[:rows],
        query=type(batch.query)(batch.query.input_ids[:rows], batch.query.attention_mask[:rows]),
        prompt=type(batch.prompt)(batch.prompt.input_ids[:rows], batch.prompt.attention_mask[:rows]),
        labels=batch.labels[:rows],
        positive_ids=batch.positive_ids[:rows],
        weights_B=batch.weights_B[:rows],
    )


def sources_of(run, **settings):
    return Sources(run.data.assembler, run.data.retriever, **settings)


def gradient(value, parameters):
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, parameters, strict=True)]
    )


# ---------------------------------------------------------------------- unbiased


@pytest.mark.parametrize("baseline", ["leave_one_out", "self_critical"])
@pytest.mark.parametrize("kind", ["rag_token", "fid"])
def test_the_retrievers_gradient_is_unbiased_by_enumeration(baseline, kind, ready, monkeypatch):
    """Over all ordered draws of 2 of 4 passages: the estimator's expectation is the gradient of the expected reward."""
    num_samples = 2 if baseline == "leave_one_out" else 1
    objective = reinforced(kind, baseline=baseline, num_samples=num_samples)
    run, batch = ready(objective)
    model = run.module.model
    model.settings = replace(model.settings, num_passages=2, objective=kind)
    run.module.eval()
    parameters = list(model.encoder.query.parameters())
    draws = list(itertools.permutations(range(NUM_CANDIDATES), 2))

    def estimate(picked):
        chosen = torch.tensor(picked)[None]
        monkeypatch.setattr(place, "draw_without_replacement", lambda *_: chosen)
        loss_B, figures = objective._reinforce(model, batch, sources_of(run))
        return loss_B.sum(), figures["reward"]

    _, scores = model.retrieve(batch.query, [q.question for q in batch.questions], run.data.retriever, num_passages=4)
    probability_D = ordered_log_prob(scores / model.settings.temperature, torch.tensor(draws)[None])[0].exp()
    with torch.no_grad():
        rewards = [estimate([draw] * num_samples)[1].item() for draw in draws]
    assert len(set(rewards)) > 2
    wanted = -gradient((probability_D * torch.tensor(rewards)).sum(), parameters)
    assert wanted.abs().max() > 1e-4

    found = torch.zeros_like(wanted)
    weights = probability_D.detach().tolist()
    for places in itertools.product(range(len(draws)), repeat=num_samples):
        weight = torch.tensor([weights[number] for number in places]).prod()
        found += weight * gradient(estimate([draws[number] for number in places])[0], parameters)
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "fid"])
def test_the_generators_gradient_is_unbiased_by_enumeration(kind, ready, monkeypatch):
    """Over all answers of one token; padding, which is no answer, is made impossible."""
    objective = reinforced(kind, policies=["generator"], baseline="self_critical", num_samples=1)
    run, batch = ready(objective)
    model = run.module.model
    model.settings = replace(model.settings, objective=kind)
    run.module.eval()
    model.generator.model.final_logits_bias[0, model.generator.pad_token_id] = -1e9
    parameters = list(model.generator.parameters())
    answers = [token for token in range(model.generator.vocab_size) if token != model.generator.pad_token_id]
    greedy = torch.tensor([[model.generator.start_token_id, 9]])

    def estimate(token):
        drawn = torch.tensor([[model.generator.start_token_id, token]])
        monkeypatch.setattr(place, "answers_to", lambda *arguments: greedy if arguments[-1] is None else drawn)
        loss_B, figures = objective._reinforce(model, batch, sources_of(run))
        return loss_B.sum(), figures["reward"].item()

    def log_likelihood(token):
        hits, scores = model.retrieve(batch.query, [q.question for q in batch.questions], run.data.retriever)
        contexts = run.data.assembler.contexts(hits.ids_BK, batch.prompt)
        labels = torch.tensor([[model.generator.start_token_id, token]])
        return model.log_likelihood(
            context_input_ids=contexts.input_ids,
            context_attention_mask=contexts.attention_mask,
            doc_scores=scores.detach(),
            labels=labels,
            objective=kind,
        )

    expected, found, mass = 0.0, 0.0, 0.0
    for token in answers[:: 1 if kind == "rag_token" else 3]:
        probability = log_likelihood(token).exp()
        loss, reward = estimate(token)
        expected = expected - gradient((probability * reward).sum(), parameters)
        # the baseline's share vanishes over all answers; here it is taken off answer by answer
        log_gradient = gradient(log_likelihood(token).sum(), parameters)
        greedy_reward = by_length_of(model, run, batch, greedy, objective)
        found = found + probability.detach() * (gradient(loss, parameters) - greedy_reward * log_gradient)
        mass += float(probability.detach())
    if kind == "rag_token":
        assert mass == pytest.approx(1.0, abs=1e-6)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


def by_length_of(model, run, batch, labels, objective):
    """The reward of an answer, worked out apart from the objective."""
    hits, scores = model.retrieve(batch.query, [q.question for q in batch.questions], run.data.retriever)
    encoded = model.generator.encode(run.data.assembler.contexts(hits.ids_BK, batch.prompt))
    output = model.generator.score(encoded, labels, hits.ids_BK.shape[1])
    log_prior = doc_log_prior(scores, model.settings.temperature)
    cited = int((log_prior + output.token_log_probs_BKT.sum(dim=2))[0].argmax())
    passage = run.data.corpus[int(hits.ids_BK[0, cited])]
    answer = model.generator.tokenizer.decode(labels[0], skip_special_tokens=True).strip()
    return by_length(type("Attempt", (), {"answer": answer, "cited_passage_id": passage.id}))


def test_answers_are_drawn_as_often_as_the_model_says(ready, tiny_model):
    """Of a sharp reader with dropout: off while the policy acts, and back on afterwards."""
    objective = reinforced(policies=["generator"], num_samples=2000, seed=3)
    run, batch = ready(objective, model=tiny_model(dropout=0.5))
    model = run.module.model
    model.generator.model.final_logits_bias[0, 20:24] = torch.tensor([6.0, 5.5, 5.0, 4.5], dtype=torch.float64)
    run.module.train()
    model.decoding_options = replace(model.decoding_options, max_new_tokens=1)
    seen = []
    objective.reward = lambda attempt: seen.append(attempt.answer) or 0.5
    objective._reinforce(model, batch, sources_of(run))
    assert all(part.training for part in model.generator.modules())
    run.module.eval()
    hits, scores = model.retrieve(batch.query, [q.question for q in batch.questions], run.data.retriever)
    encoded = model.generator.encode(run.data.assembler.contexts(hits.ids_BK, batch.prompt))
    log_probs, _ = model.generator.step(
        torch.full((3,), model.generator.start_token_id), model.generator.start(encoded)
    )
    prior = doc_log_prior(scores, model.settings.temperature)[0]
    mixture = (log_probs + prior[:, None]).logsumexp(dim=0).exp()
    chi_square, mass = 0.0, 0.0
    for token in range(20, 24):
        text = model.generator.tokenizer.decode([token], skip_special_tokens=True).strip()
        expected = len(seen) * float(mixture[token].detach())
        chi_square += (seen.count(text) - expected) ** 2 / expected
        mass += expected
    assert mass > 0.8 * len(seen)
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


# ---------------------------------------------------------------------- who moves


@pytest.mark.parametrize(
    ("settings", "moved"),
    [
        ({"policies": ["retriever"]}, {"query"}),
        ({"policies": ["generator"]}, {"generator"}),
        ({"policies": ["retriever", "generator"]}, {"query", "generator"}),
        ({"policies": ["generator"], "baseline": "self_critical", "num_samples": 1}, {"generator"}),
        ({"policies": ["retriever"], "likelihood_weight": 1.0}, {"query", "generator"}),
    ],
)
@pytest.mark.parametrize("kind", ["rag_token", "rag_sequence", "fid"])
def test_the_gradient_reaches_just_the_policies(settings, moved, kind, ready):
    run, batch = ready(reinforced(kind, **settings), rows=4)
    model = run.module.model.requires_grad_(True)
    run.module.objective(model, batch, sources_of(run)).loss_B.sum().backward()
    found = {
        name.split(".")[1] if name.startswith("encoder") else name.split(".")[0]
        for name, weight in model.named_parameters()
        if weight.grad is not None and weight.grad.abs().max() > 0
    }
    if settings.get("likelihood_weight") and kind == "fid":
        moved = {"query", "generator"}  # of the two, the reward moves the retriever
    assert found == moved


def test_a_step_of_training_moves_the_retriever_towards_what_pays(tiny_run, tiny_model):
    """Every other passage earns something: in the end those are drawn."""

    def pays(attempt):
        return float(attempt.cited_passage_id in paying)

    objective = PolicyGradient(
        objective=MarginalObjective(kind="rag_token"),
        reward=pays,
        likelihood_weight=0.0,
        num_samples=8,
        num_candidates=12,
    )
    run = tiny_run(
        model=tiny_model(num_passages=1), objective=objective, optim={"lr_query_encoder": 3e-3}, max_steps=60
    )
    run.data.setup("fit")
    paying = {passage.id for row, passage in enumerate(run.data.corpus) if row % 2 == 0}
    rewards = []
    original = objective._reinforce

    def noted(*arguments):
        loss, figures = original(*arguments)
        rewards.append(float(figures["reward"].mean()))
        return loss, figures

    objective._reinforce = noted
    run.fit()
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-10:]) / 10 > 0.85


# ---------------------------------------------------------------------- the rest


def test_alpha_rises_after_its_delay():
    objective = reinforced(alpha=0.5, alpha_delay_steps=2, alpha_warmup_steps=3)
    assert [objective.alpha_at(step) for step in range(7)] == [0.0, 0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


def test_before_its_delay_and_in_evaluation_the_loss_is_the_objectives_own(ready):
    objective = reinforced(likelihood_weight=1.0, alpha_delay_steps=5)
    run, batch = ready(objective)
    run.module.eval()
    own = objective.objective(run.module.model, batch, sources_of(run)).loss_B
    for settings in ({"step": 4}, {"step": 9, "teaching": False}):
        found = objective(run.module.model, batch, sources_of(run, **settings))
        assert torch.equal(found.loss_B, own)
        assert "reward" not in found.terms
    after = objective(run.module.model, batch, sources_of(run, step=5))
    expected = own + after.terms["alpha"] * after.terms["policy"]
    torch.testing.assert_close(after.loss_B, expected)
    assert {"reward", "advantage", "kl", "policy_entropy", "alpha"} <= set(after.terms)


def test_the_same_step_draws_the_same_and_another_another(ready):
    objective = reinforced(policies=["retriever", "generator"])
    run, batch = ready(objective, rows=4)
    run.module.eval()
    losses = [objective(run.module.model, batch, sources_of(run, step=step)).loss_B for step in (0, 0, 1)]
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_divergence_from_the_start_is_nothing_at_first_and_costs_later(tiny_run, tiny_model):
    objective = reinforced(policies=["retriever", "generator"], kl_weight=0.5, entropy_weight=0.01)
    run = tiny_run(model=tiny_model(), objective=objective, max_steps=3)
    divergences = []
    original = objective._reinforce

    def noted(*arguments):
        loss, figures = original(*arguments)
        divergences.append(figures["kl"].detach())
        return loss, figures

    objective._reinforce = noted
    run.fit()
    assert divergences[0].abs().max() < 1e-5
    assert divergences[-1].abs().max() > 1e-3
    copies = [name for name in run.module.state_dict() if name.startswith("objective.start_")]
    assert copies, "a resumed run must know where it began"
    assert not any(weight.requires_grad for weight in objective.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": []}, "expected retriever, generator or both, got"),
        ({"policies": ["reader"]}, "expected retriever, generator or both, got"),
        ({"baseline": "mean"}, "expected leave_one_out or self_critical, got 'mean'"),
        ({"num_samples": 1}, "at least 2 with baseline=leave_one_out, got 1"),
        ({"alpha": 0.0}, "reinforce.alpha: expected a number above 0"),
        ({"kl_weight": -1.0}, "reinforce.kl_weight: expected 0 or more, got -1.0"),
        (
            {"reward": None},
            "reinforce.rewards: expected some of exact_match, f1, citation with weights above 0, got none",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    settings = {"objective": MarginalObjective(kind="rag_token"), "reward": by_length, **settings}
    build = inspect.unwrap(PolicyGradient.__init__)  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match=message):
        build(PolicyGradient.__new__(PolicyGradient), **settings)


def test_objectives_without_passages_read_apart_are_refused():
    for objective in (ClosedBook(), Contrastive(), MarginalObjective(kind="stuffed")):
        with pytest.raises(ConfigError, match="reinforce: expected an objective that reads retrieved passages apart"):
            PolicyGradient(objective=objective, rewards={"f1": 1.0})


def test_policies_that_are_frozen_are_refused(tiny_run, tiny_model):
    with pytest.raises(ConfigError, match="the generator is frozen. Set optim.train_generator=true"):
        tiny_run(objective=reinforced(policies=["retriever", "generator"]), optim={"train_generator": False})
    losses = {"pdist": PerplexityDistillation()}
    objective = PolicyGradient(
        objective=MarginalObjective(kind="rag_token", retriever_losses=losses), rewards={"f1": 1.0}
    )
    with pytest.raises(ConfigError, match="no part of it learns|no part of the retriever learns"):
        tiny_run(objective=objective, optim={"train_query_encoder": False})


def test_fewer_candidates_than_passages_are_refused(tiny_run, ready, monkeypatch):
    with pytest.raises(ConfigError, match="reinforce.num_candidates: expected at least K=3, got 2"):
        tiny_run(objective=reinforced(num_candidates=2))
    objective = reinforced()
    run, batch = ready(objective)
    model, found = run.module.model, run.module.model.retrieve

    def poorly(*arguments, **settings):
        hits, scores = found(*arguments, **settings)
        return hits, scores.masked_fill(torch.arange(scores.shape[1]) > 1, -torch.inf)

    monkeypatch.setattr(model, "retrieve", poorly)
    with pytest.raises(DataError, match="at least K=3 candidates to draw from for each question, found 2 for 'q"):
        objective(model, batch, sources_of(run))


def test_stop_strings_end_the_answers_that_are_judged(ready):
    objective = reinforced(policies=["generator"], num_samples=50)
    run, batch = ready(objective)
    model = run.module.model
    run.module.eval()
    word = model.generator.tokenizer.decode([20]).strip()
    model.generator.model.final_logits_bias[0, 20] = 4.0
    model.decoding_options = replace(model.decoding_options, stop=(word,))
    seen = []
    objective.reward = lambda attempt: seen.append(attempt.answer) or 0.5
    objective._reinforce(model, batch, sources_of(run))
    assert seen
    assert not any(word in answer for answer in seen)


def test_what_only_a_retriever_has_is_refused_without_one():
    for settings in ({"entropy_weight": 0.1}, {"num_candidates": 9}):
        with pytest.raises(ConfigError, match=f"reinforce.{next(iter(settings))}: is the retriever's"):
            reinforced(policies=["generator"], **{"num_candidates": None, **settings})


def test_a_start_that_is_not_kept_whole_is_refused(tiny_run):
    with pytest.raises(ConfigError, match="kl_weight: expected a retriever whose query encoder alone learns"):
        tiny_run(objective=reinforced(kl_weight=0.1), optim={"train_passage_encoder": True})


def test_losses_of_an_objective_that_counts_nothing_are_refused():
    base = MarginalObjective(kind="rag_token", retriever_losses={"pdist": PerplexityDistillation()})
    with pytest.raises(ConfigError, match="pdist would be computed and count nothing, as reinforce.likelihood_w"):
        PolicyGradient(objective=base, rewards={"f1": 1.0}, likelihood_weight=0.0)


def test_while_it_waits_every_part_that_learns_has_a_gradient(ready):
    """Several processes wait for each other's gradients; a part that the loss does not reach would stop them."""
    objective = reinforced("fid", likelihood_weight=1.0, alpha_delay_steps=5)
    run, batch = ready(objective)
    objective(run.module.model, batch, sources_of(run)).loss_B.sum().backward()
    gradients = [weight.grad for weight in run.module.model.encoder.query.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
