"""Run folders as train leaves them, made from code: what a report is to read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ANSWERS = ("Ada Ash", "Ben Birch", "Cleo Cedar", "Dan Dogwood")


def write_questions(folder: Path) -> tuple[Path, Path]:
    """Four questions, and a passage for each of the first three that holds its answer."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [
        {"id": f"q{n}", "question": f"who made film {n}", "answers": [answer], "positive_passage_ids": [f"p{n}"]}
        for n, answer in enumerate(ANSWERS)
    ]
    passages = [{"id": f"p{n}", "title": f"Film {n}", "text": f"By {answer}."} for n, answer in enumerate(ANSWERS[:3])]
    passages.append({"id": "p3", "title": "Film 3", "text": "Its maker is <script>alert(1)</script> unknown & $x."})
    for name, records in (("questions", questions), ("passages", passages)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder / "questions.jsonl", folder / "passages.jsonl"


def prediction(number: int, answer: str, *, by_token: bool = False) -> dict[str, Any]:
    """The answer to a question, with its own passage and another's."""
    found = [number, 3 if number == 0 else 0] if number < 3 else [3]
    passages = [
        {"id": f"p{one}", "title": f"Film {one}", "score": 1.0, "probability": 1 / (rank + 2), "posterior": 0.5}
        for rank, one in enumerate(found)
    ]
    record = {"id": f"q{number}", "question": f"who made film {number}", "answer": answer, "log_likelihood": -0.5}
    record["passages"] = passages
    if by_token:
        record["token_posteriors"] = {"tokens": ["a", "</s>"], "probabilities": [[0.9, 0.2]] * len(passages)}
    return record


def write_run(
    folder: Path,
    answers: Sequence[str] | None,
    *,
    seed: int = 0,
    experiment: str | None = "rag/table6_rag_token",
    data: Path | None = None,
    commit: str = "0123456789abcdef",
    choices: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """A run's folder; without answers it has not finished."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"seed": seed, "paths": {"run_dir": str(folder)}, "data": {"seed": seed}}
    config |= {"settings": dict(settings or {}), "monitor": f"{folder}/x"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    record: dict[str, Any] = {
        "commit": commit,
        "overrides": [f"seed={seed}"],
        "choices": {"scale": "paper", **(choices or {})},
    }
    record["overrides"] += [f"settings.{key}={value}" for key, value in (settings or {}).items()]
    if experiment is not None:
        record["choices"]["experiment"] = experiment
    if data is not None:
        record["data"] = {name: {"file": str(data / file)} for name, file in FILES.items()}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if answers is not None:
        lines = [prediction(number, answer, by_token=True) for number, answer in enumerate(answers)]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        right = [answer == true for answer, true in zip(answers, ANSWERS, strict=False)]
        figures = {"exact_match": sum(right) / len(right), "recall@1": 1.0, **(metrics or {})}
        (folder / "metrics.json").write_text(json.dumps(figures), encoding="utf-8")
    elif metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return folder


def write_job(folder: Path, *overrides: str, seed: int) -> Path:
    """The folder of a sweep's job that has not started."""
    folder.mkdir(parents=True)
    told = {"number": 1, "overrides": [*overrides, f"seed={seed}"], "config": {"seed": seed}, "status": "planned"}
    (folder / "sweep_job.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


FILES = {"test": "questions.jsonl", "passages": "passages.jsonl"}
