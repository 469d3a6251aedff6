"""Which files a log consists of, and in which of the known formats."""

import dataclasses
import enum
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from jaxrec.data.reading.archives import gunzip, unzip, zip_names
from jaxrec.data.reading.columns import NOT_READ, ColumnNames, choose_columns, described, ordered_columns
from jaxrec.data.reading.dialect import Dialect, recognize
from jaxrec.data.reading.text_file import TextTable, utf8_copy
from jaxrec.data.reading.times import FIRST_PLAUSIBLE
from jaxrec.data.schema import ITEM, RATING, SECONDS_PER_DAY, TIME, USER
from jaxrec.errors import DataError

PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".dat", ".data", ".json", ".jsonl", ".ndjson", ".inter", ".tab", ".psv")
# Ratings file, and the names that its movies may have beside it.
KNOWN_FILES = {
    "ratings.csv": ("movies.csv",),
    "ratings.dat": ("movies.dat",),
    "u.data": ("u.item", "movies.csv"),
}
FIXED_COLUMNS = (USER, ITEM, RATING, TIME)  # of MovieLens' files without a header
FIXED_LABELS = {USER: "userId", ITEM: "movieId", RATING: "rating", TIME: "timestamp"}


class Format(enum.Enum):
    """The formats, as they are printed."""

    CSV = "CSV with a header"
    NO_HEADER = "CSV without a header"
    DAT = "MovieLens 1M or 10M (.dat, fields separated by ::)"
    U_DATA = "MovieLens 100K (u.data, fields separated by tabs)"
    JSON_LINES = "JSON lines"
    PARQUET = "Parquet"


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """How text is written; None: recognized."""

    delimiter: str | None = None
    encoding: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A log's files.

    Attributes:
        names: What messages call them (the path, or archive:member); `paths`: where they are.
        movies: Their file, or a frame that was given.
        tables, counts: Text files with their columns, and how many rows each must have.
    """

    format: Format
    paths: tuple[Path, ...]
    names: tuple[str, ...]
    movies: Path | pd.DataFrame | None = None
    movies_name: str | None = None
    tables: tuple[TextTable, ...] = ()
    counts: tuple[int, ...] = ()

    def __str__(self) -> str:
        files = self.names[0] if len(self.names) == 1 else f"{len(self.names)} files, {self.names[0]} and so on"
        return f"{self.format.value}: {files}; movies: {self.movies_name or 'none'}"

    def reading(self) -> dict[str, str]:
        """How the text is written, recognized or given, for people to read."""
        if not self.tables:
            return {}
        first = self.tables[0]
        encodings = dict.fromkeys(table.encoding for table in self.tables)
        found = {"encoding": ", ".join(encodings)}
        if first.dialect.delimiter is not None:
            found["delimiter"] = {"\t": "tab", " ": "space"}.get(first.dialect.delimiter, first.dialect.delimiter)
        return found


def find_source(
    ratings: Path | Sequence[Path],
    movies: Path | pd.DataFrame | None,
    scratch: Path,
    names: ColumnNames = ColumnNames(),
    text: TextOptions = TextOptions(),
) -> Source:
    """Recognizes what `ratings` is.

    Args:
        ratings: A file, a folder or a zip as downloaded, a .gz, or several files of one form.
        movies: Their file or frame; None: those that lie beside the ratings in the folder or the zip.
        scratch: A folder for what archives hold, and for copies.
        names: The columns that were given.
        text: The delimiter and the encoding that were given.

    Returns:
        The files.

    Raises:
        DataError: For what is not a known format, with what was expected; where a column is missing; where files
            differ in form.
    """
    given = [ratings] if isinstance(ratings, Path) else list(ratings)
    if not given:
        raise DataError("no file of interactions is given; expected at least one")
    try:
        found = [_find(path, _new_folder(scratch)) for path in given]
        source = found[0]
        if len(found) > 1:
            paths, called = ([each for one in found for each in getattr(one, kind)] for kind in ("paths", "names"))
            kinds = {one.format is Format.PARQUET for one in found}
            if len(kinds) > 1:
                raise DataError(f"{given[0]} and others: some are Parquet and some are text; expected one form")
            source = dataclasses.replace(source, paths=tuple(paths), names=tuple(called))
        if source.format is not Format.PARQUET:
            source = _with_tables(source, names, text, scratch)
    except OSError as error:
        raise DataError(f"{error.filename or given[0]}: cannot be read: {error.strerror or error}") from error
    if movies is None:
        return source
    name = "a frame" if isinstance(movies, pd.DataFrame) else str(movies)
    return dataclasses.replace(source, movies=movies, movies_name=name)


def open_text(
    path: Path,
    name: str,
    text: TextOptions,
    scratch: Path,
    choose: Callable[[Dialect], tuple[dict[str, int], dict[str, str]]],
    has_header: bool | None = None,
    expected: str = ",".join(FIXED_LABELS.values()),
) -> tuple[TextTable, int]:
    """A text file with its columns, and how many rows it has if each of its lines is one.

    Args:
        path: The file.
        name: What messages call it.
        text: The delimiter and the encoding that were given.
        scratch: A folder for its copy in UTF-8, where it is in another encoding.
        choose: Position and label by schema name, of a dialect.
        has_header: Whether its first line is a header; None: recognized.
        expected: The header that a message says where the file is empty.

    Returns:
        The table, and the number of its rows.

    Raises:
        DataError: Where it is empty, not of its encoding, or lacks a column.
    """
    scratch.mkdir(exist_ok=True)
    utf8, found, encoding = utf8_copy(path, name, text.encoding, scratch)
    dialect = recognize(utf8, name, text.delimiter, has_header, expected)
    positions, labels = choose(dialect)
    table = TextTable(utf8, name, encoding, dialect, positions, labels)
    return table, found.lines - dialect.header_lines


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files under `folder`, by name: the order of the rows."""
    return sorted(path for path in folder.rglob("*") if path.suffix in PARQUET_SUFFIXES and path.is_file())


def _with_tables(source: Source, names: ColumnNames, text: TextOptions, scratch: Path) -> Source:
    has_header = False if names.order is not None else None
    tables, counts, formats = [], [], []
    for path, name in zip(source.paths, source.names, strict=True):
        formats.append(source.format)

        def choose(dialect: Dialect, name: str = name, path: Path = path) -> tuple[dict[str, int], dict[str, str]]:
            found, positions, labels = _columns(dialect, names, name, path)
            formats[-1] = found
            return positions, labels

        expected = ",".join(names.named(role) or label for role, label in FIXED_LABELS.items())
        table, count = open_text(path, name, text, scratch, choose, has_header, expected)
        tables.append(table)
        counts.append(count)
        if table.labels.keys() != tables[0].labels.keys():
            raise DataError(
                f"{name}: its columns are {described(table.labels)}, and those of {tables[0].name} are "
                f"{described(tables[0].labels)}; expected the same in all files"
            )
    return dataclasses.replace(source, format=formats[0], tables=tuple(tables), counts=tuple(counts))


def _columns(
    dialect: Dialect, names: ColumnNames, name: str, path: Path
) -> tuple[Format, dict[str, int], dict[str, str]]:
    """The format, and position and label by schema name."""
    if names.order is not None:
        if dialect.delimiter is None:
            raise DataError(f"{name}: JSON lines name their fields themselves; --columns is for text without a header")
        if len(names.order) != dialect.width:
            raise DataError(
                f"{name}: --columns names {len(names.order)} columns, and the first line has {dialect.width}; name each"
                " column of the file, with - for one that is not read"
            )
        if names.user or names.item or names.time or names.rating not in (None, NOT_READ):
            raise DataError(f"{name}: --columns says what each column holds; leave --user-col and the like out")
        positions = ordered_columns(names.order, name)
        if names.rating == NOT_READ:
            positions.pop(RATING, None)
        return Format.NO_HEADER, positions, {role: names.order[at] for role, at in positions.items()}
    if dialect.names is not None:
        where = name if dialect.delimiter is None else f"{name}:1"
        chosen = choose_columns(dialect.names, names, where)
        kind = Format.JSON_LINES if dialect.delimiter is None else Format.CSV
        return kind, {role: dialect.names.index(column) for role, column in chosen.items()}, chosen
    with open(path, encoding="utf-8", errors="replace") as file:
        line = file.readline(200).rstrip("\r\n")
    given = any((names.user, names.item, names.time))
    if dialect.width == len(FIXED_COLUMNS) and dialect.delimiter in ("::", "\t") and not given:
        # Whatever lies in the order of MovieLens' files ends with seconds since 1970.
        last = line.split(dialect.delimiter)[-1].strip()
        if last.isdecimal() and FIRST_PLAUSIBLE <= int(last) <= time.time() + SECONDS_PER_DAY:
            kind = Format.DAT if dialect.delimiter == "::" else Format.U_DATA
            read = [role for role in FIXED_COLUMNS if role != RATING or names.rating != NOT_READ]
            return kind, {r: FIXED_COLUMNS.index(r) for r in read}, {r: FIXED_LABELS[r] for r in read}
    raise DataError(
        f"{name}:1: the first line is {line!r}, which looks like a row and not like a header; say what the "
        f"{dialect.width} columns hold: --columns user,item,rating,time in the order of the file, with - for a column "
        "that is not read"
    )


def _find(ratings: Path, scratch: Path) -> Source:
    if ratings.is_dir():
        return _in_folder(ratings, scratch)
    with open(ratings, "rb") as file:
        magic = file.read(4)
    if magic in {b"PK\x03\x04", b"PK\x05\x06"} or ratings.suffix == ".zip":
        return _in_zip(ratings, scratch)
    path = gunzip(ratings, scratch) if magic[:2] == b"\x1f\x8b" or ratings.suffix == ".gz" else ratings
    if magic == b"PAR1" or path.suffix in PARQUET_SUFFIXES:
        return Source(Format.PARQUET, (path,), (str(ratings),))
    return Source(Format.CSV, (path,), (str(ratings),))


def _in_folder(folder: Path, scratch: Path) -> Source:
    for name, movie_names in KNOWN_FILES.items():
        path = folder / name
        if path.is_file():
            movies = next((folder / movie for movie in movie_names if (folder / movie).is_file()), None)
            return Source(Format.CSV, (path,), (str(path),), movies, None if movies is None else str(movies))
    parts = parquet_files(folder)
    texts = sorted(path for path in folder.rglob("*") if _is_text(path))
    if parts and texts:
        raise DataError(f"{folder}: holds Parquet ({parts[0].name}) and text ({texts[0].name}); name the files to read")
    if parts:
        return Source(Format.PARQUET, tuple(parts), tuple(map(str, parts)))
    if not texts:
        raise DataError(f"{folder}: holds none of {', '.join(KNOWN_FILES)} and no .parquet or text file")
    plain = [gunzip(path, _new_folder(scratch)) if path.suffix == ".gz" else path for path in texts]
    return Source(Format.CSV, tuple(plain), tuple(map(str, texts)))


def _is_text(path: Path) -> bool:
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    hidden = path.name.startswith((".", "_"))
    return path.is_file() and not hidden and bool(suffixes) and suffixes[-1].lower() in TEXT_SUFFIXES


def _new_folder(scratch: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=scratch))


def _in_zip(path: Path, scratch: Path) -> Source:
    inside = [name for name in zip_names(path) if "__MACOSX" not in name]
    for name, movie_names in KNOWN_FILES.items():
        found = [member for member in inside if member.rsplit("/", 1)[-1] == name]
        if len(found) > 1:
            raise DataError(f"{path}: holds {' and '.join(found)}; unpack it and name one of them")
        if found:
            folder = found[0].removesuffix(name)
            beside = next((folder + movie for movie in movie_names if folder + movie in inside), None)
            ratings = unzip(path, found[0], scratch)
            movies = None if beside is None else unzip(path, beside, scratch)
            named = None if beside is None else f"{path}:{beside}"
            return Source(Format.CSV, (ratings,), (f"{path}:{found[0]}",), movies, named)
    data = [name for name in inside if Path(name).suffix.lower() in (*TEXT_SUFFIXES, *PARQUET_SUFFIXES)]
    if len(data) == 1:
        only = unzip(path, data[0], scratch)
        kind = Format.PARQUET if only.suffix in PARQUET_SUFFIXES else Format.CSV
        return Source(kind, (only,), (f"{path}:{data[0]}",))
    raise DataError(
        f"{path}: holds none of {', '.join(KNOWN_FILES)}; it holds {', '.join(inside[:5]) or 'nothing'}; unpack it and"
        " name the file of the interactions"
    )
