"""Reads logs as they are: recognizes, checks every row, sorts. Bad input is named with file and line."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from jaxrec.config import PrepareConfig
from jaxrec.data.event_log import DuplicatesError, EventLog, SortedLog, sort_log
from jaxrec.data.reading.bad_rows import BadRows, OnBadRows
from jaxrec.data.reading.check import Loaded, ReadOptions, load
from jaxrec.data.reading.connection import MEMORY_GB, engine
from jaxrec.data.reading.formats import Relation, relation_of
from jaxrec.data.reading.movies import read_movies
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.reading.sources import Source, find_source
from jaxrec.data.schema import ITEM, RATING, TIME, USER, RatingScale

__all__ = ["input_counts", "movies_for", "read_log", "read_movies", "read_ratings", "reading"]


def read_ratings(
    path: Path, scale: RatingScale | None = None, options: ReadOptions = ReadOptions()
) -> tuple[pd.DataFrame, RatingScale | None]:
    """Reads a log in any known format into a frame.

    Returns the validated interactions in the file's order (user_id and item_id int64, or str where ids are text;
    rating float32, NaN where there is none; timestamp int64 seconds) and the rating scale, inferred where none is
    given. Raises DataError naming file and line for the first bad rows.
    """
    bad = BadRows(OnBadRows.FAIL)
    options = dataclasses.replace(options, scale=scale)
    with reading(path, None, MEMORY_GB, None) as (scratch, source, connection):
        relation = relation_of(source, options.columns, connection)
        loaded, _ = read_log(connection, relation, options, PrepareConfig(), bad, scratch, scratch)
        query = "SELECT user, item, coalesce(rating, 'nan'::FLOAT) AS rating, time FROM events ORDER BY rowid"
        columns = [np.ma.getdata(column) for column in connection.execute(query).fetchnumpy().values()]
    return pd.DataFrame(dict(zip((USER, ITEM, RATING, TIME), columns, strict=True))), loaded.scale


@contextlib.contextmanager
def reading(
    ratings: Path, movies: Path | None, memory_gb: float, scratch_parent: Path | None
) -> Iterator[tuple[Path, Source, duckdb.DuckDBPyConnection]]:
    """A scratch folder, the recognized source, and the engine; all are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".jaxrec-", dir=scratch_parent) as name:
        source = find_source(ratings, movies, Path(name))
        with engine(Path(name), memory_gb) as connection:
            yield Path(name), source, connection


def read_log(
    connection: duckdb.DuckDBPyConnection,
    relation: Relation,
    options: ReadOptions,
    config: PrepareConfig,
    bad: BadRows,
    scratch: Path,
    folder: Path,
) -> tuple[Loaded, SortedLog]:
    """Reads, checks and sorts a log into columns in `folder`. Raises DataError for bad rows, unless in quarantine."""
    loaded = load(connection, relation, options, bad, scratch)
    try:
        found = sort_log(connection, folder, config.ties, config.seed, bad if loaded.exact else None)
    except DuplicatesError:
        loaded = load(connection, relation, options, bad, scratch, exact=True)
        found = sort_log(connection, folder, config.ties, config.seed, bad)
    bad.fail_if_any()
    return loaded, found


def movies_for(source: Source, log: EventLog) -> pd.DataFrame | None:
    """The source's movies, with ids of the kind that the log has."""
    if source.movies is None:
        return None
    kind = IdKind.INTEGER if log.items.raw_ids.dtype == np.int64 else IdKind.TEXT
    return read_movies(source.movies, source.movies_name, kind)


def input_counts(description: str, loaded: Loaded, found: SortedLog, bad: BadRows) -> dict[str, Any]:
    """What was read, as JSON values. `tied_events` have the timestamp of the same user's event before."""
    return {
        "source": description,
        "time_unit": loaded.time_unit.value,
        "rows": loaded.rows - found.duplicates + bad.count,
        "bad_rows": bad.count,
        "bad_rows_by_field": dict(bad.by_field),
        "duplicates": found.duplicates,
        "tied_events": found.tied,
    }
