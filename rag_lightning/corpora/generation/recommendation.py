"""Films to recommend from what a user has liked: MovieLens, read as passages and questions.

Source: GroupLens, ``ml-latest-small`` and its larger siblings of the same columns (Harper and Konstan 2015, "The
MovieLens Datasets: History and Context", ACM TiiS 5(4)). Licence: research use; redistribution under the same
conditions, no commercial use without permission, no endorsement implied. The files are not part of this package.

A film is a passage:
``{"id": "318", "title": "The Shawshank Redemption", "text": "Film of 1994. Crime, Drama. Tags: prison."}``
A question is the films that a user liked last, the newest last:
``{"id": "7-318", "question": "Seven; Heat; Fargo", "answers": ["The Shawshank Redemption"],
"positive_passage_ids": ["318"], "excluded_passage_ids": ["47", "6", "608"]}``

Leave-last-out: the last film that a user liked is the test's, the one before it the validation's, those before that are
trained on. A question knows what its user did before its target only; a film's tags are those of all users at all
times, as the catalogue shows them.
"""

import csv
import gzip
import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rag_lightning.corpora.generation.prepared import PreparedData
from rag_lightning.errors import ConfigError, DataError, MissingFileError
from rag_lightning.types import Passage, Question
from rag_lightning.utils.io import open_text

logger = logging.getLogger(__name__)

AnswerKind = Literal["title", "explanation"]
NO_GENRES = "(no genres listed)"
_YEARS = re.compile(r"^(?P<name>.+?)\s*\((?P<years>\d{4}(?:[-\u2013](?:\d{4})?)?)\)$")
_OTHER_NAME = re.compile(r"^(?P<name>.+?)\s*\((?P<other>[^()]+)\)$")
_ARTICLE = re.compile(
    r"^(?P<rest>.+), (?P<article>The|A|An|Le|La|Les|L'|Un|Une|Il|Lo|I|Gli|El|Los|Las|Der|Die|Das|Ein|Eine|O|Os)$"
)


@dataclass(frozen=True, slots=True)
class Film:
    """What the catalogue says of a film.

    Attributes:
        id: The catalogue's number.
        title: Without the year; an article stands in front.
        descriptors: Genres, then its most frequent tags.
        text: Year, other name, genres and tags, as a passage's text.
    """

    id: str
    title: str
    descriptors: tuple[str, ...]
    text: str


class Rating(NamedTuple):
    """One line of ``ratings.csv``; ratings sort by time, and at the same second by the film's number."""

    timestamp: int
    film: int
    rating: float


@dataclass(frozen=True, kw_only=True)
class MovieLens:
    """Reads a MovieLens folder; a :class:`~rag_lightning.corpora.generation.prepared.Preparation`.

    A film is *liked* with a rating of ``min_rating`` or more. The ratings of one user are put in order by time, those
    of the same second by the film's number. A liked film is a target where the user liked ``min_history`` films
    before it. A user with fewer than two targets is left out, so that validation and test have the same users; how many
    were is logged.

    Attributes:
        folder: Holds ``movies.csv``, ``ratings.csv`` and, unless ``num_tags`` is 0, ``tags.csv``; each may be ``.gz``.
        min_rating: The lowest rating of a film that is liked, on MovieLens' scale of 0.5 to 5.
        min_history: Liked films that a target needs before it, 1 at least.
        history_length: Films in a question: the last ones that were liked, whatever was liked before is cut off.
        targets_per_user: Train on the last so many of a user's training targets; None on all.
        num_tags: The most frequent tags in a film's text; equally frequent ones by the alphabet.
        answer: What is to be written: ``title``, or ``explanation``, as ``T, because you liked X and Y: Crime, Drama``,
            where X and Y are the one or two films of the question that share most genres and tags with the target
            (the newest first among equals) and what follows are those shared; the title alone where nothing is.

    Raises:
        ConfigError: A setting out of its range.
    """

    folder: str
    min_rating: float = 4.0
    min_history: int = 3
    history_length: int = 10
    targets_per_user: int | None = None
    num_tags: int = 5
    answer: str = "title"

    def __post_init__(self) -> None:
        if not 0 <= self.min_rating <= 5:
            raise ConfigError(f"min_rating: expected a rating from 0 to 5, came {self.min_rating}.")
        for name, least in (("min_history", 1), ("history_length", 1), ("targets_per_user", 1), ("num_tags", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected at least {least}, came {value}.")
        if self.answer not in get_args(AnswerKind):
            raise ConfigError(f"answer: expected one of {', '.join(get_args(AnswerKind))}, came {self.answer!r}.")

    def __call__(self) -> PreparedData:
        """Returns all films, and the questions of training, validation and test.

        A validation or test question excludes every film that its user had rated before the target, liked or not. A
        training question, of which no ranking is made, excludes those that it names.

        Raises:
            MissingFileError: A file is missing.
            DataError: A line is bad, or no user has a history long enough; names file, line and field.
        """
        films = self._films()
        questions: dict[Literal["train", "validation", "test"], list[Question]] = {
            "train": [],
            "validation": [],
            "test": [],
        }
        num_short = 0
        users = read_ratings(_file(self.folder, "ratings"), films)
        for user, ratings in users.items():
            liked = [place for place, one in enumerate(ratings) if one.rating >= self.min_rating]
            if len(liked) < self.min_history + 2:
                num_short += 1
                continue
            *earlier, validation, test = range(self.min_history, len(liked))
            kept = earlier if self.targets_per_user is None else earlier[-self.targets_per_user :]
            questions["train"] += [self._question(user, ratings, liked[: n + 1], films, seen=False) for n in kept]
            questions["validation"].append(self._question(user, ratings, liked[: validation + 1], films))
            questions["test"].append(self._question(user, ratings, liked[: test + 1], films))
        logger.info("%s: %d users, %d of them left out", self.folder, len(users), num_short)
        if not questions["train"]:
            raise DataError(
                f"{self.folder}: expected a user who rated at least {self.min_history + 3} films with "
                f"{self.min_rating} or more, came none among {len(users)} users. Lower min_history or min_rating."
            )
        return PreparedData([Passage(film.id, film.title, film.text) for film in films.values()], questions)

    def _films(self) -> dict[int, Film]:
        tags = read_tags(_file(self.folder, "tags")) if self.num_tags > 0 else {}
        return read_films(_file(self.folder, "movies"), tags, num_tags=self.num_tags)

    def _question(
        self,
        user: int,
        ratings: Sequence[Rating],
        liked: Sequence[int],
        films: Mapping[int, Film],
        *,
        seen: bool = True,
    ) -> Question:
        """Returns the question whose target is the last of the ``liked`` places."""
        *before, place = liked
        target = films[ratings[place].film]
        history = [films[ratings[n].film] for n in before[-self.history_length :]]
        excluded = [films[one.film] for one in ratings[:place]] if seen else history
        answer = target.title if self.answer == "title" else explanation(target, history)
        return Question(
            id=f"{user}-{target.id}",
            question="; ".join(film.title for film in history),
            answers=(answer,),
            positive_passage_ids=(target.id,),
            excluded_passage_ids=tuple(film.id for film in excluded),
        )


def explanation(target: Film, history: Sequence[Film]) -> str:
    """Returns a recommendation with its reason, which the passages of the films named bear out.

    >>> heat = Film("6", "Heat", ("Action", "Crime"), "")
    >>> fargo = Film("608", "Fargo", ("Crime", "Comedy"), "")
    >>> explanation(Film("47", "Se7en", ("Crime", "Mystery"), ""), [heat, fargo])
    'Se7en, because you liked Fargo and Heat: Crime'
    """
    wanted = set(target.descriptors)
    shares = [(len(wanted & set(film.descriptors)), place) for place, film in enumerate(history)]
    best = [history[place] for share, place in sorted(shares, reverse=True)[:2] if share > 0]
    if not best:
        return target.title
    held = {descriptor for film in best for descriptor in film.descriptors}
    shared = [descriptor for descriptor in target.descriptors if descriptor in held]
    return f"{target.title}, because you liked {' and '.join(film.title for film in best)}: {', '.join(shared)}"


def split_title(published: str) -> tuple[str, str, str]:
    """Returns title, other name and year of a title as MovieLens writes it; empty where it has none.

    >>> split_title("City of Lost Children, The (Cité des enfants perdus, La) (1995)")
    ('The City of Lost Children', 'La Cité des enfants perdus', '1995')
    >>> split_title("Stranger Things")
    ('Stranger Things', '', '')
    """
    name, years, other = published.strip(), "", ""
    if (found := _YEARS.match(name)) is not None:
        name, years = found["name"], found["years"]
    if (found := _OTHER_NAME.match(name)) is not None:
        name, other = found["name"], found["other"].removeprefix("a.k.a. ")
    return _article_first(name), _article_first(other), years


def _article_first(name: str) -> str:
    found = _ARTICLE.match(name)
    if found is None:
        return name
    space = "" if found["article"].endswith("'") else " "
    return f"{found['article']}{space}{found['rest']}"


def read_films(path: Path, tags: Mapping[int, Counter[str]], *, num_tags: int) -> dict[int, Film]:
    """Returns the films of ``movies.csv`` by number, in the file's order.

    Args:
        path: The file.
        tags: How often each tag was given to each film.
        num_tags: How many of a film's tags are kept.

    Raises:
        DataError: No film, one twice, or a bad line; names file, line and field.
    """
    films: dict[int, Film] = {}
    for place, row in _rows(path, ("movieId", "title", "genres")):
        number = _whole(row, "movieId", place)
        if number in films:
            raise DataError(f"{place}: field 'movieId': expected each film once, came {number} again. Remove one.")
        title, other, years = split_title(row["title"])
        if not title:
            raise DataError(f"{place}: field 'title': expected a title, came an empty one. Fill it or remove the line.")
        listed = row["genres"].strip()
        genres = [] if listed in ("", NO_GENRES) else listed.split("|")
        counted = sorted(tags.get(number, Counter()).items(), key=lambda item: (-item[1], item[0]))
        frequent = [tag for tag, _ in counted[:num_tags]]
        parts = [
            f"Film of {years}." if years else "Film.",
            f"Also {other}." if other else "",
            f"{', '.join(genres)}." if genres else "",
            f"Tags: {', '.join(frequent)}." if frequent else "",
        ]
        films[number] = Film(str(number), title, (*genres, *frequent), " ".join(part for part in parts if part))
    if not films:
        raise DataError(f"{path}: expected at least one film, came none. Check the file.")
    return films


def read_tags(path: Path) -> dict[int, Counter[str]]:
    """Returns how often each tag was given to each film, in lower case, runs of white space as one space.

    Raises:
        DataError: A bad line; names file, line and field.
    """
    tags: dict[int, Counter[str]] = {}
    for place, row in _rows(path, ("userId", "movieId", "tag", "timestamp")):
        tag = " ".join(row["tag"].lower().split())
        if tag:
            tags.setdefault(_whole(row, "movieId", place), Counter())[tag] += 1
    return tags


def read_ratings(path: Path, films: Mapping[int, Film]) -> dict[int, list[Rating]]:
    """Returns each user's ratings in order of time, those of one second by the film's number; users by number.

    Raises:
        DataError: No rating, a film rated twice by one user, a film that is not among ``films``, or a bad line; names
            file, line and field.
    """
    users: dict[int, dict[int, Rating]] = {}
    for place, row in _rows(path, ("userId", "movieId", "rating", "timestamp")):
        user, film = _whole(row, "userId", place), _whole(row, "movieId", place)
        if film not in films:
            raise DataError(
                f"{place}: field 'movieId': expected a film of movies.csv, came {film}. Take both from one release."
            )
        mine = users.setdefault(user, {})
        if film in mine:
            raise DataError(f"{place}: expected one rating of each film by a user, came film {film} by {user} again.")
        mine[film] = Rating(_whole(row, "timestamp", place), film, _rating(row["rating"], place))
    if not users:
        raise DataError(f"{path}: expected at least one rating, came none. Check the file.")
    return {user: sorted(users[user].values()) for user in sorted(users)}


def _file(folder: str, name: str) -> Path:
    root = Path(folder).expanduser()
    for suffix in (".csv.gz", ".csv"):
        if (root / f"{name}{suffix}").is_file():
            return root / f"{name}{suffix}"
    raise MissingFileError(
        f"MovieLens: expected a file {name}.csv or {name}.csv.gz in {root.absolute()}, found none. Name the folder "
        "that a release of MovieLens was unpacked to."
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (place for messages, fields) of a CSV file with these columns."""
    number = 1
    try:
        with open_text(path) as stream:
            reader = csv.reader(stream, strict=True)
            header = tuple(next(reader, []))
            if header != columns:
                raise DataError(f"{path}, line 1: expected the header {','.join(columns)}, came {','.join(header)!r}.")
            number = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(columns):
                    raise DataError(
                        f"{path}, line {number}: expected the {len(columns)} fields {','.join(columns)}, came "
                        f"{len(values)}. Quote a field that holds a comma."
                    )
                if values:
                    yield f"{path}, line {number}", dict(zip(columns, values, strict=True))
                number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {number}: expected fields quoted as CSV has it: {error}. Mend it.") from error
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, near line {number}: the file is not readable as UTF-8 text: {error}") from error


def _whole(row: Mapping[str, str], field: str, place: str) -> int:
    if not row[field].isascii() or not row[field].isdigit():
        raise DataError(f"{place}: field {field!r}: expected a whole number of at least 0, came {row[field]!r}.")
    return int(row[field])


def _rating(text: str, place: str) -> float:
    try:
        rating = float(text)
    except ValueError:
        rating = math.nan
    if not 0 <= rating <= 5:
        raise DataError(f"{place}: field 'rating': expected a number from 0 to 5, came {text!r}.")
    return rating
