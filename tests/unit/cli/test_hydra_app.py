"""Where the configuration is, resolvers, and what an error becomes."""

from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from rag_lightning.cli import hydra_app
from rag_lightning.cli.hydra_app import conf_dir, register_resolvers, speaking, sweep_folder, swept_settings
from rag_lightning.errors import ConfigError


def test_a_checkout_uses_its_own_configuration() -> None:
    assert conf_dir() == Path(__file__).parents[3] / "conf"


def test_an_installed_package_uses_the_configuration_inside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hydra_app, "INSTALLED_CONF", tmp_path)
    assert conf_dir() == tmp_path


def test_the_run_folder_is_the_resumed_one() -> None:
    register_resolvers()
    config = OmegaConf.create({"resume": None, "place": "${run_dir:${resume},outputs/new}"})
    assert config.place == "outputs/new"
    config.resume = "outputs/old"
    assert config.place == "outputs/old"


def test_basename_is_the_last_part() -> None:
    register_resolvers()
    assert OmegaConf.create({"a": "${basename:films/joint}"}).a == "joint"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-m", "seed=0,1", "objective=rag_token"], ["seed"]),
        (["seed=range(0,3)", "+new.key=1,2"], ["seed", "new.key"]),
        (["optim.lr_generator=1e-3", "list=[1,2]", "text='a,b'"], []),
        (["seed=0,1", "broken=[1"], []),
        ([], []),
    ],
)
def test_swept_settings_are_those_with_several_values(arguments: list[str], expected: list[str]) -> None:
    assert swept_settings(arguments) == expected


@pytest.mark.parametrize(
    ("overrides", "swept", "expected"),
    [
        (["data.train=a/b.jsonl", "seed=1"], ["seed"], "seed=1"),
        (["experiment=films/joint", "seed=1"], ["experiment", "seed"], "experiment=films-joint,seed=1"),
        (["+x=1"], ["x"], "+x=1"),
        (["seed=1"], [], "7"),
        (["text=" + "x" * 300], ["text"], "7"),
    ],
)
def test_a_sweeps_folder_says_what_varies(overrides: list[str], swept: list[str], expected: str) -> None:
    assert sweep_folder(overrides, 7, swept) == expected


def test_speaking_passes_values_through() -> None:
    assert speaking(lambda config: config.a + 1, OmegaConf.create({"a": 1})) == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_error_for_people_ends_with_its_message(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def task(config: DictConfig) -> None:
        error = ConfigError("k: expected 1, got 2")
        if wrapped:
            raise InstantiationException("Error in call to target") from error
        raise error

    with pytest.raises(SystemExit, match=r"^error: k: expected 1, got 2$"):
        speaking(task, OmegaConf.create())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InstantiationException if wrapped else ConfigError):
        speaking(task, OmegaConf.create())


def test_a_missing_value_is_named() -> None:
    config = OmegaConf.create({"data": {"train": "???"}})
    with pytest.raises(
        SystemExit, match=r"^error: data\.train: expected a value, came none\. Give one: data\.train=…$"
    ):
        speaking(lambda config: config.data.train, config)


def test_errors_of_our_own_keep_their_traceback() -> None:
    def task(config: DictConfig) -> None:
        raise InstantiationException("not ours") from TypeError("a bug")

    with pytest.raises(InstantiationException, match="not ours"):
        speaking(task, OmegaConf.create())
    with pytest.raises(ZeroDivisionError):
        speaking(lambda config: 1 / 0, OmegaConf.create())
