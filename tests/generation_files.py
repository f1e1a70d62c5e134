"""Small files in the form of each data set to generate from, from code; for configurations, readers and short runs."""

import gzip
import json
from pathlib import Path

ENGLISH = ("a man in a red hat", "two dogs run on grass", "a girl reads a book", "children play in the snow")
GERMAN = (
    "ein Mann mit rotem Hut",
    "zwei Hunde rennen im Gras",
    "ein Mädchen liest ein Buch",
    "Kinder spielen im Schnee",
)
SAID = ("Hello there.", "Do you like the film?", "I like it very much.", "Who directed it?", "It was Anna Ash.")
SAID_IN_CHINESE = ("你好，知道这部电影吗？", "知道，是安娜导演的。", "什么时候上映的？", "二零零四年上映。")
SECTION_0 = {
    "cast": ["Ben Birch as Bo"],
    "critical_response": ["A delight."],
    "director": "Anna Ash",
    "genre": "Comedy",
    "introduction": "A comedy of 2004.",
    "movieName": "Snow",
    "rating": ["Good: 9"],
    "year": "2004",
}


def write(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_generation(root: Path, number: int = 12) -> Path:
    """Writes them all under a folder, as ``task.folder`` wants them; returns it."""
    for split in ("train", "dev", "test"):
        pairs = [{"id": n, "en": f"{ENGLISH[n % 4]} {n}", "de": f"{GERMAN[n % 4]} {n}"} for n in range(number)]
        write(root / "multi30k_en_de" / f"{split}.jsonl.gz", pairs)
        papers = [
            {"id": f"p{n}", "source": [f"{ENGLISH[n % 4]}.", f"{ENGLISH[(n + 1) % 4]}."],
             "summaries": [ENGLISH[n % 4], f"of {n}"]} for n in range(number)
        ]  # fmt: skip
        write(root / "scitldr" / f"{split}.jsonl.gz", papers)
        turns = [{"uid": f"user{1 + n % 2}", "section": n % 3, "text": text} for n, text in enumerate(SAID)]
        talks = [
            {"id": f"{split}{n}", "wiki_idx": n % 2, "who_saw_doc": ["user2"], "history": turns} for n in range(number)
        ]
        write(root / "cmu_dog" / f"{split}.jsonl.gz", talks)
    sections = [
        {"file": "S", "wiki_idx": film, "section": section,
         "content": SECTION_0 if section == 0 else f"{ENGLISH[section]} in film {film}"}
        for film in range(2) for section in range(3)
    ]  # fmt: skip
    write(root / "cmu_dog" / "documents.jsonl.gz", sections)
    for split in ("dev", "test"):
        summaries = ["They talk."] * (1 if split == "dev" else 3)
        talks = [{"id": f"{split}_{n}", "dialogue": "\n".join(SAID), "summaries": summaries} for n in range(40)]
        write(root / "dialogsum" / f"{split}.jsonl.gz", talks)
        for domain in ("film", "music", "travel"):
            messages = [
                {"text": text, "knowledge": [["雪", "导演", "安娜"], ["雪", "年", str(n)]] if n % 2 else []}
                for n, text in enumerate(SAID_IN_CHINESE)
            ]
            messages.append({"text": "好。", "knowledge": [["雪", "片长", domain]]})
            talks = [{"id": f"{domain}-{split}-{n}", "name": "雪", "messages": messages} for n in range(number)]
            write(root / "kdconv" / f"{domain}_{split}.jsonl.gz", talks)
    write(root / "kdconv" / "kb_travel.jsonl.gz", [["雪", "导演", "安娜"], ["故宫", "城市", "北京"]])
    for split in ("train", "test"):
        talks = [{"id": n, "utterances": [f"{text} {n}" for text in SAID]} for n in range(3 * number)]
        write(root / "dailydialog" / f"{split}.jsonl.gz", talks)
    clues = [
        {"id": f"j{n}", "category": "FILMS", "clue": f"This film of {1950 + n} shows snow", "answer": f"Snow {n}"}
        for n in range(5 * number)
    ]
    write(root / "jeopardy" / "all.jsonl.gz", clues)
    paragraphs = [{"id": f"c{n}", "title": "雪", "text": f"安娜在{n}年导演了雪。"} for n in range(3 * number)]
    for name, splits in (("cmrc2018", ("train", "dev")), ("drcd", ("train", "test"))):
        write(root / name / "passages.jsonl.gz", paragraphs)
        for split in splits:
            asked = [
                {"id": f"{split}{n}", "question": f"雪是{n}年谁导演的？", "answers": ["安娜"],
                 "positive_passage_ids": [f"c{n}"]}
                for n in range(3 * number)
            ]  # fmt: skip
            write(root / name / f"{split}.jsonl.gz", asked)
    for language, words in (("en", ENGLISH), ("de", GERMAN), ("zh", SAID_IN_CHINESE)):
        texts = [{"id": f"{language}{n}", "title": "Film", "text": f"{words[n % 4]} {n}"} for n in range(3 * number)]
        asked = [
            {"id": f"x{n}", "question": f"{words[n % 4]} {n}?", "answers": [str(n)],
             "positive_passage_ids": [f"{language}{n}"]}
            for n in range(3 * number)
        ]  # fmt: skip
        write(root / "xquad" / f"passages.{language}.jsonl.gz", texts)
        write(root / "xquad" / f"questions.{language}.jsonl.gz", asked)
    return root
