"""Who learns, how fast, and along which curve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.errors import CheckpointError, ConfigError
from rag_lightning.rag import RagModel
from rag_lightning.retrieval.fusion import ConvexFusion, GatedFusion, ReciprocalRankFusion
from rag_lightning.training.module import RagLightningModule
from rag_lightning.training.optim import (
    OptimSettings,
    build_optimizer,
    build_scheduler,
    check_learns,
    freeze_all_but,
    modules_of,
    parameter_groups,
    rate_factor,
)

NAMES = ("adamw", "adamw_fused")
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


# ---------------------------------------------------------------------- the fusion


def with_fusion(model, fusion):
    model.fusion = fusion
    return model


def test_a_learned_gate_is_a_part_with_its_own_rate(tiny_model):
    model = with_fusion(tiny_model(), GatedFusion(dimension=16))
    assert list(modules_of(model))[-1] == "fusion"
    freeze_all_but(model, ("fusion",))
    groups = {group["name"]: group for group in parameter_groups(model, OptimSettings(lr_fusion=0.5, weight_decay=0.1))}
    assert set(groups) == {"fusion", "fusion/no_decay"}
    assert groups["fusion"]["lr"] == groups["fusion/no_decay"]["lr"] == 0.5
    assert groups["fusion"]["params"] == [model.fusion.gate.weight]
    freeze_all_but(model, ALL)
    assert not any(parameter.requires_grad for parameter in model.fusion.parameters())


@pytest.mark.parametrize("fusion", [None, ReciprocalRankFusion(), ConvexFusion()])
def test_a_fusion_that_learns_nothing_is_no_part(tiny_model, fusion):
    model = with_fusion(tiny_model(), fusion)
    assert "fusion" not in modules_of(model)
    freeze_all_but(model, (*ALL, "fusion"))
    assert not any(group["name"].startswith("fusion") for group in parameter_groups(model, OptimSettings()))


def test_training_the_gate_is_a_setting(tiny_model):
    assert OptimSettings().trained_parts(("generator", "fusion")) == ("generator", "fusion")
    assert OptimSettings(train_fusion=False).trained_parts(("generator", "fusion")) == ("generator",)


class Teaches:
    """A retriever, as far as the check looks."""

    snapshot_id = "some-index"
    corpus = needs_vectors = None

    def __init__(self, *parts):
        self.gradient_to = parts

    def retrieve(self, *_):
        raise AssertionError("the check searches nothing")

    vectors = scores = evidence = retrieve


ENCODERS = ("query_encoder", "passage_encoder")


@pytest.mark.parametrize(
    ("taught", "trained"),
    [
        (ENCODERS, ALL),
        (ENCODERS, (*ALL, "generator")),
        ((*ENCODERS, "fusion"), (*ALL, "fusion")),
        ((), ("generator",)),
        ((), ()),
    ],
)
def test_parts_that_the_retriever_teaches_may_train(tiny_model, taught, trained):
    check_learns(with_fusion(tiny_model(), GatedFusion(dimension=16)), Teaches(*taught), trained)


@pytest.mark.parametrize(
    ("taught", "trained", "part"),
    [
        ((), ("query_encoder", "generator"), "query_encoder"),
        ((), ("passage_encoder",), "passage_encoder"),
        (ENCODERS, ("query_encoder", "fusion"), "fusion"),
    ],
)
def test_a_part_that_would_never_learn_is_refused(tiny_model, taught, trained, part):
    model = with_fusion(tiny_model(), GatedFusion(dimension=16))
    words = part.replace("_", " ")
    message = rf"optim.train_{part}=true, but retriever some-index gives a gradient to .* on the {words}, which would"
    with pytest.raises(ConfigError, match=rf"{message} never learn. Set optim.train_{part}=false"):
        check_learns(model, Teaches(*taught), trained)


def test_a_part_that_the_model_lacks_is_not_missed(tiny_generator):
    check_learns(RagModel(encoder=None, generator=tiny_generator()), Teaches(), (*ALL, "fusion"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_generator": 0.0}, r"optim.lr_generator: expected a positive number, got 0.0; .*train_generator=false"),
        ({"lr_query_encoder": float("nan")}, "optim.lr_query_encoder: expected a positive number, got nan"),
        ({"lr_fusion": 0.0}, r"optim.lr_fusion: expected a positive number, got 0.0; .*train_fusion=false"),
        ({"lr_passage_encoder": -1.0}, "optim.lr_passage_encoder: expected a positive number, got -1.0"),
        (
            {"checkpoint_activations": ["generator", "fusion"]},
            "optim.checkpoint_activations: expected some of query_encoder, .*generator, got fusion",
        ),
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


def test_an_unknown_optimiser_is_refused():
    settings = OptimSettings()
    object.__setattr__(settings, "name", "adam")
    with pytest.raises(ConfigError, match="optim.name: expected one of adamw, adamw_fused, adamw_8bit, got 'adam'"):
        settings.__post_init__()


def test_the_fused_optimiser_goes_the_same_way(tiny_model):
    models = [tiny_model() for _ in NAMES]
    for model, name in zip(models, NAMES, strict=True):
        freeze_all_but(model, ALL)
        settings = OptimSettings(name=name, lr_generator=1e-2, lr_query_encoder=3e-3, weight_decay=0.1, warmup_steps=3)
        optimizer = build_optimizer(model, settings)
        assert {group["fused"] for group in optimizer.param_groups} == {True if name == "adamw_fused" else None}
        scheduler = build_scheduler(optimizer, settings, total_steps=12)
        draws = torch.Generator().manual_seed(1)
        for _ in range(12):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draws)
            optimizer.step()
            scheduler.step()
    start = tiny_model()
    for name, weight in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name), weight, rtol=1e-5, atol=1e-6, msg=name)
        assert (weight - start.get_parameter(name)).abs().max() > 1e-5, name


def test_a_run_with_the_fused_optimiser_is_the_plain_one(tiny_run):
    plain, fused = (tiny_run(optim={"name": name, "warmup_steps": 2}, max_steps=6).fit() for name in NAMES)
    assert [run.trainer.optimizers[0].param_groups[0]["fused"] for run in (plain, fused)] == [None, True]
    assert fused.recorder.losses == pytest.approx(plain.recorder.losses, rel=1e-4)
    assert fused.recorder.rates == plain.recorder.rates


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("name", NAMES)
def test_another_optimisers_state_is_refused_and_its_own_resumed(name, tiny_run, tmp_path):
    """torch would take the saved groups whole, ``fused`` included: the setting would do nothing."""
    settings = {"index_dir": tmp_path / "index", "max_steps": 4}
    every_step = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole = tiny_run(optim={"name": name}, callbacks=[every_step], **settings).fit()
    (other,) = {*NAMES} - {name}
    with pytest.raises(CheckpointError, match=f"expected the state of optim.name={other}, came that of {name}"):
        tiny_run(optim={"name": other}, **settings).fit(tmp_path / "step=2.ckpt")
    again = tiny_run(optim={"name": name}, **settings).fit(tmp_path / "step=2.ckpt")
    assert again.recorder.losses == whole.recorder.losses[2:]
    for key, weight in whole.weights().items():
        torch.testing.assert_close(again.weights()[key], weight, rtol=0, atol=0, msg=key)


def test_a_checkpoint_from_before_optimisers_had_names_is_adamws():
    module = RagLightningModule.__new__(RagLightningModule)
    torch.nn.Module.__init__(module)
    module.optim = OptimSettings(name="adamw_fused")
    with pytest.raises(CheckpointError, match="came that of adamw"):
        module.on_load_checkpoint({"state_dict": {}})
    module.optim = OptimSettings()
    module.on_load_checkpoint({"state_dict": {}})


def test_frozen_settings_name_the_parts_that_train():
    settings = OptimSettings(train_query_encoder=False, train_passage_encoder=True)
    assert settings.trained_parts(("query_encoder", "passage_encoder")) == ("passage_encoder",)
    assert settings.trained_parts(("generator",)) == ("generator",)
