"""Small files in the form of each labelled data set, from code; for configurations and short runs."""

import json
from pathlib import Path

SENTIMENT = [("a warm and funny film", 1), ("a cold and dull film", 0), ("funny warm songs", 1), ("dull cold songs", 0)]
SENTENCES = [
    (["Anna", "sings", "in", "Oslo"], ["B-PER", "O", "O", "B-LOC"]),
    (["Ben", "Ash", "is", "warm"], ["B-PER", "I-PER", "O", "O"]),
    (["it", "rains", "in", "New", "York"], ["O", "O", "O", "B-LOC", "I-LOC"]),
]
TAGS_IN_IOB1 = {"B-PER": "I-PER", "B-LOC": "I-LOC"}


def texts(number: int, text: str = "text", label: str = "label", names: dict | None = None, **more) -> list[dict]:
    records = []
    for place in range(number):
        words, kind = SENTIMENT[place % 4]
        records.append(
            {"id": str(place), text: f"{words} {place}", label: kind if names is None else names[kind], **more}
        )
    return records


def tagged(number: int, scheme: dict | None = None) -> list[dict]:
    scheme = scheme or {}
    return [
        {"id": str(place), "tokens": words, "tags": [scheme.get(tag, tag) for tag in tags]}
        for place, (words, tags) in ((place, SENTENCES[place % 3]) for place in range(number))
    ]


def write_labelled(root: Path, suffix: str = ".jsonl.gz") -> Path:
    """Writes them all under a folder, as ``task.folder`` wants them; returns it."""
    import gzip

    def put(name: str, split: str, records: list[dict]) -> None:
        path = root / name / f"{split}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)

    for split in ("train", "dev", "test"):
        for name in ("sst2", "chnsenticorp", "ag_news"):
            put(name, split, texts(16))
        put("wikigold", split, tagged(12, TAGS_IN_IOB1))
        put("wnut17", split, tagged(12))
        put("semeval2010_task8", split, [
            {"id": str(n), "relation": ("Cause-Effect(e1,e2)", "Cause-Effect(e2,e1)")[n % 2],
             "text": ("<e1>fire</e1> made <e2>smoke</e2>", "the <e1>smoke</e1> rose from <e2>fire</e2>")[n % 2]}
            for n in range(12)
        ])  # fmt: skip
        put("fewrel", split, [
            {"tokens": ["Anna", "sings", "in", "Oslo"], "head": {"name": "anna", "id": "Q1", "spans": [[0]]},
             "tail": {"name": "oslo", "id": "Q2", "spans": [[3]]},
             "relation": ("P1", "P2")[n % 2]} for n in range(12)
        ])  # fmt: skip
        put("cluener2020", split, [
            {"id": str(n), "text": "Anna in Oslo", "entities": [[0, 4, "name", "Anna"], [8, 12, "address", "Oslo"]]}
            for n in range(60)
        ])  # fmt: skip
    names = ["REFUTES", "SUPPORTS"]
    for split in ("train", "dev"):
        put("fever", split, texts(40, text="claim", names=names))
    put("boolq", "validation", texts(60, text="question", names=["no", "yes"], passage="a film with songs"))
    for split in ("train", "test"):
        put("pubmedqa", split, texts(40, text="question", names=["no", "yes"], contexts=["warm", "songs"]))
    folder = root / "conll2003"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        blocks = ["-DOCSTART- -X- O O", ""]
        for words, tags in SENTENCES * 4:
            blocks += [f"{word} NN O {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
        (folder / f"{split}.txt").write_text("\n".join(blocks) + "\n", encoding="utf-8")
    return root
