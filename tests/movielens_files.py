"""A small release of MovieLens in its own columns, from code: 12 films, 6 users, one of them with too few ratings."""

import csv
import gzip
import io
from pathlib import Path

GENRES = ("Action|Crime", "Comedy", "Drama|Romance", "(no genres listed)")
WORDS = "Amber Bridge Copper Dawn Ember Forest Glass Harbour Iron Jade Kite Lantern".split()
MOVIES = [
    (number, f"{word}, The ({1980 + number})" if number % 3 == 0 else f"{word} ({1980 + number})", GENRES[number % 4])
    for number, word in enumerate(WORDS, start=1)
]
TAGS = [(1, 1, "Heist", 5), (2, 1, "heist ", 6), (2, 1, "bank", 7), (3, 5, "heist", 8)]


def ratings(num_users: int = 6) -> list[tuple]:
    """User u rates films u, u + 1, … one each second: every fourth one low; the last user rates three only."""
    return [
        (user, 1 + (user + step) % len(MOVIES), 2.0 if step % 4 == 3 else 4.5, 1000 * user + step)
        for user in range(1, num_users + 1)
        for step in range(3 if user == num_users else 10)
    ]


def write_csv(path: Path, header: str, rows: list[tuple]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(header.split(","))
    writer.writerows(rows)
    text = stream.getvalue().encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


def write_movielens(
    folder: Path, *, movies: list = MOVIES, rated: list | None = None, tags: list = TAGS, suffix: str = ".csv.gz"
) -> Path:
    """Writes the three files; returns the folder."""
    write_csv(folder / f"movies{suffix}", "movieId,title,genres", movies)
    write_csv(folder / f"ratings{suffix}", "userId,movieId,rating,timestamp", rated if rated is not None else ratings())
    write_csv(folder / f"tags{suffix}", "userId,movieId,tag,timestamp", tags)
    return folder
