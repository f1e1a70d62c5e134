"""What a sweep checks before its first job, and what it makes of earlier ones."""

from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from rag_lightning.cli.sweeping.checks import check_setting, fits
from rag_lightning.cli.sweeping.records import RECORD_FILE, JobRecord, differences, read_record
from rag_lightning.cli.sweeping.search import _corners
from rag_lightning.cli.sweeping.sweeper import check_launcher, quoted_value, shared_threads
from rag_lightning.errors import ConfigError, DataError, MissingExtraError
from rag_lightning.training.study import Dimension


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (None, int | None, True),
        (None, int, False),
        (1, float, True),
        ("1", float, False),
        (True, int, False),
        (True, bool | None, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1], list[int], True),
        ([1], str, False),
        ({"a": 1}, dict[str, int], True),
        (3, list[int] | str | int, True),
        ("anything", Path | None, True),
        ("anything", object, True),
    ],
)
def test_a_value_fits_its_annotation(value: object, annotation: object, expected: bool) -> None:
    assert fits(value, annotation) is expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr_generator", "half", r"optim.lr_generator: expected float, got 'half' \(str\)"),
        ("optim.lr_generater", 1, r"expected a setting of OptimSettings \(lr_query_encoder, .*got 'lr_generater'"),
        ("trainer.max_steps", 1.5, r"trainer.max_steps: expected int, got 1.5"),
        ("model.num_passages", None, r"model.num_passages: expected int, got None"),
        ("model.objective", "rag", r"model.objective: expected one of rag_token, .*got 'rag'"),
        ("seed", "x", r"seed: expected int or null, got 'x'"),
        ("optim.lr_generator", 1, None),
        ("trainer.devices", "auto", None),
        ("model.prompt", {}, None),
        ("loose.anything", "goes", None),
    ],
)
def test_a_setting_is_held_against_its_constructor(key: str, value: object, message: str | None) -> None:
    config = OmegaConf.create(
        {
            "seed": 0,
            "optim": {"_target_": "rag_lightning.training.optim.OptimSettings"},
            "trainer": {"_target_": "lightning.Trainer"},
            "model": {"num_passages": 5},
            "loose": {},
        }
    )
    OmegaConf.update(config, key, value)
    if message is None:
        check_setting(config, key)
        return
    with pytest.raises(ConfigError, match=message):
        check_setting(config, key)


def test_where_a_run_lies_is_no_difference() -> None:
    before = {"paths": {"run_dir": "a"}, "resume": None, "a": {"b": 1, "c": [1]}, "gone": 2}
    now = {"paths": {"run_dir": "b"}, "resume": "a", "a": {"b": 1, "c": [2]}, "new": 3}
    assert differences(before, now) == ["a.c: [1] -> [2]", "gone: 2 -> (none)", "new: (none) -> 3"]


def test_a_record_comes_back_and_a_torn_one_is_named(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    JobRecord(number=1, overrides=("seed=1",), config={"seed": 1}).write(tmp_path)
    record = read_record(tmp_path)
    assert record == JobRecord(number=1, overrides=("seed=1",), config={"seed": 1})
    assert record is not None
    assert record.become(tmp_path, "failed", error="no") == read_record(tmp_path)
    (tmp_path / RECORD_FILE).write_text("{}")
    with pytest.raises(DataError, match="sweep_job.json: expected the record of a sweep's job .*Remove the folder"):
        read_record(tmp_path)


def test_any_folder_can_be_said_to_a_job() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("objective=a,seed=0", "it's", "a\\b", "{x}[1]"):
        (override,) = OverridesParser.create().parse_overrides([f"hydra.sweep.subdir={quoted_value(text)}"])
        assert override.value() == text


@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib", "joblib"), ("slurm", "submitit"), ("submitit_local", "submitit")]
)
def test_a_missing_launcher_names_the_extra(launcher: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rag_lightning.cli.sweeping import sweeper

    monkeypatch.setattr(sweeper.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"hydra-{package}-launcher.*rag_lightning\[sweeps\]"):
        check_launcher([f"hydra/launcher={launcher}"])
    check_launcher(["hydra/launcher=basic", "seed=0"])


def test_local_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with shared_threads("x.LocalLauncher", 3):
        assert os.environ["OMP_NUM_THREADS"] == "2"
    with shared_threads("x.SlurmLauncher", 3):
        assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with shared_threads("x.LocalLauncher", 3):
        assert os.environ["OMP_NUM_THREADS"] == "5"


def test_corners_touch_every_choice_and_both_ends() -> None:
    space = {"a": Dimension(choices=("x", None, True)), "b": Dimension(low=1, high=4, whole=True)}
    assert _corners(space) == [["a=x", "b=1"], ["a=null", "b=4"], ["a=true", "b=1"]]
