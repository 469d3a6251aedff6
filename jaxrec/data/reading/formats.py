"""What DuckDB reads: text, Parquet or a frame, as one SQL relation with the raw columns user, item, rating and time.

The rows of a relation are numbered from 0 in the order of the input, so that a row that breaks a rule is found again,
with its file, line and text, only where there is one.
"""

import csv
import itertools
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import duckdb
import numpy as np
import pandas as pd

from jaxrec.data.reading.bad_rows import BadRow
from jaxrec.data.reading.columns import ColumnNames, choose_columns
from jaxrec.data.reading.connection import first_line, quoted, quoted_name
from jaxrec.data.reading.lines import lines_at
from jaxrec.data.reading.rules import FLOAT_IDS, FLOAT_TYPES, TEXT_TYPE
from jaxrec.data.reading.sources import Format, Source
from jaxrec.data.reading.text_file import TextTable, fields_of, repair, rows, select
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError

SAMPLE_ROWS = 1000
RAW_ROWS = 100_000  # rows that are looked up at a time to say what is wrong with them
SHORT = {USER: "user", ITEM: "item", RATING: "rating", TIME: "time"}


class Relation(Protocol):
    """A source of rows.

    Attributes:
        name: What messages call it.
        typed: Its text is meant as text, so that an id of digits is none of a number.
        types: SQL type by schema name.
        labels: The column's own name by schema name.
        trim: White space around fields is cut; it may be set before the rows are read.
    """

    name: str
    typed: bool
    types: dict[str, str]
    labels: dict[str, str]
    trim: bool

    def sql(self) -> str:
        """SQL of a relation with user, item, rating, time."""

    def count(self) -> int | None:
        """How many rows `sql` must give; None: as many as it gives."""

    def repair(self, report: Callable[[BadRow], object]) -> bool:
        """Sets rows aside that are not whole; False where there is nothing to repair. To be called once."""

    def places(self, numbers: np.ndarray) -> Iterator[tuple[str, int]]:
        """File and line (from 1) of rows; `numbers` [rows] from 0."""

    def texts(self, numbers: np.ndarray) -> Iterator[str]:
        """The text of rows; `numbers` [rows] from 0, rising."""

    def raw(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        """Rows as they were read, in parts that fit in memory: their numbers, and SQL of a relation with number, user,
        item, rating, time. `numbers` [rows] from 0, rising."""


class TextRelation:
    """Text files, one after the other; every column is text."""

    typed = False

    def __init__(
        self, tables: Sequence[TextTable], counts: Sequence[int], scratch: Path, connection: duckdb.DuckDBPyConnection
    ) -> None:
        self.name = tables[0].name
        self.labels = dict(tables[0].labels)
        self.types = dict.fromkeys(tables[0].columns, TEXT_TYPE)
        self._tables = tables
        self._scratch = scratch
        self._connection = connection
        self._paths = [table.path for table in tables]
        self._counts = np.array(counts)
        # The lines of each file that begin no row: its header, until it is repaired.
        self._removed: list[np.ndarray] = [np.arange(1, table.dialect.header_lines + 1) for table in tables]
        self._repaired = False
        self.trim = self._has_spaces()

    def _has_spaces(self) -> bool:
        table = self._tables[0]
        with open(table.path, encoding="utf-8", errors="replace") as file:
            sample = list(itertools.islice(file, SAMPLE_ROWS))
        for line in sample:
            try:
                fields = fields_of(table.dialect, line.rstrip("\n"))
            except (csv.Error, ValueError):  # a row that is not whole is named later
                continue
            if any(field != field.strip(" \t") for field in fields):
                return True
        return False

    def sql(self) -> str:
        return " UNION ALL ".join(
            select(table, path, SHORT, self.trim) for table, path in zip(self._tables, self._paths, strict=True)
        )

    def count(self) -> int:
        return int(self._counts.sum())

    def repair(self, report: Callable[[BadRow], object]) -> bool:
        if self._repaired:
            return False
        self._repaired = True
        for at, table in enumerate(self._tables):
            copy = self._scratch / f"rows-{at}.txt"
            self._removed[at], self._counts[at] = repair(table, copy, report)
            self._paths[at] = copy
        return True

    def places(self, numbers: np.ndarray) -> Iterator[tuple[str, int]]:
        ends = np.cumsum(self._counts)
        files = np.searchsorted(ends, numbers, side="right")
        lines = np.empty(len(numbers), np.int64)
        for at in np.unique(files):
            local = numbers[files == at] - (ends[at] - self._counts[at])
            lines[files == at] = nth_kept(local, self._removed[at] - 1) + 1
        names = [table.name for table in self._tables]
        return ((names[file], line) for file, line in zip(files.tolist(), lines.tolist(), strict=True))

    def texts(self, numbers: np.ndarray) -> Iterator[str]:
        for at, local in self._by_file(numbers):
            yield from lines_at(self._tables[at].path, nth_kept(local, self._removed[at] - 1) + 1)

    def raw(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        found = self._fields(numbers)
        columns = ", ".join(f"nullif({name}::VARCHAR, '') AS {name}" for name in SHORT.values())
        for start in range(0, len(numbers), RAW_ROWS):
            part = numbers[start : start + RAW_ROWS]
            frame = pd.DataFrame(itertools.islice(found, len(part)), columns=list(SHORT.values()), dtype=object)
            frame.insert(0, "number", part)
            self._connection.register("raw_rows", frame)
            yield part, f"SELECT number, {columns} FROM raw_rows"

    def _fields(self, numbers: np.ndarray) -> Iterator[list[str]]:
        for at, local in self._by_file(numbers):
            table = self._tables[at]
            for fields in rows(table, self._paths[at], local):
                values = [fields[table.columns[role]] if role in table.columns else "" for role in SHORT]
                yield [value.strip(" \t") if self.trim else value for value in values]

    def _by_file(self, numbers: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """The files of rows, and the rows' numbers in them."""
        ends = np.cumsum(self._counts)
        cuts = np.searchsorted(numbers, ends)
        parts = np.split(numbers, cuts[:-1])
        return [(at, part - (ends[at] - self._counts[at])) for at, part in enumerate(parts) if len(part)]


class ParquetRelation:
    """Parquet files of one schema, in the order of their names."""

    typed = False
    trim = False

    def __init__(self, source: Source, names: ColumnNames, connection: duckdb.DuckDBPyConnection) -> None:
        self.name = source.names[0]
        self._connection = connection
        self._files = "[" + ", ".join(quoted(str(path)) for path in source.paths) + "]"
        self._names = dict(zip(map(str, source.paths), source.names, strict=True))
        try:
            described = connection.execute(
                f"DESCRIBE SELECT * FROM read_parquet({self._files}, union_by_name = true)"
            ).fetchall()
        except duckdb.Error as error:
            raise DataError(f"{self.name}: not Parquet: {first_line(error)}") from error
        types = {row[0]: row[1] for row in described}
        self.labels = choose_columns(list(types), names, self.name)
        self.types = {role: types[column] for role, column in self.labels.items()}

    def sql(self) -> str:
        return f"SELECT {self._chosen()} FROM read_parquet({self._files}, union_by_name = true)"

    def count(self) -> None:
        return None

    def repair(self, report: Callable[[BadRow], object]) -> bool:
        return False

    def places(self, numbers: np.ndarray) -> Iterator[tuple[str, int]]:
        starts, names = self._starts(), list(self._names.values())
        files = np.searchsorted(starts, numbers, side="right") - 1
        lines = numbers - starts[files] + 1
        return ((names[file], line) for file, line in zip(files.tolist(), lines.tolist(), strict=True))

    def texts(self, numbers: np.ndarray) -> Iterator[str]:
        columns = ", ".join(f"coalesce({quoted_name(name)}::VARCHAR, '')" for name in self.labels.values())
        for _, query in self._parts(numbers, f"concat_ws(',', {columns}) AS text"):
            yield from (text for _, text in self._connection.execute(f"{query} ORDER BY number").fetchall())

    def raw(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        return self._parts(numbers, self._chosen())

    def _parts(self, numbers: np.ndarray, columns: str) -> Iterator[tuple[np.ndarray, str]]:
        firsts = zip(self._names, self._starts().tolist(), strict=True)
        pairs = ", ".join(f"({quoted(path)}, {start})" for path, start in firsts)
        numbered = (
            f"SELECT start + file_row_number AS number, {columns} "
            f"FROM read_parquet({self._files}, union_by_name = true, filename = true, file_row_number = true) "
            f"JOIN (VALUES {pairs}) AS starts(filename, start) USING (filename)"
        )
        for part, wanted in _wanted(self._connection, numbers):
            yield part, f"SELECT * FROM ({numbered}) SEMI JOIN ({wanted}) USING (number)"

    def _starts(self) -> np.ndarray:
        """[files] int64: the number of each file's first row."""
        query = f"SELECT file_name, num_rows FROM parquet_file_metadata({self._files})"
        counts = dict(self._connection.execute(query).fetchall())
        return np.concatenate([[0], np.cumsum([counts[path] for path in self._names])[:-1]]).astype(np.int64)

    def _chosen(self) -> str:
        return _renamed({role: quoted_name(column) for role, column in self.labels.items()})


class TableRelation:
    """A table of DuckDB with the columns user, item, rating (if there is one), time and line, of one file or frame."""

    typed = True
    trim = False

    def __init__(
        self,
        table: str,
        name: str,
        labels: dict[str, str],
        connection: duckdb.DuckDBPyConnection,
        nan_is_none: bool = False,
    ) -> None:
        self.name = name
        self.labels = labels
        self._connection = connection
        types = {row[0]: row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()}
        self.types = {role: types[SHORT[role]] for role in labels}
        rating = "rating" if RATING in self.types else "NULL"
        if nan_is_none and self.types.get(RATING) in FLOAT_TYPES:
            rating = "CASE WHEN NOT isnan(rating) THEN rating END"
        self._first = connection.execute(f"SELECT coalesce(min(line), 1) FROM {table}").fetchall()[0][0]
        self._rows = f"SELECT user, item, {rating} AS rating, time, line FROM {table}"

    def sql(self) -> str:
        return f"SELECT user, item, rating, time FROM ({self._rows})"

    def count(self) -> None:
        return None

    def repair(self, report: Callable[[BadRow], object]) -> bool:
        return False

    def places(self, numbers: np.ndarray) -> Iterator[tuple[str, int]]:
        return ((self.name, line) for line in (numbers + self._first).tolist())

    def texts(self, numbers: np.ndarray) -> Iterator[str]:
        text = "concat_ws(',', coalesce(user::VARCHAR, ''), coalesce(item::VARCHAR, ''), coalesce(time::VARCHAR, ''))"
        for _, query in self.raw(numbers):
            yield from (
                row[0] for row in self._connection.execute(f"SELECT {text} FROM ({query}) ORDER BY number").fetchall()
            )

    def raw(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
        numbered = f"SELECT line - {self._first} AS number, user, item, rating, time FROM ({self._rows})"
        for part, wanted in _wanted(self._connection, numbers):
            yield part, f"SELECT * FROM ({numbered}) SEMI JOIN ({wanted}) USING (number)"


def frame_relation(frame: pd.DataFrame, names: ColumnNames, connection: duckdb.DuckDBPyConnection) -> Relation:
    """The relation of a frame; a NaN is no rating. Raises DataError where a column is missing."""
    header = [str(name) for name in frame.columns]
    labels = choose_columns(header, names, "interactions")
    columns = {}
    for role, label in labels.items():
        column = frame.iloc[:, header.index(label)]
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(column.dtype.categories.dtype)
        if role in (USER, ITEM) and column.dtype == object:
            _check_ids(column, label)
        if pd.api.types.infer_dtype(column) == "integer" and column.dtype == object:
            column = column.astype("Int64")
        elif column.dtype == object or pd.api.types.is_string_dtype(column.dtype):
            column = column.astype(object).where(column.notna(), None).map(lambda v: None if v is None else str(v))
        columns[SHORT[role]] = column.reset_index(drop=True)
    columns["line"] = pd.Series(np.arange(1, len(frame) + 1))
    connection.register("frame", pd.DataFrame(columns))
    return TableRelation("frame", "interactions", labels, connection, nan_is_none=True)


def _check_ids(column: pd.Series, label: str) -> None:
    """Raises DataError for Python objects that are no ids."""
    kinds = {type(value) for value in column[column.notna()]}
    if kinds & {float, np.float32, np.float64}:
        raise DataError(f"interactions: column {label} holds {float.__name__}; {FLOAT_IDS}")
    for kind in sorted(kinds, key=str):
        if kind is bool or not issubclass(kind, str | int | np.integer | uuid.UUID):
            raise DataError(
                f"interactions: column {label} holds {kind.__name__}; expected whole numbers or text as ids"
            )


def relation_of(source: Source, names: ColumnNames, scratch: Path, connection: duckdb.DuckDBPyConnection) -> Relation:
    """The relation of a log's files. Raises DataError where a column is missing."""
    if source.format is Format.PARQUET:
        return ParquetRelation(source, names, connection)
    return TextRelation(source.tables, source.counts, scratch, connection)


def nth_kept(numbers: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The places of the n-th entries that stay when others are removed.

    Args:
        numbers: [n] int64, from 0: among those that stay.
        removed: [removed] int64, from 0, rising: places among all.

    Returns:
        [n] int64: places among all.

    Examples:
        >>> nth_kept(np.array([0, 1, 2]), np.array([0, 2])).tolist()  # of 0 1 2 3 4 stay 1 3 4
        [1, 3, 4]
    """
    return numbers + np.searchsorted(removed - np.arange(len(removed)), numbers, side="right")


def _wanted(connection: duckdb.DuckDBPyConnection, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, str]]:
    for start in range(0, len(numbers), RAW_ROWS):
        part = numbers[start : start + RAW_ROWS]
        connection.register("wanted", pd.DataFrame({"number": part}))
        yield part, "SELECT number FROM wanted"


def _renamed(columns: dict[str, str]) -> str:
    return ", ".join(f"{columns.get(role, 'NULL')} AS {short}" for role, short in SHORT.items())
