"""MovieLens as passages and questions: by hand on a few lines, and against a plain loop."""

import logging
from collections import Counter

import pytest

from rag_lightning.corpora.generation.prepared import Preparation
from rag_lightning.corpora.generation.recommendation import Film, MovieLens, explanation, split_title
from rag_lightning.corpora.passages import PassageCorpus
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from tests.movielens_files import MOVIES, ratings, write_movielens


def one_user(*rated: tuple) -> list[tuple]:
    """Ratings of user 7: (film, rating, timestamp) each."""
    return [(7, *line) for line in rated]


FIVE = one_user((5, 4.0, 10), (3, 5.0, 20), (9, 1.0, 25), (4, 4.5, 30), (2, 4.0, 40), (1, 5.0, 50), (8, 3.5, 60))


def read(folder, **settings):
    return MovieLens(folder=str(folder), **{"min_history": 2, **settings})()


def test_it_is_a_preparation():
    assert isinstance(MovieLens(folder="F"), Preparation)


def test_the_last_liked_film_is_the_tests_and_the_one_before_it_the_validations(tmp_path):
    questions = read(write_movielens(tmp_path, rated=FIVE)).questions
    assert {split: [q.positive_passage_ids for q in asked] for split, asked in questions.items()} == {
        "train": [("4",)],
        "validation": [("2",)],
        "test": [("1",)],
    }
    (test,), (validation,), (train,) = questions["test"], questions["validation"], questions["train"]
    assert test.id == "7-1"
    assert test.question == "Ember; The Copper; Dawn; Bridge"
    assert test.answers == ("Amber",)
    assert test.excluded_passage_ids == ("5", "3", "9", "4", "2")  # what was rated before, liked or not; nothing later
    assert validation.question == "Ember; The Copper; Dawn"
    assert validation.excluded_passage_ids == ("5", "3", "9", "4")
    assert train.question == "Ember; The Copper"
    assert train.excluded_passage_ids == ("5", "3")


def test_ratings_of_one_second_go_by_the_films_number(tmp_path):
    rated = one_user((9, 4.0, 10), (10, 4.0, 10), (2, 4.0, 10), (1, 4.0, 10), (3, 4.0, 9))
    questions = read(write_movielens(tmp_path, rated=rated)).questions
    assert [q.positive_passage_ids[0] for split in ("train", "validation", "test") for q in questions[split]] == [
        "2",
        "9",
        "10",
    ]
    assert questions["test"][0].excluded_passage_ids == ("3", "1", "2", "9")


def test_history_is_cut_from_the_left(tmp_path):
    questions = read(write_movielens(tmp_path, rated=FIVE), history_length=2).questions
    assert questions["test"][0].question == "Dawn; Bridge"
    assert len(questions["test"][0].excluded_passage_ids) == 5


def test_the_threshold_says_what_is_liked(tmp_path):
    folder = write_movielens(tmp_path, rated=FIVE)
    assert read(folder, min_rating=3.5).questions["test"][0].positive_passage_ids == ("8",)
    with pytest.raises(
        DataError, match="expected a user who rated at least 5 films with 4.5 or more, came none among 1"
    ):
        read(folder, min_rating=4.5)


def test_users_with_too_short_a_history_are_left_out_and_counted(tmp_path, caplog):
    folder = write_movielens(tmp_path)
    with caplog.at_level(logging.INFO):
        questions = read(folder).questions
    assert "6 users, 1 of them left out" in caplog.text
    assert {q.id.split("-")[0] for q in questions["test"]} == set("12345")
    assert [q.id.split("-")[0] for q in questions["validation"]] == [q.id.split("-")[0] for q in questions["test"]]


@pytest.mark.parametrize("targets_per_user", [None, 2])
def test_targets_agree_with_a_plain_loop(tmp_path, targets_per_user):
    prepared = read(write_movielens(tmp_path), targets_per_user=targets_per_user)
    corpus = PassageCorpus.from_passages(prepared.passages)
    assert len(corpus) == len(MOVIES)
    expected = {"train": [], "validation": [], "test": []}
    for user in range(1, 6):
        lines = sorted((time, film, rating) for one, film, rating, time in ratings() if one == user)
        liked = [film for _, film, rating in lines if rating >= 4]
        for place, film in enumerate(liked):
            split = {len(liked) - 1: "test", len(liked) - 2: "validation"}.get(place, "train")
            too_old = targets_per_user is not None and place < len(liked) - 2 - targets_per_user
            if place >= 2 and not (split == "train" and too_old):
                seen = [other for _, other, _ in lines]
                excluded = seen[: seen.index(film)] if split != "train" else liked[:place]
                expected[split].append((str(film), {str(one) for one in excluded}))
    came = {
        split: [(q.positive_passage_ids[0], set(q.excluded_passage_ids)) for q in asked]
        for split, asked in prepared.questions.items()
    }
    assert came == expected
    assert max(Counter(q.id for asked in prepared.questions.values() for q in asked).values()) == 1


def test_films_become_passages(tmp_path):
    passages = {p.id: p for p in read(write_movielens(tmp_path), num_tags=1).passages}
    assert (passages["1"].title, passages["1"].text) == ("Amber", "Film of 1981. Comedy. Tags: heist.")
    assert (passages["3"].title, passages["3"].text) == ("The Copper", "Film of 1983.")
    assert read(write_movielens(tmp_path)).passages[0].text == "Film of 1981. Comedy. Tags: heist, bank."
    assert "heist" not in str(read(write_movielens(tmp_path), num_tags=0).passages)


def test_plain_files_serve_and_tags_are_needed_only_where_they_are_read(tmp_path):
    folder = write_movielens(tmp_path, suffix=".csv")
    assert read(folder) == read(write_movielens(tmp_path / "packed"))
    (folder / "tags.csv").unlink()
    assert read(folder, num_tags=0).questions["test"]
    with pytest.raises(MissingFileError, match="expected a file tags.csv or tags.csv.gz"):
        read(folder)


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        ("Seven (a.k.a. Se7en) (1995)", ("Seven", "Se7en", "1995")),
        ("Star Maker, The (Uomo delle stelle, L') (1995)", ("The Star Maker", "L'Uomo delle stelle", "1995")),
        ("Fawlty Towers (1975-1979)", ("Fawlty Towers", "", "1975-1979")),
        ("Big Bang Theory, The (2007-)", ("The Big Bang Theory", "", "2007-")),
        ("(500) Days of Summer (2009)", ("(500) Days of Summer", "", "2009")),
        ("2001: A Space Odyssey (1968)", ("2001: A Space Odyssey", "", "1968")),
        ("Good, the Bad and the Ugly, The (1966)", ("The Good, the Bad and the Ugly", "", "1966")),
        ("Hyena Road", ("Hyena Road", "", "")),
        ("1984 (1984) ", ("1984", "", "1984")),
    ],
)
def test_titles(published, expected):
    assert split_title(published) == expected


def test_an_explanation_names_films_that_bear_it_out(tmp_path):
    target = Film("9", "T", ("Crime", "War", "heist"), "")
    alike, older, newer = (Film(n, n, d, "") for n, d in (("A", ("Crime", "heist")), ("B", ("War",)), ("C", ("War",))))
    foreign = Film("F", "F", ("Musical",), "")
    assert explanation(target, [older, alike, newer, foreign]) == "T, because you liked A and C: Crime, War, heist"
    assert explanation(target, [foreign, older]) == "T, because you liked B: War"
    assert explanation(target, [foreign]) == "T"
    questions = read(write_movielens(tmp_path, rated=FIVE), answer="explanation").questions
    assert questions["test"][0].answers == ("Amber, because you liked Ember: Comedy, heist",)
    for question in [
        q for asked in read(write_movielens(tmp_path), answer="explanation").questions.values() for q in asked
    ]:
        title, _, reason = question.answers[0].partition(", because you liked ")
        assert title
        assert all(name in question.question.split("; ") for name in reason.partition(":")[0].split(" and ") if name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_rating": 6.0}, "min_rating: expected a rating from 0 to 5, came 6.0"),
        ({"min_history": 0}, "min_history: expected at least 1, came 0"),
        ({"history_length": 0}, "history_length: expected at least 1"),
        ({"targets_per_user": 0}, "targets_per_user: expected at least 1"),
        ({"num_tags": -1}, "num_tags: expected at least 0"),
        ({"answer": "poem"}, "answer: expected one of title, explanation, came 'poem'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        MovieLens(folder="F", **settings)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"rated": [(7, 99, 4.0, 1)]},
            "ratings.csv.gz, line 2: field 'movieId': expected a film of movies.csv, came 99",
        ),
        ({"rated": [(7, 1, 4.0, 1), (7, 1, 3.0, 2)]}, "line 3: expected one rating of each film by a user"),
        ({"rated": [(7, 1, 5.5, 1)]}, "field 'rating': expected a number from 0 to 5, came '5.5'"),
        ({"rated": [(7, 1, "nan", 1)]}, "field 'rating': expected a number from 0 to 5, came 'nan'"),
        ({"rated": [(7, 1, 4.0, "noon")]}, "field 'timestamp': expected a whole number of at least 0, came 'noon'"),
        ({"rated": [(7, 1, 4.0)]}, "line 2: expected the 4 fields userId,movieId,rating,timestamp, came 3"),
        ({"rated": []}, "ratings.csv.gz: expected at least one rating, came none"),
        ({"movies": [(1, "A", ""), (1, "B", "")]}, "movies.csv.gz, line 3: field 'movieId': expected each film once"),
        ({"movies": [(1, "", "Drama")]}, "field 'title': expected a title, came an empty one"),
        ({"movies": []}, "movies.csv.gz: expected at least one film, came none"),
        ({"tags": [(1, "x", "dull", 1)]}, "tags.csv.gz, line 2: field 'movieId': expected a whole number"),
    ],
)
def test_bad_lines_are_named(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        read(write_movielens(tmp_path, **files))


def test_files_that_are_no_release_of_movielens_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match="expected a file tags.csv or tags.csv.gz in .*unpacked to"):
        read(tmp_path)
    folder = write_movielens(tmp_path, suffix=".csv")
    (folder / "movies.csv").write_text("id::title\n1::A\n")
    with pytest.raises(
        DataError, match="movies.csv, line 1: expected the header movieId,title,genres, came 'id::title'"
    ):
        read(folder)
    (folder / "movies.csv").write_text('movieId,title,genres\n1,"A,Drama\n')
    with pytest.raises(DataError, match="movies.csv, line 2: expected fields quoted"):
        read(folder)
    (folder / "movies.csv").write_bytes(b"movieId,title,genres\n1,\xff,Drama\n")
    with pytest.raises(DataError, match="not readable as UTF-8"):
        read(folder)
