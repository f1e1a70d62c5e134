"""Tiny files of every data set that the recipes name, as published (``paper``) and as ``scale=mini`` reads them."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

NUMBER = 40
FILMS = [f"Film{n}" for n in range(NUMBER)]
MAKERS = [f"Maker{n}" for n in range(NUMBER)]


def put(path: Path, content: Any, *, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(one)}\n" for one in content) if lines else json.dumps(content)
    with (
        gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as stream
    ):
        stream.write(text)


def csv_of(path: Path, rows: list[tuple[str, list[str]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as stream:
        csv.writer(stream, delimiter="\t").writerows((question, repr(answers)) for question, answers in rows)


def asked(mark: str = "") -> list[tuple[str, list[str]]]:
    return [(f"who made {film}{mark}", [maker, f"the {maker}"]) for film, maker in zip(FILMS, MAKERS, strict=True)]


def context(number: int) -> dict[str, str]:
    return {"title": FILMS[number], "text": f"{FILMS[number]} is by {MAKERS[number]}.", "passage_id": str(number + 1)}


def training(rows: list[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    return [
        {"question": question, "answers": answers, "positive_ctxs": [context(n)], "negative_ctxs": [],
         "hard_negative_ctxs": [context((n + 1) % NUMBER)]}
        for n, (question, answers) in enumerate(rows)
    ]  # fmt: skip


def records(mark: str, passage: str | None = None) -> list[dict[str, Any]]:
    gold = [{} if passage is None else {"positive_passage_ids": [f"{passage}{n}"]} for n in range(NUMBER)]
    rows = enumerate(asked(f" {mark}"))
    return [{"id": f"{mark}-{n}", "question": text, "answers": found, **gold[n]} for n, (text, found) in rows]


def claims() -> list[dict[str, Any]]:
    labels = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
    return [{"id": n, "claim": f"{MAKERS[n]} made {FILMS[n]}", "label": labels[n % 3]} for n in range(NUMBER)]


def write_published(root: Path) -> Path:
    """Writes them as ``rag-lightning data fetch`` leaves them; returns the folder."""
    (root / "wikipedia").mkdir(parents=True)
    with gzip.open(root / "wikipedia" / "psgs_w100.tsv.gz", "wt") as stream:
        stream.write("id\ttext\ttitle\n")
        stream.writelines(f"{n + 1}\t{context(n)['text']}\t{FILMS[n]}\n" for n in range(NUMBER))
    for split in ("train", "dev", "test"):
        csv_of(root / "nq_open" / f"nq-{split}.qa.csv", asked())
        csv_of(root / "triviaqa" / f"trivia-{split}.qa.csv.gz", asked())
    csv_of(root / "webquestions" / "webquestions-test.qa.csv", asked())
    patterns = [(question, [f"{answers[0]}|the\\s{answers[0]}"]) for question, answers in asked()]
    csv_of(root / "curatedtrec" / "curatedtrec-test.qa.csv", patterns)
    for split in ("train", "dev"):
        put(root / "webquestions" / f"biencoder-webquestions-{split}.json.gz", training(asked()))
        put(root / "curatedtrec" / f"biencoder-curatedtrec-{split}.json.gz", training(patterns))
        put(root / "nq_gold" / f"biencoder-nq-{split}.json.gz", training(asked()))
        clues = [{"qas": [{"qid": f"q{n}", "question": f"It was made by {MAKERS[n]}", "answers": [FILMS[n]]}]}
                 for n in range(NUMBER)]  # fmt: skip
        put(root / "searchqa" / f"SearchQA-{split}.jsonl.gz", [{"header": {"dataset": "SearchQA"}}, *clues], lines=True)
        formed = {str(n): [f"{MAKERS[n]} made it."] if n else "[]" for n in range(NUMBER)}
        columns = {"query": {str(n): f"who made {FILMS[n]}" for n in range(NUMBER)}, "wellFormedAnswers": formed}
        columns["query_id"] = {str(n): n for n in range(NUMBER)}
        put(root / "msmarco" / f"{split}_v2.1.json.gz", columns)
        paragraphs = [
            {"title": f"{film}_{split}", "paragraphs": [{"context": f"{film} is by {maker}.", "qas": [
                {"id": f"{split}{film}", "question": f"who made {film}",
                 "answers": [{"text": maker, "answer_start": 0}] * 2}]}]}
            for film, maker in zip(FILMS, MAKERS, strict=True)
        ]  # fmt: skip
        put(root / "squad" / f"{split}-v1.1.json", {"data": paragraphs, "version": "1.1"})
    put(root / "nq_gold" / "biencoder-nq-adv-hn-train.json.gz", training(asked(" again")))
    put(root / "fever" / "train.jsonl", claims(), lines=True)
    put(root / "fever" / "shared_task_dev.jsonl", claims(), lines=True)
    return root


def write_samples(root: Path) -> Path:
    """Writes them as ``scale=mini`` reads them; returns the folder."""

    def lines(name: str, content: list[dict[str, Any]]) -> None:
        put(root / f"{name}.jsonl.gz", content, lines=True)

    for name in ("nq_passages/qed", "nq_passages/clapnq", "squad_open/"):
        key = name.split("/")[0] + name[-1]
        made = [
            {"id": f"{key}{n}", "title": FILMS[n], "text": f"{FILMS[n]} is by {MAKERS[n]}. It was shown in 1999."}
            for n in range(NUMBER)
        ]
        lines(f"{name}passages" if name.endswith("/") else f"{name}_passages", made)
    lines("nq_open/train", [*records("new"), *records("known")])
    lines("nq_open/dev", records("known"))
    lines("nq_passages/qed_questions", records("qed", "nq_passagesd"))
    lines("nq_passages/clapnq_questions", [{"id": "c", "question": "who?"}])
    for name, splits in (("triviaqa", "train test"), ("webquestions", "train val test")):
        for split in splits.split():
            lines(f"{name}/{split}", records(split))
    for split in ("train", "test"):
        patterns = [{"id": f"{split}{n}", "question": f"who made {film}", "answer_regex": f"{maker}|the\\s{maker}"}
                    for n, (film, maker) in enumerate(zip(FILMS, MAKERS, strict=True))]  # fmt: skip
        lines(f"curatedtrec/{split}", patterns)
    clues = zip(FILMS, MAKERS, strict=True)
    lines("jeopardy/all", [{"id": f, "category": "FILMS", "clue": f"It is by {m}", "answer": f} for f, m in clues])
    for split in ("train", "dev"):
        lines(f"fever/{split}", claims())
        mined = [{**one, "negative_passage_ids": [f"squad_open/{(n + 1) % NUMBER}"]}
                 for n, one in enumerate(records(split, "squad_open/"))]  # fmt: skip
        lines(f"squad_open/{split}", mined)
    return root
