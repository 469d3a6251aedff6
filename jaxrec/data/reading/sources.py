"""Which files a log consists of, and in which of the known formats."""

import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from jaxrec.data.reading.archives import gunzip, unzip, zip_names
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError

# The names that are recognized, the first of them as MovieLens writes it.
DEFAULT_COLUMNS = {
    USER: ("userId", "user_id"),
    ITEM: ("movieId", "item_id"),
    RATING: ("rating",),
    TIME: ("timestamp",),
}
OPTIONS = {USER: "--user-col", ITEM: "--item-col", RATING: "--rating-col", TIME: "--time-col"}
PARQUET_SUFFIXES = (".parquet", ".pq")
# Ratings file, and the names that its movies may have beside it.
KNOWN_FILES = {
    "ratings.csv": ("movies.csv",),
    "ratings.dat": ("movies.dat",),
    "u.data": ("u.item", "movies.csv"),
}


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """The columns of a file with a header; None: one of DEFAULT_COLUMNS."""

    user: str | None = None
    item: str | None = None
    rating: str | None = None
    time: str | None = None

    def named(self, role: str) -> str | None:
        """The given name of schema column `role`."""
        return {USER: self.user, ITEM: self.item, RATING: self.rating, TIME: self.time}[role]


class Format(enum.Enum):
    """The formats, as they are printed."""

    CSV = "CSV with a header"
    DAT = "MovieLens 1M or 10M (.dat, fields separated by ::)"
    U_DATA = "MovieLens 100K (u.data, fields separated by tabs)"
    PARQUET = "Parquet"


@dataclasses.dataclass(frozen=True)
class Source:
    """A log's files. `names` are what messages call them (the path, or archive:member), `paths` where they are.

    `movies`: their file, or a frame that was given.
    """

    format: Format
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    movies: Path | pd.DataFrame | None
    movies_name: str | None

    def __str__(self) -> str:
        files = self.names[0] if len(self.names) == 1 else f"{len(self.names)} files, {self.names[0]} and so on"
        return f"{self.format.value}: {files}; movies: {self.movies_name or 'none'}"


def find_source(ratings: Path, movies: Path | pd.DataFrame | None, scratch: Path) -> Source:
    """Recognizes what `ratings` is: a file, a folder or a zip as downloaded, or a .gz; archives unpack to `scratch`.

    `movies` None: the movies that lie beside the ratings in the folder or the zip. Raises DataError for what is not
    a known format, with what was expected.
    """
    try:
        source = _find(ratings, scratch)
    except OSError as error:
        raise DataError(f"{ratings}: cannot be read: {error.strerror or error}") from error
    if movies is None:
        return source
    name = "a frame" if isinstance(movies, pd.DataFrame) else str(movies)
    return dataclasses.replace(source, movies=movies, movies_name=name)


def _find(ratings: Path, scratch: Path) -> Source:
    if ratings.is_dir():
        return _in_folder(ratings)
    with open(ratings, "rb") as file:
        magic = file.read(4)
    if magic[:2] == b"PK" or ratings.suffix == ".zip":
        return _in_zip(ratings, scratch)
    path = gunzip(ratings, scratch) if magic[:2] == b"\x1f\x8b" or ratings.suffix == ".gz" else ratings
    if magic == b"PAR1" or path.suffix in PARQUET_SUFFIXES:
        return Source(Format.PARQUET, (path,), (str(ratings),), None, None)
    return Source(_text_format(path), (path,), (str(ratings),), None, None)


def _in_folder(folder: Path) -> Source:
    for name, movie_names in KNOWN_FILES.items():
        path = folder / name
        if path.is_file():
            movies = next((folder / movie for movie in movie_names if (folder / movie).is_file()), None)
            return Source(_text_format(path), (path,), (str(path),), movies, None if movies is None else str(movies))
    parts = parquet_files(folder)
    if not parts:
        raise DataError(f"{folder}: holds none of {', '.join(KNOWN_FILES)} and no .parquet file")
    return Source(Format.PARQUET, tuple(parts), tuple(map(str, parts)), None, None)


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files under `folder`, by name: the order of the rows."""
    return sorted(path for path in folder.rglob("*") if path.suffix in PARQUET_SUFFIXES and path.is_file())


def _in_zip(path: Path, scratch: Path) -> Source:
    inside = zip_names(path)
    for name, movie_names in KNOWN_FILES.items():
        found = [member for member in inside if member.rsplit("/", 1)[-1] == name and "__MACOSX" not in member]
        if len(found) > 1:
            raise DataError(f"{path}: holds {' and '.join(found)}; unpack it and name one of them")
        if found:
            folder = found[0].removesuffix(name)
            beside = next((folder + movie for movie in movie_names if folder + movie in inside), None)
            ratings = unzip(path, found[0], scratch)
            movies = None if beside is None else unzip(path, beside, scratch)
            return Source(
                _text_format(ratings),
                (ratings,),
                (f"{path}:{found[0]}",),
                movies,
                None if beside is None else f"{path}:{beside}",
            )
    raise DataError(f"{path}: holds none of {', '.join(KNOWN_FILES)}; it holds {', '.join(inside[:5]) or 'nothing'}")


def _text_format(path: Path) -> Format:
    """By the first line: four fields separated by :: or, the last a whole number, by tabs; else it is a header."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        line = file.readline(10_000).rstrip("\r\n")
    if len(line.split("::")) == 4:
        return Format.DAT
    fields = line.split("\t")
    return Format.U_DATA if len(fields) == 4 and fields[3].strip().isdigit() else Format.CSV


def choose_columns(header: Sequence[str], names: ColumnNames, where: str, has_options: bool = True) -> dict[str, str]:
    """The column of each schema name that the header has. Raises DataError where one is missing or occurs twice.

    `has_options`: the command has options for other names, which the message then says.
    """
    chosen, missing = {}, []
    for role, defaults in DEFAULT_COLUMNS.items():
        given = names.named(role)
        candidates = defaults if given is None else (given,)
        name = next((candidate for candidate in candidates if candidate in header), None)
        if name is not None:
            chosen[role] = name
        elif given is not None or role != RATING:
            hint = f" (or another, given as {OPTIONS[role]})" if given is None and has_options else ""
            missing.append(" or ".join(candidates) + hint)
    came = ",".join(header)
    if missing:
        raise DataError(f"{where}: column {', '.join(missing)} is missing; the header is {came!r}")
    repeated = [name for name in chosen.values() if list(header).count(name) > 1]
    if repeated:
        raise DataError(f"{where}: column {repeated[0]} occurs twice; the header is {came!r}")
    if len(set(chosen.values())) < len(chosen):
        raise DataError(f"{where}: one column is given for two purposes: {', '.join(chosen.values())}")
    return chosen
