"""What the engine reads: text, Parquet or a frame, as one SQL relation with the raw columns user, item, rating, time.

Each source has two ways: `fast` is the engine's parallel reading, without line numbers; `exact` has the file, the line
and the text of each row, and for text goes through Python row by row. Bad input is read a second time, exactly.
"""

import csv
import itertools
from pathlib import Path
from typing import Protocol

import duckdb
import numpy as np
import pandas as pd

from jaxrec.data.reading.bad_rows import BadRows, OnBadRows
from jaxrec.data.reading.connection import first_line, quoted, quoted_name
from jaxrec.data.reading.rules import FLOAT_TYPES, TEXT_TYPE, TimeUnit, recognize_time_unit
from jaxrec.data.reading.sources import ColumnNames, Format, Source, choose_columns
from jaxrec.data.reading.text_rows import TextTable, open_table, rows
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError

SAMPLE_ROWS = 1000
SHORT = {USER: "user", ITEM: "item", RATING: "rating", TIME: "time"}


class Relation(Protocol):
    """A source of rows. `types`: SQL type by schema name; `labels`: the column's own name; `name`: for messages.

    `typed`: text is meant as text, so that an id of digits is none of a number.
    """

    name: str
    typed: bool
    types: dict[str, str]
    labels: dict[str, str]

    def time_unit(self) -> TimeUnit:
        """By the first rows."""

    def fast(self) -> str:
        """SQL of a relation with user, item, rating, time."""

    def exact(self, scratch: Path, bad: BadRows) -> str:
        """SQL of a relation with file, line, text, user, item, rating, time; rows without these go to `bad`."""


class TextRelation:
    """A delimited file; every column is text."""

    typed = False

    def __init__(self, table: TextTable) -> None:
        self._table = table
        self.name = table.name
        self.labels = table.labels
        self.types = dict.fromkeys(table.columns, TEXT_TYPE)

    def time_unit(self) -> TimeUnit:
        position = self._table.columns[TIME]
        ignored = BadRows(OnBadRows.QUARANTINE)
        sample = itertools.islice(rows(self._table, ignored), SAMPLE_ROWS)
        return recognize_time_unit([fields[position].strip() for _, fields, _ in sample])

    def fast(self) -> str:
        table = self._table
        quote = '"' if table.header is not None else ""
        columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(table.width))
        chosen = ", ".join(_renamed({role: f"c{i}" for role, i in table.columns.items()}))
        return (
            f"SELECT {chosen} FROM read_csv({quoted(str(table.path))}, auto_detect = false, "
            f"delim = {quoted(table.delimiter)}, quote = '{quote}', escape = '{quote}', "
            f"header = {table.header is not None}, columns = {{{columns}}})"
        )

    def exact(self, scratch: Path, bad: BadRows) -> str:
        """Rewrites the file with line numbers."""
        numbered = scratch / "numbered.csv"
        positions = [self._table.columns.get(role) for role in SHORT]
        with open(numbered, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            for line, fields, text in rows(self._table, bad):
                chosen = ["" if position is None else fields[position].strip() for position in positions]
                one_line = text.replace("\r", "\\r").replace("\n", "\\n")
                writer.writerow([line, *chosen, one_line])
        columns = ", ".join(f"{quoted(name)}: 'VARCHAR'" for name in SHORT.values())
        return (
            f"SELECT {quoted(self.name)} AS file, * FROM read_csv({quoted(str(numbered))}, auto_detect = false, "
            f"delim = ',', quote = '\"', escape = '\"', header = false, max_line_size = 20000000, "
            f"columns = {{'line': 'BIGINT', {columns}, 'text': 'VARCHAR'}})"
        )


class ParquetRelation:
    """Parquet files of one schema, in the order of their names."""

    typed = False

    def __init__(self, source: Source, names: ColumnNames, connection: duckdb.DuckDBPyConnection) -> None:
        self.name = source.names[0]
        self._connection = connection
        self._files = "[" + ", ".join(quoted(str(path)) for path in source.paths) + "]"
        try:
            described = connection.execute(f"DESCRIBE SELECT * FROM read_parquet({self._files})").fetchall()
        except duckdb.Error as error:
            raise DataError(f"{self.name}: not Parquet: {first_line(error)}") from error
        types = {row[0]: row[1] for row in described}
        self.labels = choose_columns(list(types), names, self.name)
        self.types = {role: types[column] for role, column in self.labels.items()}

    def time_unit(self) -> TimeUnit:
        query = f"SELECT {quoted_name(self.labels[TIME])} FROM read_parquet({self._files}) LIMIT {SAMPLE_ROWS}"
        return recognize_time_unit([row[0] for row in self._connection.execute(query).fetchall()])

    def fast(self) -> str:
        return f"SELECT {self._chosen()} FROM read_parquet({self._files})"

    def exact(self, scratch: Path, bad: BadRows) -> str:
        columns = ", ".join(f"coalesce({quoted_name(name)}::VARCHAR, '')" for name in self.labels.values())
        text = f"concat_ws(',', {columns})"
        return (
            f"SELECT filename AS file, file_row_number + 1 AS line, {self._chosen()}, {text} AS text "
            f"FROM read_parquet({self._files}, filename = true, file_row_number = true)"
        )

    def _chosen(self) -> str:
        return ", ".join(_renamed({role: quoted_name(column) for role, column in self.labels.items()}))


class TableRelation:
    """A table of the engine with columns user, item, rating (if there is one), time and line, of one file or frame.

    Times are in seconds where nothing else is said.
    """

    typed = True

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
        types = {row[0]: row[1] for row in connection.execute(f"DESCRIBE {table}").fetchall()}
        self.types = {role: types[SHORT[role]] for role in labels}
        rating = "rating" if RATING in self.types else "NULL"
        if nan_is_none and self.types.get(RATING) in FLOAT_TYPES:
            rating = "CASE WHEN NOT isnan(rating) THEN rating END"
        self._rows = f"SELECT user, item, {rating} AS rating, time, line FROM {table}"

    def time_unit(self) -> TimeUnit:
        return TimeUnit.SECONDS

    def fast(self) -> str:
        return self._rows

    def exact(self, scratch: Path, bad: BadRows) -> str:
        text = "concat_ws(',', coalesce(user::VARCHAR, ''), coalesce(item::VARCHAR, ''), coalesce(time::VARCHAR, ''))"
        return f"SELECT {quoted(self.name)} AS file, *, {text} AS text FROM ({self._rows})"


def frame_relation(frame: pd.DataFrame, names: ColumnNames, connection: duckdb.DuckDBPyConnection) -> Relation:
    """The relation of a frame; a NaN is no rating. Raises DataError where a column is missing."""
    labels = choose_columns(list(frame.columns), names, "interactions")
    columns = {}
    for role, label in labels.items():
        column = frame[label]
        if pd.api.types.infer_dtype(column) == "integer" and column.dtype == object:
            column = column.astype("Int64")
        elif column.dtype == object or pd.api.types.is_string_dtype(column.dtype):
            column = column.astype(object).where(column.notna(), None).map(lambda v: None if v is None else str(v))
        columns[SHORT[role]] = column.reset_index(drop=True)
    columns["line"] = pd.Series(np.arange(1, len(frame) + 1))
    connection.register("frame", pd.DataFrame(columns))
    return TableRelation("frame", "interactions", labels, connection, nan_is_none=True)


def relation_of(source: Source, names: ColumnNames, connection: duckdb.DuckDBPyConnection) -> Relation:
    """The relation of a log's files. Raises DataError where a column is missing."""
    if source.format is Format.PARQUET:
        return ParquetRelation(source, names, connection)
    return TextRelation(open_table(source.paths[0], source.names[0], source.format, names))


def _renamed(columns: dict[str, str]) -> list[str]:
    return [f"{columns.get(role, 'NULL')} AS {short}" for role, short in SHORT.items()]
