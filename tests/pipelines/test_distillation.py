"""A teacher and its students by the command line: soft targets, a cache, the teacher's answers, resuming."""

import json

import pytest

from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.utils.io import read_json


@pytest.fixture(scope="module")
def teacher(cli, tiny_train, tmp_path_factory):
    """A two-step run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    cli("train", folder, *tiny_train)
    return folder


@pytest.mark.parametrize("place", ["", "model", "checkpoints/last.ckpt"])
def test_any_form_of_a_saved_model_teaches(place, teacher, cli, tiny_train, tmp_path):
    settings = ("distill=soft", f"distill.teacher={teacher / place}", "distill.posterior_weight=1")
    cli("train", tmp_path / "run", *tiny_train, *settings)
    header = next((tmp_path / "run" / "logs").rglob("metrics.csv")).read_text(encoding="utf-8").splitlines()[0]
    assert {"train/hard", "train/soft", "train/posterior"} <= {*header.split(",")}
    names = {path.name for path in (tmp_path / "run" / "model").rglob("*.safetensors")}
    assert names == {path.name for path in (teacher / "model").rglob("*.safetensors")}
    assert read_json(tmp_path / "run" / "metrics.json")["num_questions"] == 5


def test_a_run_that_is_taught_can_be_resumed_and_evaluated(teacher, cli, tiny_train, tmp_path):
    run, settings = tmp_path / "run", ("distill=posterior", f"distill.teacher={teacher}")
    cli("train", run, *tiny_train, *settings)
    cli("train", run, f"resume={run}", "trainer.max_steps=3")
    cli("evaluate", tmp_path / "evaluated", f"checkpoint={run}", f"output={tmp_path / 'evaluated'}")
    assert (tmp_path / "evaluated" / "metrics.json").is_file()


def test_a_closed_book_student_is_taught_from_a_cache(teacher, cli, tiny_train, tmp_path):
    kept = [text for text in tiny_train if not text.startswith("model.num_passages")]
    settings = ("objective=closed_book", "callbacks=no_validation", "distill=soft", "distill.passages=own")
    settings += (f"distill.teacher={teacher}", f"distill.cache={tmp_path / 'cache'}", "distill.top_tokens=8")
    weights = []
    for name in ("first", "second"):
        cli("train", tmp_path / name, *kept, *settings)
        weights.append((tmp_path / name / "model" / "generator" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1], "the second run learns the same from what the first one kept"
    assert len(list((tmp_path / "cache").glob("*/part-*.safetensors"))) == 2


def test_a_student_of_the_teachers_answers(teacher, cli, tiny_train, tiny_world, tmp_path):
    taught = tmp_path / "taught.jsonl"
    cli("predict", tmp_path / "p", f"checkpoint={teacher}", f"questions={tiny_world.train}", f"output={taught}")
    lines = [json.loads(line) for line in taught.read_text(encoding="utf-8").splitlines()]
    said = [{**line, "answer": line["answer"] or "nothing"} for line in lines]
    taught.write_text("".join(json.dumps(line) + "\n" for line in said), encoding="utf-8")
    cli("train", tmp_path / "run", *tiny_train, f"data.answers_from={taught}")
    assert (tmp_path / "run" / "model").is_dir()


def test_a_teacher_that_is_not_there_or_speaks_otherwise_is_refused(teacher, cli, tiny_train, tmp_path):
    with pytest.raises(SystemExit, match=r"distill.teacher: no such file: .*gone.ckpt"):
        cli("train", tmp_path / "a", *tiny_train, "distill=soft", f"distill.teacher={tmp_path / 'gone.ckpt'}")
    with pytest.raises(SystemExit, match="gone"):
        cli("train", tmp_path / "b", *tiny_train, "distill=soft", f"distill.teacher={tmp_path / 'gone'}")
    with pytest.raises(SystemExit, match=r"distill.temperature: expected a number above 0, got 0"):
        cli("train", tmp_path / "c", *tiny_train, "distill=soft", f"distill.teacher={teacher}", "distill.temperature=0")
    train_word_tokenizer(["quite other words"], vocab_size=60).save_pretrained(tmp_path / "words")
    other = [text for text in tiny_train if not text.startswith("generator.tokenizer")]
    other += [f"generator.tokenizer={tmp_path / 'words'}", "distill=soft", f"distill.teacher={teacher}"]
    with pytest.raises(SystemExit, match=r"distill.teacher=.*expected a teacher of the student's vocabulary"):
        cli("train", tmp_path / "d", *other)
