"""Which pieces the input is read in, and how its columns are to be read: from the Parquet footers alone."""

import dataclasses
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.data.reading.columns import ColumnNames, choose_columns
from jaxrec.data.reading.connection import first_line
from jaxrec.data.reading.formats import SAMPLE_ROWS
from jaxrec.data.reading.rules import TimeUnit
from jaxrec.data.reading.sources import parquet_files
from jaxrec.data.reading.times import recognize_times
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError


@dataclasses.dataclass(frozen=True)
class Piece:
    """Row groups of one file that one task reads. `first_row`: rows of the file before them."""

    path: str
    row_groups: tuple[int, ...]
    first_row: int


@dataclasses.dataclass(frozen=True)
class Columns:
    """A file's columns. `names`: by schema name, in the order of USER, ITEM, RATING, TIME; no RATING: implicit.

    `milliseconds`: times are not in seconds; timestamps of any unit are read as milliseconds.
    """

    names: dict[str, str]
    text_users: bool
    text_items: bool
    milliseconds: bool


def plan(folder: Path, rows_per_piece: int) -> tuple[Columns, list[Piece]]:
    """The pieces in the order of the rows: files by name, as one machine reads them, each of `rows_per_piece` rows
    or one row group if that is more.

    Raises DataError where a file is no Parquet, a column is missing or of another kind, or there is no row.
    """
    paths = parquet_files(folder)
    if not paths:
        raise DataError(f"{folder}: holds no .parquet file")
    pieces: list[Piece] = []
    columns: Columns | None = None
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                metadata, found = file.metadata, _columns(file, path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not Parquet: {first_line(error)}") from error
        columns = columns or found
        if found != columns:
            raise DataError(f"{path}: its columns {found} differ from those of {paths[0]}, {columns}")
        pieces += _pieces(
            path, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], rows_per_piece
        )
    if columns is None or not pieces:
        raise DataError(f"{folder}: no row in {len(paths)} Parquet files")
    return columns, pieces


def _columns(file: pq.ParquetFile, path: Path) -> Columns:
    schema = file.schema_arrow
    chosen = choose_columns(schema.names, ColumnNames(), str(path), has_options=False)
    kinds = {role: schema.field(name).type for role, name in chosen.items()}
    text = {}
    for role in (USER, ITEM):
        text[role] = pa.types.is_string(kinds[role]) or pa.types.is_large_string(kinds[role])
        if not text[role] and not pa.types.is_integer(kinds[role]):
            raise DataError(f"{path}: {chosen[role]} is {kinds[role]}; expected whole numbers or text as ids")
    if not pa.types.is_integer(kinds[TIME]) and not pa.types.is_timestamp(kinds[TIME]):
        raise DataError(f"{path}: {chosen[TIME]} is {kinds[TIME]}; expected whole seconds since 1970 or timestamps")
    if RATING in kinds and not pa.types.is_integer(kinds[RATING]) and not pa.types.is_floating(kinds[RATING]):
        raise DataError(f"{path}: {chosen[RATING]} is {kinds[RATING]}; expected numbers as ratings")
    order = [role for role in (USER, ITEM, RATING, TIME) if role in chosen]
    return Columns(
        {role: chosen[role] for role in order}, text[USER], text[ITEM], _milliseconds(file, chosen[TIME], path)
    )


def _milliseconds(file: pq.ParquetFile, column: str, path: Path) -> bool:
    """By the type, or the first rows."""
    if pa.types.is_timestamp(file.schema_arrow.field(column).type):
        return True
    batch = next(file.iter_batches(SAMPLE_ROWS, columns=[column]), None)
    sample = [] if batch is None else batch.column(0).to_pylist()
    form = recognize_times(sample, time.time(), column)
    if form.unit not in (TimeUnit.SECONDS, TimeUnit.MILLISECONDS):
        raise DataError(f"{path}: {column} is in {form}; expected whole seconds or milliseconds, or timestamps")
    return form.unit is TimeUnit.MILLISECONDS


def _pieces(path: Path, group_rows: list[int], rows_per_piece: int) -> list[Piece]:
    pieces: list[Piece] = []
    groups: list[int] = []
    first = rows = 0
    for number, count in enumerate(group_rows):
        if groups and rows + count > rows_per_piece:
            pieces.append(Piece(str(path), tuple(groups), first))
            groups, first, rows = [], first + rows, 0
        groups.append(number)
        rows += count
    return [*pieces, Piece(str(path), tuple(groups), first)] if rows else pieces
