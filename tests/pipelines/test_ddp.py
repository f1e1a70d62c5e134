"""Two processes are one: the same losses, weights and figures as a single process, with batches that do not divide."""

import contextlib
import csv
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from lightning.pytorch.strategies import FSDPStrategy
from safetensors.torch import load_file

from rag_lightning.cli.build import build_trainer, instantiate
from rag_lightning.cli.hydra_app import conf_dir, register_resolvers
from tests.generation_files import write_generation
from tests.labelled_files import write_labelled
from tests.unit.heads import tiny

pytestmark = pytest.mark.ddp
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), "MASTER_ADDR": "127.0.0.1"}


def command(folder: Path, *overrides: str, processes: int) -> list[str]:
    strategy = ["trainer.strategy=ddp", f"trainer.devices={processes}"]
    return [sys.executable, "-m", "rag_lightning", "train", *overrides, *strategy, f"hydra.run.dir={folder}"]


def train(folder: Path, *overrides: str, processes: int) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does; Lightning starts the second process."""
    return subprocess.run(
        command(folder, *overrides, processes=processes),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def column(folder: Path, name: str, version: int = 0) -> dict[int, float]:
    with (folder / "logs" / f"version_{version}" / "metrics.csv").open() as stream:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(stream) if row.get(name)}


SETTINGS = [
    "trainer.max_steps=7",
    "trainer.log_every_n_steps=1",
    "optim.warmup_steps=2",
    "optim.lr_query_encoder=1e-2",
    "optim.lr_passage_encoder=1e-2",
    "optim.lr_generator=1e-2",
    "optim.eps=1e-3",  # a denominator of 1e-8 would magnify rounding
    "data.batch_size=5",
    "data.eval_batch_size=3",
    "generator.settings.dropout=0",
    "callbacks=no_validation",
    "trainer.check_val_every_n_epoch=2",
]
JOINT = ["objective=rag_token", "optim.train_passage_encoder=true", "reindex.schedule=2", "reindex.keep_last=9"]
ACCUMULATED = [
    "objective=rag_sequence",
    "trainer.accumulate_grad_batches=2",
    "data.batch_size=3",
    "trainer.check_val_every_n_epoch=1",
    "data.validation=null",
]


@pytest.fixture(scope="module")
def settings(tiny_model_overrides, tiny_data_overrides, tiny_questions, json_lines, tmp_path_factory):
    """11 questions in batches of 5, 5 and 1: the second is odd, the last leaves a process without a question."""
    path = json_lines(tmp_path_factory.mktemp("ddp") / "train.jsonl", tiny_questions[:11])
    return [*tiny_model_overrides, *tiny_data_overrides, f"data.train={path}", *SETTINGS]


def figures(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if name != "seconds"}


def predictions(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded = {}
    for file in (folder / "model").rglob("*.safetensors"):
        loaded |= {f"{file.parent.name}/{name}": value for name, value in load_file(file).items()}
    return loaded


def assert_same_run(one: Path, two: Path) -> None:
    for name, tolerance in (("train/loss", 1e-5), ("train/posterior_entropy", 1e-3), ("index/age_steps", 0.0)):
        mine, other = column(one, name), column(two, name)
        assert len(mine) >= 6
        assert other == pytest.approx(mine, rel=tolerance), name
    losses = list(column(one, "train/loss").values())
    assert min(losses) < losses[0] - 0.5  # something was learned
    assert figures(two) == pytest.approx(figures(one), rel=1e-4, abs=1e-4)
    for mine, other in zip(predictions(one), predictions(two), strict=True):
        assert (mine["id"], mine["answer"]) == (other["id"], other["answer"])
        assert [p["id"] for p in mine["passages"]] == [p["id"] for p in other["passages"]]
        assert mine["log_likelihood"] == pytest.approx(other["log_likelihood"], rel=1e-4)
    ours, theirs = weights(one), weights(two)
    assert len(ours) > 20
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def joint_one(cli, settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "one"
    cli("train", folder, *settings, *JOINT)
    return folder


def test_two_processes_are_one_with_uneven_batches_and_reindexing(joint_one, settings, tmp_path):
    done = train(tmp_path / "two", *settings, *JOINT, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Starting with 2 processes" in done.stderr
    assert_same_run(joint_one, tmp_path / "two")
    names = [
        sorted(path.name[:12] for path in (folder / "index").iterdir()) for folder in (joint_one, tmp_path / "two")
    ]
    assert names[0] == names[1] == [f"step{step:08d}" for step in (0, 2, 4, 6, 7)]  # 7 for the test
    for path in (tmp_path / "two" / "index").iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["num_vectors"] == 24  # both processes' shards


def test_two_processes_accumulate_as_one(cli, settings, tmp_path):
    cli("train", tmp_path / "one", *settings, *ACCUMULATED)
    done = train(tmp_path / "two", *settings, *ACCUMULATED, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_ctrl_c_ends_both_processes_and_the_run_goes_on_with_one(joint_one, cli, settings, tmp_path):
    """The terminal interrupts both; they end at the same step, and what they leave suits any number of processes."""
    folder = tmp_path / "run"
    process = start(folder, *settings, *JOINT, "trainer.max_steps=100000", processes=2)
    try:
        wait_until(lambda: (folder / "index").is_dir() and len(list((folder / "index").glob("step*"))) > 1, process)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=200)
    finally:
        end_group(process)
    assert process.returncode == 1, errors[-3000:]
    assert "Ctrl-C: ending after this step" in output
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    stopped_at = checkpoint["global_step"]
    assert stopped_at >= 2
    assert not (folder / "model").exists()
    alone = ["trainer.strategy=auto", "trainer.devices=1"]
    cli("train", folder, f"resume={folder}", f"trainer.max_steps={stopped_at + 3}", *alone)
    assert (folder / "model" / "rag_config.json").is_file()
    resumed = column(folder, "train/loss", version=1)
    assert list(resumed) == list(range(stopped_at, stopped_at + 3))


def start(folder: Path, *overrides: str, processes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *overrides, processes=processes),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives it
    )


def wait_until(condition, process: subprocess.Popen[str], timeout_s: float = 250) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def end_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def test_fsdp_composes_and_needs_a_gpu(settings, tmp_path):
    """Lightning refuses the strategy on CPU when the trainer is made, so two steps of it can only be tried on GPUs."""
    register_resolvers()
    overrides = ["trainer=fsdp", "trainer.devices=2", f"paths.run_dir={tmp_path}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        config = compose("train", overrides=[*settings, *overrides, "trainer.accelerator=cpu"])
        assert compose("train", overrides=[*settings, *overrides]).trainer.accelerator == "gpu"
    strategy = instantiate(config.trainer.strategy)
    assert isinstance(strategy, FSDPStrategy)
    with pytest.raises(InstantiationException, match="`fsdp` requires a GPU accelerator, but received .*cpu"):
        build_trainer(config, None)


# ---------------------------------------------------------------------- retrieval across processes

SPY = '''
import lightning as L
from pathlib import Path


class Spy(L.Callback):
    """Writes which snapshot each process searches after each step."""

    def __init__(self, *, folder: str, seconds: float = 0.0) -> None:
        self.folder = Path(folder)
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, *_):
        import time

        time.sleep(self.seconds * (1 + trainer.global_rank))  # processes that are never at the same place
        data = trainer.datamodule
        with (self.folder / f"rank-{trainer.global_rank}").open("a") as stream:
            stream.write(f"{trainer.global_step} {data.dense.snapshot_id} {data.dense.snapshot.index.num_vectors}\\n")
'''


@pytest.fixture
def spied(tmp_path, monkeypatch):
    (tmp_path / "spy_callback.py").write_text(SPY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def settings(folder: Path, seconds: float = 0.0) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        return [
            "+callbacks.spy._target_=spy_callback.Spy",
            f"+callbacks.spy.folder={folder}",
            f"+callbacks.spy.seconds={seconds}",
        ]

    return settings


@pytest.mark.parametrize("lag", [0, 2])
def test_an_asynchronous_refresh_of_two_processes_is_that_of_one(lag, settings, tmp_path):
    beside = [*settings, *JOINT, "reindex=async", "reindex.schedule=3", f"reindex.lag_steps={lag}"]
    for name, processes in (("one", 1), ("two", 2)):
        result = train(tmp_path / name, *beside, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_all_processes_take_a_snapshot_live_at_the_same_step(settings, spied, tmp_path):
    """The builder is ready at some moment; a process that sees it first does not go ahead."""
    beside = [*settings, *JOINT, "reindex=async", "reindex.schedule=10", "data.validation=null", "data.test=null"]
    overrides = [*beside, *spied(tmp_path / "seen", 0.05), "trainer.max_steps=150"]
    result = train(tmp_path / "run", *overrides, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = ((tmp_path / "seen" / f"rank-{rank}").read_text().splitlines() for rank in (0, 1))
    assert first == second
    assert len(first) == 150
    live = [int(line.split()[1][4:12]) for line in first]
    assert len(set(live)) >= 2, "no refresh was finished"
    swaps = [step for step, (old, new) in enumerate(itertools.pairwise(live), start=2) if old != new]
    assert all(step > live[step - 1] for step in swaps)  # some lag, since no step waited


@pytest.mark.parametrize("factory", ["exact", "Flat"])
def test_a_divided_index_trains_like_a_whole_one(factory, settings, tmp_path):
    if factory != "exact":
        pytest.importorskip("faiss")
    divided = [*settings, *JOINT, f"index.factory={factory}", "index.sharded=true"]
    for name, processes in (("one", 1), ("two", 2)):
        result = train(tmp_path / name, *divided, processes=processes)
        assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_two_processes_prepare_once_and_figure_texts_as_one(tmp_path):
    words = f"task=kdconv task.folder={write_generation(tmp_path / 'data')} encoder.settings.hidden_size=16"
    words += " model.num_passages=2 data.batch_size=5 data.eval_batch_size=5 data.limit_validation=3"
    words += " trainer.max_steps=2 trainer.val_check_interval=2 trainer.limit_test_batches=3 decoding.max_new_tokens=6"
    words += " trainer.enable_progress_bar=false optim.eps=1e-3"
    sizes = "d_model=16 encoder_layers=1 decoder_layers=1 encoder_ffn_dim=24 decoder_ffn_dim=24"
    words += "".join(f" generator.settings.{size}" for size in sizes.split())
    for processes, name in enumerate(("one", "two"), start=1):
        cache = f"paths.cache_dir={tmp_path / f'cache-{name}'}"
        done = train(tmp_path / name, *words.split(), cache, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = figures(tmp_path / "one"), figures(tmp_path / "two")
    assert {"bleu", "rougeL", "knowledge_f1"} <= set(one)
    assert two == pytest.approx(one, rel=1e-3, abs=1e-3)


def test_two_processes_walk_the_same_path_over_tasks(tmp_path):
    """Heads that rest are moved by neither; rewards, and so the policy's choices, are those of one process."""
    tokens, bert = tiny.tokenizer(), tmp_path / "bert"
    tiny.backbone(tokens).float().save_pretrained(bert)
    tokens.save_pretrained(bert)
    words = f"task=multitask curriculum=task_graph task.folder={write_labelled(tmp_path / 'data')}"
    words += f" reader=hf reader.source={bert} reader.max_tokens=32 task.data.allow_unknown=true"
    words += (
        " task.data.batch_size=5 task.data.eval_batch_size=3 optim.eps=1e-3 optim.lr_reader=1e-2 optim.lr_heads=1e-1"
    )
    words += " trainer.max_steps=8 trainer.val_check_interval=4 trainer.log_every_n_steps=1 optim.warmup_steps=0"
    words += " trainer.enable_progress_bar=false"
    words += "".join(f" +task.tasks.{name}.dropout=0" for name in ("sst2", "ag_news", "fever", "boolq"))
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, start=1):
        done = train(folder, *words.split(), processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = folders
    for name in ("sst2", "ag_news", "fever", "boolq"):
        visits = f"curriculum/visits/{name}"
        assert column(one, visits) == column(two, visits)
    assert column(two, "curriculum/reward") == pytest.approx(column(one, "curriculum/reward"), rel=1e-3, abs=1e-5)
    assert figures(two) == pytest.approx(figures(one), rel=1e-3, abs=1e-3)
    mine, other = weights(one), weights(two)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name], atol=1e-4, rtol=1e-3, msg=name)
