"""Tasks end to end on tiny data: what is learnt, resumed, refused; heads plain and with retrieval."""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from rag_lightning.errors import ConfigError, DataError
from rag_lightning.heads.classification import ClassificationHead
from rag_lightning.heads.model import HeadOutput
from rag_lightning.methods.curriculum.bandits import Exp3Policy
from rag_lightning.methods.curriculum.graph import ActivityGraph
from rag_lightning.methods.curriculum.walk import Walk
from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.training.callbacks import RandomStateCallback
from rag_lightning.training.tasks.callbacks import TaskOutputCallback
from rag_lightning.training.tasks.data import EXAMPLES, IGNORED, TaskDataModule
from rag_lightning.training.tasks.module import example_losses
from rag_lightning.training.tasks.walking import WalkCallback
from rag_lightning.types import LabelledText
from rag_lightning.utils.io import read_json, read_json_lines
from tests.labelled_files import write_labelled
from tests.unit.heads import tiny
from tests.unit.training.tasks.tiny_run import Run, sst2, wikigold


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.mark.parametrize("num_passages", [0, 3])
@pytest.mark.parametrize("make", [sst2, wikigold])
def test_a_head_learns_what_can_be_learnt(make, num_passages, folder, tmp_path):
    task = make(folder)
    run = Run(tmp_path, [task], num_passages=num_passages, callbacks=[TaskOutputCallback(directory=str(tmp_path))])
    figures = run.fit().test()
    assert figures[f"test/{task.monitor}"] > 0.9
    assert figures[f"test/{task.name}/majority_{'accuracy' if task.kind != 'tagging' else 'tag_accuracy'}"] < 0.8
    predictions = [record for _, record in read_json_lines(tmp_path / "predictions.jsonl")]
    assert [record["id"] for record in predictions] == [example.id for example in run.data.examples[task.name]["test"]]
    right = sum(record["expected"] == record["predicted"] for record in predictions) / len(predictions)
    assert task.kind == "tagging" or right == pytest.approx(figures["test/accuracy"])
    assert all(len(record["passages"]) == num_passages for record in predictions)
    assert read_json(tmp_path / "metrics.json")[task.monitor] == pytest.approx(figures[f"test/{task.monitor}"])
    assert (tmp_path / "tags.json").is_file() == (task.kind == "tagging")


def test_retrieval_learns_to_ask_and_never_finds_the_example_itself(folder, tmp_path):
    run = Run(tmp_path, [sst2(folder)], num_passages=3, steps=1)
    before = copy.deepcopy(run.model.encoder.query.state_dict())
    run.fit()
    moved = [
        name for name, value in run.model.encoder.query.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert moved, "the query encoder learns through p(z|x)"
    batch = run.data.draw("sst2")
    output = run.module.judge(batch)
    assert not (output.hits.ids_BK == batch.forbidden_ids[:, None]).any()
    rows = [run.data.examples["sst2"]["train"].index(example) for example in batch.examples]
    assert batch.forbidden_ids.tolist() == rows


def test_tasks_take_turns_and_each_has_its_figures(folder, tmp_path):
    run = Run(tmp_path, [sst2(folder), wikigold(folder)], steps=60)
    figures = run.fit().test()
    assert figures["test/sst2/accuracy"] > 0.9
    assert figures["test/wikigold/f1"] > 0.9
    expected = (figures["test/sst2/accuracy"] + figures["test/wikigold/f1"]) / 2
    assert figures["test/mean"] == pytest.approx(expected)


def walk(names, seed=0):
    graph = ActivityGraph.from_dict({"nodes": dict.fromkeys(names)})
    return WalkCallback(walk=Walk(graph, Exp3Policy(graph, seed=seed), discount=0.5), probe_size=4)


@pytest.mark.parametrize("stop", [3, 6])
def test_a_resumed_run_goes_the_same_way(stop, folder, tmp_path):
    """Weights, batches of each task, and the walk with its policy, in the middle of an epoch too."""

    def run(root, steps, checkpoint=None):
        saver = ModelCheckpoint(dirpath=str(root / "checkpoints"), save_last=True, every_n_train_steps=1)
        path = walk(("sst2", "wikigold"))
        tasks = [sst2(folder), wikigold(folder)]
        made = Run(root, tasks, steps=steps, callbacks=[path, RandomStateCallback(), saver], lr=1e-3)
        return made.fit(checkpoint), path

    whole, whole_path = run(tmp_path / "whole", 12)
    run(tmp_path / "part", stop)
    again, path = run(tmp_path / "part", 12, tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert path.walk.history == whole_path.walk.history
    assert len(path.walk.history) == 12
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_run_goes_on_after_a_step_that_failed(folder, tmp_path):
    """The checkpoint of an exception holds what was before the step: its task, and the batch that it had drawn."""

    def run(root, steps, *, fails_at=None, checkpoint=None):
        saver = ModelCheckpoint(dirpath=str(root / "checkpoints"), save_last=True, save_on_exception=True)
        callback = walk(("sst2", "wikigold"))
        made = Run(
            root, [sst2(folder), wikigold(folder)], steps=steps, callbacks=[saver, callback, RandomStateCallback()]
        )
        judge = made.module.judge

        def failing(batch, change=None):
            if made.module.training and made.module.global_step == fails_at:
                raise RuntimeError("out of memory")
            return judge(batch, change)

        made.module.judge = failing
        made.fit(checkpoint)
        return made, callback

    whole, path = run(tmp_path / "whole", 6)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "part", 6, fails_at=4)
    saved = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 4
    resumed, again = run(tmp_path / "part", 6, checkpoint=str(saved))
    assert again.walk.history == path.walk.history
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


def test_a_task_without_test_examples_is_left_out(folder, tmp_path):
    run = Run(tmp_path, [sst2(folder), wikigold(folder)], steps=2)
    run.data.examples["wikigold"].pop("test")
    figures = run.fit().test()
    assert figures["test/mean"] == pytest.approx(figures["test/sst2/accuracy"])
    assert not any("wikigold" in name for name in figures)


def test_the_walk_is_rewarded_with_the_drop_of_the_held_out_loss(folder, tmp_path):
    path = walk(("sst2", "wikigold"))
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(path._before)

    run = Run(tmp_path, [sst2(folder), wikigold(folder)], steps=5, callbacks=[path, Watch()], lr=1e-3)
    start = []
    original = path.on_train_start
    path.on_train_start = lambda *arguments: (original(*arguments), start.append(path._before))
    run.fit()
    drops = [before - after for before, after in zip([*start, *seen], seen, strict=False)]
    assert [step.reward for step in path.walk.history] == pytest.approx(drops)
    assert path.walk.visits["sst2"] + path.walk.visits["wikigold"] == 5
    assert math.isclose(path._held_out_loss(run.trainer, run.module), seen[-1], rel_tol=1e-5)


def test_the_loss_of_tags_counts_judged_words_alone():
    log_probs = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]], [[0.2, 0.8], [0.3, 0.7], [0.4, 0.6]]]).log()
    labels = torch.tensor([[0, 1, 1], [1, IGNORED, IGNORED]])
    loss, units = example_losses(HeadOutput(log_probs, torch.tensor([[1, 2, -1], [1, -1, -1]])), labels)
    torch.testing.assert_close(loss, -torch.tensor([0.5 * 0.75, 0.8]).log())
    assert units.tolist() == [2.0, 1.0]


def test_a_share_of_the_examples_is_the_same_for_one_seed(folder, tmp_path):
    few = [TaskDataModule(tasks=[sst2(folder)], train_share=0.5, seed=seed) for seed in (0, 0, 1)]
    ids = [[example.id for example in one.examples["sst2"]["train"]] for one in few]
    assert len(ids[0]) == 8
    assert ids[0] == ids[1] != ids[2]


def test_bad_input_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="task.form=tagged: does not fit task.kind=classification"):
        sst2(folder, form="tagged")
    with pytest.raises(ConfigError, match="task.divide: expected one file"):
        sst2(folder, divide=(0.8, 0.1, 0.1))
    with pytest.raises(ConfigError, match="task.validation_share: expected no task.validation"):
        sst2(folder, validation_share=0.1)
    with pytest.raises(ConfigError, match="expected one task or more, each of its own name, got"):
        TaskDataModule(tasks=[])
    with pytest.raises(ConfigError, match="task.train_share: expected a share above 0"):
        TaskDataModule(tasks=[sst2(folder)], train_share=0.0)
    with pytest.raises(ConfigError, match="task.limit_eval: expected 2 or more, or null for all, got 1"):
        TaskDataModule(tasks=[sst2(folder)], limit_eval=1)
    with pytest.raises(ConfigError, match="task.passages=examples: expected one task"):
        TaskDataModule(tasks=[sst2(folder), wikigold(folder)], passages=EXAMPLES)
    data = TaskDataModule(tasks=[sst2(folder)], passages=EXAMPLES)
    with pytest.raises(ConfigError, match="task.num_passages=0 with task.passages=examples: expected both"):
        data.bind(tiny.model(ClassificationHead(width=16, num_labels=2)))
    with pytest.raises(DataError, match="task sst2, example 'x': expected one of the labels seen in training"):
        data.batch("sst2", [LabelledText("x", "a film", "mixed")], [1.0], [-1])
    strange = tiny.model()
    strange.reader.tokenizer = train_word_tokenizer(["电影"], vocab_size=50)
    with pytest.raises(DataError, match="expected a tokenizer that knows the texts"):
        TaskDataModule(tasks=[sst2(folder)]).bind(strange)
    with pytest.raises(ConfigError, match=r"expected the run's activities as nodes \(sst2\), got other"):
        Run(tmp_path, [sst2(folder)], steps=1, callbacks=[walk(("other", "sst2"))]).fit()
    with pytest.raises(ConfigError, match="curriculum.probe_size: expected 1 or more held-out examples, got 0"):
        WalkCallback(walk=walk(("a",)).walk, probe_size=0)
