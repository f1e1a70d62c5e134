"""Who learns, how fast, and along which curve."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_lightning.errors import ConfigError
from rag_lightning.training.optim import (
    OptimSettings,
    build_optimizer,
    build_scheduler,
    freeze_all_but,
    parameter_groups,
    rate_factor,
)

ALL = ("query_encoder", "passage_encoder", "generator")


def expected(schedule: str, step: int, warmup: int, total: int, power: float) -> float:
    """The curves written down once more, from their definitions."""
    if step < warmup:
        return (step + 1) / warmup
    left = max(0.0, (total - step) / (total - warmup))
    return {
        "constant": 1.0,
        "linear": left,
        "cosine": math.cos((1 - left) * math.pi / 2) ** 2,
        "polynomial": left**power,
    }[schedule]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "polynomial"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_schedules_follow_their_definitions_in_the_optimiser(schedule, warmup, tiny_model):
    model = tiny_model()
    settings = OptimSettings(schedule=schedule, warmup_steps=warmup, power=2.5, lr_generator=0.5, lr_query_encoder=0.25)
    freeze_all_but(model, ("query_encoder", "generator"))
    optimizer = build_optimizer(model, settings)
    scheduler = build_scheduler(optimizer, settings, total_steps=12)
    for step in range(13):
        factor = expected(schedule, step, warmup, 12, 2.5)
        for group in optimizer.param_groups:
            peak = 0.5 if group["name"].startswith("generator") else 0.25
            assert group["lr"] == pytest.approx(peak * factor, abs=1e-12), (step, group["name"])
        optimizer.step()
        scheduler.step()


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine", "polynomial"]),
    warmup=st.integers(0, 20),
    total=st.integers(1, 50),
    step=st.integers(0, 200),
)
def test_rates_stay_within_their_peak_whatever_the_lengths(schedule, warmup, total, step):
    factor = rate_factor(OptimSettings(schedule=schedule, warmup_steps=warmup), total)
    assert 0.0 <= factor(step) <= 1.0
    assert factor(0) > 0.0 or total <= warmup


def test_groups_have_their_own_rates_and_spare_biases_from_decay(tiny_model):
    model = tiny_model()
    freeze_all_but(model, ALL)
    rates = {"lr_query_encoder": 1e-3, "lr_passage_encoder": 2e-3, "lr_generator": 3e-3}
    groups = {group["name"]: group for group in parameter_groups(model, OptimSettings(**rates, weight_decay=0.1))}
    assert set(groups) == {part + suffix for part in ALL for suffix in ("", "/no_decay")}
    for part in ALL:
        assert groups[part]["lr"] == groups[part + "/no_decay"]["lr"] == rates[f"lr_{part}"]
        assert groups[part]["weight_decay"] == 0.1
        assert groups[part + "/no_decay"]["weight_decay"] == 0.0
        assert all(parameter.ndim >= 2 for parameter in groups[part]["params"])
        assert all(parameter.ndim < 2 for parameter in groups[part + "/no_decay"]["params"])
    members = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())  # each once


def test_shared_towers_are_one_group(tiny_model):
    model = tiny_model(shared=True)
    freeze_all_but(model, ALL)
    members = [id(parameter) for group in parameter_groups(model, OptimSettings()) for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))


@pytest.mark.parametrize("trained", [("query_encoder",), ("passage_encoder", "generator")])
def test_shared_towers_with_one_side_frozen_are_refused(trained, tiny_model):
    with pytest.raises(ConfigError, match="towers are shared .* train both or freeze both"):
        freeze_all_but(tiny_model(shared=True), trained)


def test_nothing_to_train_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="nothing to train: .*Set one of optim.train_query_encoder"):
        freeze_all_but(tiny_model(), ())
    with pytest.raises(ConfigError, match=r"nothing to train: .*the model has \['generator'\]"):
        freeze_all_but(tiny_model(num_passages=0), ("query_encoder",))


def test_freezing_is_undone_for_parts_that_train(tiny_model):
    model = tiny_model()
    freeze_all_but(model, ("generator",))
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    freeze_all_but(model, ("query_encoder",))
    assert all(parameter.requires_grad for parameter in model.encoder.query.parameters())
    assert not any(parameter.requires_grad for parameter in model.generator.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_generator": 0.0}, r"optim.lr_generator: expected a positive number, got 0.0; .*train_generator=false"),
        ({"lr_query_encoder": float("nan")}, "optim.lr_query_encoder: expected a positive number, got nan"),
        ({"lr_passage_encoder": -1.0}, "optim.lr_passage_encoder: expected a positive number, got -1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps: expected 0 or more, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimSettings(**settings)


def test_an_unknown_schedule_is_refused():
    settings = OptimSettings()
    object.__setattr__(settings, "schedule", "step")  # past the type checks, which only tests have
    with pytest.raises(ConfigError, match="optim.schedule: expected one of constant, linear, .*, got 'step'"):
        settings.__post_init__()


def test_frozen_settings_name_the_parts_that_train():
    settings = OptimSettings(train_query_encoder=False, train_passage_encoder=True)
    assert settings.trained_parts(("query_encoder", "passage_encoder")) == ("passage_encoder",)
    assert settings.trained_parts(("generator",)) == ("generator",)
