"""The bundled film world keeps the promises of its README."""

import gzip
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rag_lightning.corpora.films import make

ROOT = Path(__file__).parents[3]
FILMS = Path(make.__file__).parent
METAQA = ROOT / "../shared/data/metaqa"


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture(scope="module")
def passages() -> dict[str, dict[str, Any]]:
    loaded = rows(FILMS / "passages.jsonl.gz")
    by_id = {row["id"]: row for row in loaded}
    assert len(by_id) == len(loaded) == 4_000
    return by_id


@pytest.fixture(scope="module")
def questions() -> dict[str, list[dict[str, Any]]]:
    return {split: rows(FILMS / f"{split}.jsonl.gz") for split in ("train", "validation", "test")}


def films_of(split: list[dict[str, Any]]) -> set[str]:
    return {film for question in split for film in question["positive_passage_ids"]}


def test_no_film_is_touched_by_two_splits(questions):
    for one, other in combinations(questions, 2):
        assert not films_of(questions[one]) & films_of(questions[other]), (one, other)
        assert not {row["id"] for row in questions[one]} & {row["id"] for row in questions[other]}
        assert not {row["question"] for row in questions[one]} & {row["question"] for row in questions[other]}


def test_film_questions_are_answered_by_their_passage(passages, questions):
    checked = 0
    for question in (row for split in questions.values() for row in split if row["type"].startswith("movie_to")):
        (positive,) = question["positive_passage_ids"]
        assert passages[positive]["title"] in question["question"]
        assert question["answers"]
        assert all(answer in passages[positive]["text"] for answer in question["answers"]), question
        checked += 1
    assert checked == 5_263


def test_answers_come_in_the_order_their_passage_tells_them(passages, questions):
    """A reader trained on the first answer learns to read the first name, not one of several by chance."""
    checked = 0
    for question in (row for split in questions.values() for row in split if row["type"] == "movie_to_actor"):
        text = passages[question["positive_passage_ids"][0]]["text"]
        stars = text[re.search(r"\bstar(?:s|ring) ", text).end() :]
        places = [stars.index(answer) for answer in question["answers"]]
        assert places == sorted(places), question
        checked += len(places) > 1
    assert checked > 500


def names_told(passage: dict[str, Any], kind: str) -> set[str]:
    """Reads the names in a role from the sentences, not from the facts that they were made from."""
    verbs = {
        "actor_to_movie": r"(?:stars|starring)",
        "director_to_movie": r"directed (?:and written )?by",
        "writer_to_movie": r"(?:was |film |directed and )written by",
    }
    text = passage["text"].removeprefix(passage["title"])
    return {
        name
        for told in re.findall(rf"\b{verbs[kind]} (.+?)\.(?= It | Its |$)", text)
        for name in re.split(r", | and ", told)
    }


def test_person_questions_are_answered_by_all_passages_naming_the_person_in_that_role(passages, questions):
    checked = 0
    for kind in make.PERSON_QUESTIONS:
        named = {film: names_told(passage, kind) for film, passage in passages.items()}
        for question in (row for split in questions.values() for row in split if row["type"] == kind):
            positives = question["positive_passage_ids"]
            assert [passages[film]["title"] for film in positives] == question["answers"]
            person = max((name for name in named[positives[0]] if name in question["question"]), key=len)
            assert set(positives) == {film for film, names in named.items() if person in names}, question
            checked += 1
    assert checked == 2_131


def test_the_readme_counts_the_files(passages, questions):
    readme = (FILMS / "README.md").read_text(encoding="utf-8")
    table = {
        cells[0]: [int(cell.replace(",", "")) for cell in cells[1:]]
        for cells in re.findall(
            r"^\| `?([\w ]+?)`? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", readme, flags=re.MULTILINE
        )
    }
    splits = list(questions.values())
    kinds = [Counter(row["type"] for row in split) for split in splits]
    expected = {kind: [count[kind] for count in kinds] for kind in set().union(*kinds)}
    expected["all"] = [len(split) for split in splits]
    expected["films asked about"] = [len(films_of(split)) for split in splits]
    assert table == expected
    assert f"{len(passages):,} films" in readme
    assert f"{sum(map(len, splits)):,} questions" in readme
    lengths = [len(row["text"].split()) for row in passages.values()]
    assert f"{min(lengths)} to {max(lengths)} words, {round(sum(lengths) / len(lengths))} on average" in readme
    assert "CC BY 3.0" in readme
    assert sum(path.stat().st_size for path in FILMS.glob("*.gz")) < 3_000_000


@pytest.mark.skipif(not METAQA.is_dir(), reason="the MetaQA source files are not here")
def test_the_script_makes_the_same_files_again(tmp_path):
    world = make.build(METAQA)
    make.write(world, tmp_path / "once")
    make.write(world, tmp_path / "twice")
    for name in ("passages", "train", "validation", "test"):
        file = f"{name}.jsonl.gz"
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()
        # compared unpacked: another zlib may pack the same lines otherwise
        assert gzip.decompress((tmp_path / "once" / file).read_bytes()) == gzip.decompress((FILMS / file).read_bytes())


def test_ambiguous_films_are_left_out():
    good = {"release_year": ["1944"], "directed_by": ["A B"], "has_genre": ["Drama"]}
    films = {
        "Kismet": good,
        "Two Years": good | {"release_year": ["1933", "1950"]},
        "Anthology": good | {"directed_by": ["A", "B", "C", "D"]},
        "drama": good,
        "$": good,
        "A B": good,
        "Same": good,
        "SAME": good,
        "Bare": {"directed_by": ["A B"], "release_year": ["1944"], "has_tags": ["x"]},
        "No People": {"has_genre": ["Drama"], "release_year": ["1944"], "in_language": ["French"]},
    }
    assert set(make.unambiguous(films)) == {"Kismet"}


def test_a_question_is_kept_only_when_its_passages_settle_it():
    films = {"Kismet": make.told_facts("Kismet", {"directed_by": ["A", "B"]})}
    roles = {("directed_by", "A"): {"Kismet"}}

    def asked(kind: str, entity: str, answers: list[str]) -> Any:
        return make.answered({"qtype": kind, "topic_entity": entity, "answers": answers}, films, roles)

    assert asked("movie_to_director", "Kismet", ["B", "A", "Unsupported"]) == (["A", "B"], ["Kismet"])
    assert asked("movie_to_director", "Kismet", ["A"]) is None, "the passage also names B, which would be marked wrong"
    assert asked("movie_to_year", "Kismet", ["1944"]) is None
    assert asked("movie_to_director", "Elsewhere", ["A"]) is None
    assert asked("director_to_movie", "A", ["Kismet", "Elsewhere"]) == (["Kismet"], ["Kismet"])
    assert asked("writer_to_movie", "A", ["Kismet"]) is None


def test_told_facts_are_capped_and_not_repeated():
    told = make.told_facts(
        "Kismet",
        {"starred_actors": [f"Actor {n}" for n in range(9)], "has_tags": ["bd-r", "actor 1", "kismet", *"abcdefgh"]},
    )
    assert told["starred_actors"] == [f"Actor {n}" for n in range(6)]
    assert told["has_tags"] == list("abcdef")
