"""Builds the bundled film world: ``python -m rag_lightning.corpora.films.make ../shared/data/metaqa``.

Source: MetaQA (Zhang et al. 2018, "Variational Reasoning for Question Answering with Knowledge Graph"), built on the
WikiMovies knowledge base (Miller et al. 2016). Licence: CC BY 3.0. ``README.md`` beside this file tells the rules and
the counts. The output depends on the input alone: the same input gives the same bytes.

One example. MetaQA's facts ``Rio 2|directed_by|Carlos Saldanha``, ``Rio 2|release_year|2014`` … become a passage, and
its question ``who directed the movie [Rio 2]`` asks about it (both shortened)::

    {"id": "film-2333", "title": "Rio 2", "text": "Rio 2 is a film directed by Carlos Saldanha. It was written by …"}
    {"id": "metaqa-1hop-dev-02591", "question": "who directed the movie Rio 2", "answers": ["Carlos Saldanha"],
     "positive_passage_ids": ["film-2333"], "type": "movie_to_director"}
"""

import argparse
import gzip
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_lightning.text.tokenizers import train_word_tokenizer
from rag_lightning.utils.io import existing_file, read_json_lines, write_json_lines

NUM_FILMS = 4_000
VOCABULARY = 15_000
"""Entries of the tokenizer, at most: enough for every word of the passages and training questions to stay whole."""

MAX_PEOPLE = 6
"""Names given for each role; longer casts are cut, and questions about those cut off are dropped."""
MAX_TAGS = 6
VALIDATION_FILMS = 0.07
TEST_FILMS = 0.105
"""Shares of the films that only validation and only test questions may touch."""

EXAMPLE_FILM = "Kismet"
"""The film of the examples in the documentation; kept although no one-hop question of MetaQA asks about it."""

FILM_QUESTIONS = {
    "movie_to_year": "release_year",
    "movie_to_director": "directed_by",
    "movie_to_actor": "starred_actors",
    "movie_to_writer": "written_by",
    "movie_to_genre": "has_genre",
    "movie_to_language": "in_language",
}
PERSON_QUESTIONS = {
    "actor_to_movie": "starred_actors",
    "director_to_movie": "directed_by",
    "writer_to_movie": "written_by",
}
SPLITS = ("train", "validation", "test")
LIBRARY_TAGS = frozenset({"bd-r", "dvd-r", "r", "pg-13", "own", "story", "library vhs"})
"""Tags about somebody's shelf, not about the film."""

Facts = dict[str, list[str]]


@dataclass(frozen=True)
class FilmWorld:
    """The rows of the four files, as they are written."""

    passages: list[dict[str, str]]
    questions: dict[str, list[dict[str, Any]]]


def read_facts(path: Path) -> dict[str, Facts]:
    """Returns the facts of every film, ``{title: {relation: [object, …]}}``, in the order of the file."""
    films: dict[str, Facts] = defaultdict(lambda: defaultdict(list))
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for line in stream:
            title, relation, value = line.rstrip("\n").split("|")
            if value not in films[title][relation]:
                films[title][relation].append(value)
    return {title: dict(facts) for title, facts in films.items()}


def read_one_hop_questions(directory: Path) -> list[dict[str, Any]]:
    """Returns the one-hop questions of the kept types of all three MetaQA files, each text once."""
    questions: dict[str, dict[str, Any]] = {}
    for name in ("train", "dev", "test"):
        for _, record in read_json_lines(existing_file(directory / f"{name}.jsonl.gz", "MetaQA questions")):
            if record["hops"] == 1 and record["qtype"] in FILM_QUESTIONS | PERSON_QUESTIONS:
                questions.setdefault(record["question"].casefold(), record)
    return list(questions.values())


def unambiguous(films: Mapping[str, Facts]) -> dict[str, Facts]:
    """Returns the films whose facts can be told in one passage and asked for by title.

    Left out: titles with several release years (several films that MetaQA holds under one name) or more than three
    directors (likewise, or an anthology), titles that are also a person, a genre or a language, titles equal up to
    case, titles without letter or digit ("$" is nothing after normalisation), and films with fewer than three kinds of
    facts or with neither a director nor an actor.
    """
    relations = (*FILM_QUESTIONS.values(),)
    others = {
        value.casefold()
        for facts in films.values()
        for relation in relations
        for value in facts.get(relation, ())
        if relation != "release_year"
    }
    same_title = Counter(title.casefold() for title in films)
    kept: dict[str, Facts] = {}
    for title, facts in films.items():
        told = sum(relation in facts for relation in relations)
        if (
            len(facts.get("release_year", ())) <= 1
            and len(facts.get("directed_by", ())) <= 3
            and told >= 3
            and ("directed_by" in facts or "starred_actors" in facts)
            and title.casefold() not in others
            and same_title[title.casefold()] == 1
            and any(character.isalnum() for character in title)
        ):
            kept[title] = facts
    return kept


def told_facts(title: str, facts: Facts) -> Facts:
    """Returns the facts that the passage tells: at most six names for each role and six tags that add something."""
    told = {relation: facts.get(relation, [])[:MAX_PEOPLE] for relation in FILM_QUESTIONS.values()}
    said = {value.casefold() for values in told.values() for value in values} | {title.casefold()}
    tags = [tag for tag in facts.get("has_tags", ()) if tag not in LIBRARY_TAGS and tag.casefold() not in said]
    return told | {"has_tags": tags[:MAX_TAGS]}


def listed(values: Sequence[str]) -> str:
    """Joins names as a sentence does.

    >>> listed(["Drama"]), listed(["Drama", "War"]), listed(["Drama", "War", "Crime"])
    ('Drama', 'Drama and War', 'Drama, War and Crime')
    """
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} and {values[-1]}"


def passage_text(title: str, told: Facts) -> str:
    """Tells a film's facts in sentences.

    >>> passage_text("Kismet", {"directed_by": ["William Dieterle"], "release_year": ["1944"]})
    'Kismet is a film directed by William Dieterle. It was released in 1944.'
    """
    get = told.get
    directors, writers, actors = get("directed_by"), get("written_by"), get("starred_actors")
    made_by_same = bool(directors) and bool(writers) and set(directors or ()) == set(writers or ())
    claims = [("directed and written by" if made_by_same else "directed by", directors)]
    claims += [("written by", None if made_by_same else writers), ("starring", actors)]
    told_first, *told_next = [(verb, names) for verb, names in claims if names]
    sentences = [f"{title} is a film {told_first[0]} {listed(told_first[1])}."]
    for verb, names in told_next:
        sentences.append(f"It {'stars' if verb == 'starring' else f'was {verb}'} {listed(names)}.")
    if years := get("release_year"):
        sentences.append(f"It was released in {years[0]}.")
    if languages := get("in_language"):
        sentences.append(f"It is in {listed(languages)}.")
    if genres := get("has_genre"):
        sentences.append(f"Its {'genre is' if len(genres) == 1 else 'genres are'} {listed(genres)}.")
    if tags := get("has_tags"):
        sentences.append(f"It is described as: {', '.join(tags)}.")
    return " ".join(sentences)


def split_of(title: str) -> str:
    """Returns the group of a film, by a hash of its title."""
    place = int(hashlib.sha256(f"films/{title}".encode()).hexdigest()[:8], 16) / 16**8
    if place < TEST_FILMS:
        return "test"
    return "validation" if place < TEST_FILMS + VALIDATION_FILMS else "train"


def choose_films(films: Mapping[str, Facts], questions: Iterable[Mapping[str, Any]]) -> dict[str, Facts]:
    """Returns the facts told of the ``NUM_FILMS`` films that most questions ask about, sorted by title."""
    asked: Counter[str] = Counter()
    for record in questions:
        asked.update([record["topic_entity"]] if record["qtype"] in FILM_QUESTIONS else record["answers"])
    # ties fall by a hash, so that no letter of the alphabet is favoured
    order = sorted(
        films, key=lambda title: (title != EXAMPLE_FILM, -asked[title], hashlib.sha256(title.encode()).hexdigest())
    )
    return {title: told_facts(title, films[title]) for title in sorted(order[:NUM_FILMS])}


def answered(
    record: Mapping[str, Any], films: Mapping[str, Facts], roles: Mapping[tuple[str, str], set[str]]
) -> tuple[list[str], list[str]] | None:
    """Returns (answers, positive films) of a MetaQA question, or None where its passages do not settle it.

    Answers to a question about a film come in the order its passage tells them, so the first is the first to be read.
    Kept are questions whose MetaQA answers contain all that the passages say on the matter; answers that no passage
    supports are left out. A question whose passages say more than MetaQA accepts would be marked wrongly, so it goes.
    """
    entity, kind = record["topic_entity"], record["qtype"]
    if kind in FILM_QUESTIONS:
        supported = set(films[entity][FILM_QUESTIONS[kind]]) if entity in films else set()
    else:
        supported = roles.get((PERSON_QUESTIONS[kind], entity), set())
    if not supported or not supported <= set(record["answers"]):
        return None
    if kind in FILM_QUESTIONS:
        return films[entity][FILM_QUESTIONS[kind]], [entity]
    answers = [answer for answer in dict.fromkeys(record["answers"]) if answer in supported]
    return answers, answers


def question_row(record: Mapping[str, Any], answers: list[str], positive_ids: list[str]) -> dict[str, Any]:
    """Returns a question as the files hold it, without MetaQA's square brackets around the topic."""
    return {
        "id": record["id"],
        "question": record["question"].replace("[", "").replace("]", ""),
        "answers": answers,
        "positive_passage_ids": positive_ids,
        "type": record["qtype"],
    }


def build(source: Path) -> FilmWorld:
    """Returns the whole world: passages, and questions for each split.

    Raises:
        MissingFileError: ``source`` lacks one of MetaQA's files.
    """
    all_questions = read_one_hop_questions(source)
    films = choose_films(unambiguous(read_facts(existing_file(source / "kb.txt.gz", "MetaQA facts"))), all_questions)
    ids = {title: f"film-{number:04d}" for number, title in enumerate(films, start=1)}
    roles: dict[tuple[str, str], set[str]] = defaultdict(set)
    for title, told in films.items():
        for relation in PERSON_QUESTIONS.values():
            for person in told[relation]:
                roles[relation, person].add(title)
    questions: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for record in sorted(all_questions, key=lambda record: str(record["id"])):
        found = answered(record, films, roles)
        if found is None:
            continue
        answers, positives = found
        groups = {split_of(title) for title in positives}
        if len(groups) == 1:
            questions[groups.pop()].append(question_row(record, answers, [ids[title] for title in positives]))
    passages = [{"id": ids[title], "title": title, "text": passage_text(title, told)} for title, told in films.items()]
    return FilmWorld(passages=passages, questions=questions)


def write(world: FilmWorld, directory: Path) -> None:
    """Writes ``passages.jsonl.gz`` and one ``.jsonl.gz`` for each split."""
    write_json_lines(directory / "passages.jsonl.gz", world.passages)
    for split, questions in world.questions.items():
        write_json_lines(directory / f"{split}.jsonl.gz", questions)
    for name in ("passages", *world.questions):
        (directory / f"{name}.jsonl.gz").chmod(0o644)  # temporary files are private; package data is not


def write_tokenizer(world: FilmWorld, directory: Path) -> None:
    """Trains the word tokenizer of the tiny models on passages and training questions, into ``tokenizer/``."""
    texts = [f"{passage['title']} {passage['text']}" for passage in world.passages]
    texts += [question["question"] for question in world.questions["train"]]
    train_word_tokenizer(texts, VOCABULARY).save_pretrained(directory / "tokenizer")


def main() -> None:
    """Builds the files into this folder, or into ``--output``, and prints the counts for the README."""
    parser = argparse.ArgumentParser(description="Build the bundled film world from MetaQA.")
    parser.add_argument("source", type=Path, help="folder with MetaQA's kb.txt.gz and {train,dev,test}.jsonl.gz")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    world = build(arguments.source)
    write(world, arguments.output)
    write_tokenizer(world, arguments.output)
    print(f"passages: {len(world.passages):,}")
    for split, questions in world.questions.items():
        kinds = Counter(question["type"] for question in questions)
        print(f"{split}: {len(questions):,}", *(f"{kind}={kinds[kind]}" for kind in sorted(kinds)))


if __name__ == "__main__":
    main()
