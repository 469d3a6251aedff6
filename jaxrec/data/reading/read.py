"""Reads logs as they are: recognizes, checks every row, sorts. Bad input is named with file and line."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from jaxrec.config import MEMORY_GB, PrepareConfig, RatingScale
from jaxrec.data.reading.bad_rows import BadRows, OnBadRows
from jaxrec.data.reading.check import Loaded, ReadOptions, load
from jaxrec.data.reading.connection import connect
from jaxrec.data.reading.formats import Relation, frame_relation, relation_of
from jaxrec.data.reading.sort import DuplicatesError, SortedLog, sort_log
from jaxrec.data.reading.sources import ColumnNames, find_source
from jaxrec.data.schema import ITEM, RATING, TIME, USER

PathOrFrame = Path | str | pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Workspace:
    """One log while it is read: its rows, the engine, and `scratch`, a folder that is gone afterwards.

    `movies`: those that were given, or that lie beside the log; `movies_name`: what messages call their file.
    """

    relation: Relation
    connection: duckdb.DuckDBPyConnection
    scratch: Path
    description: str
    movies: pd.DataFrame | Path | None
    movies_name: str | None


@contextlib.contextmanager
def open_workspace(
    interactions: PathOrFrame,
    movies: PathOrFrame | None = None,
    names: ColumnNames = ColumnNames(),
    memory_gb: float = MEMORY_GB,
    parent: Path | None = None,
) -> Iterator[Workspace]:
    """Recognizes a log and starts the engine. Scratch files lie in `parent`; None: where the system has its own."""
    movies = Path(movies) if isinstance(movies, str) else movies
    with tempfile.TemporaryDirectory(prefix=".jaxrec-", dir=parent) as name:
        scratch = Path(name)
        if isinstance(interactions, pd.DataFrame):
            with connect(scratch, memory_gb, on_disk=parent is not None) as connection:
                relation = frame_relation(interactions, names, connection)
                yield Workspace(relation, connection, scratch, "a frame", movies, None)
            return
        source = find_source(Path(interactions), movies, scratch)
        with connect(scratch, memory_gb) as connection:
            rows = relation_of(source, names, connection)
            yield Workspace(rows, connection, scratch, str(source), source.movies, source.movies_name)


def read_ratings(
    path: Path, scale: RatingScale | None = None, options: ReadOptions = ReadOptions()
) -> tuple[pd.DataFrame, RatingScale | None]:
    """Reads a log in any known format into a frame.

    Args:
        path: A file, a folder or an archive (see `jaxrec.data.reading.sources.find_source`).
        scale: The range of possible ratings; None: recognized.
        options: How to read it.

    Returns:
        The interactions in the file's order (user_id and item_id int64, or str where ids are text; rating float32, NaN
        where there is none; timestamp int64 seconds), and the rating scale, None where there are no ratings.

    Raises:
        DataError: For bad rows, naming file and line of the first ones.
    """
    bad = BadRows(OnBadRows.FAIL)
    with open_workspace(path, names=options.columns) as work:
        loaded, _ = read_log(work, options, PrepareConfig(rating_scale=scale), bad, work.scratch / "sorted")
        query = "SELECT user, item, coalesce(rating, 'nan'::FLOAT) AS rating, time FROM events ORDER BY rowid"
        columns = [np.ma.getdata(column) for column in work.connection.execute(query).fetchnumpy().values()]
    return pd.DataFrame(dict(zip((USER, ITEM, RATING, TIME), columns, strict=True))), loaded.scale


def read_log(
    work: Workspace,
    options: ReadOptions,
    config: PrepareConfig,
    bad: BadRows,
    folder: Path,
    add_events: Callable[[bool], None] = lambda exact: None,
) -> tuple[Loaded, SortedLog]:
    """Reads, checks and sorts a log into columns in the new `folder`.

    `add_events` may put more rows into the engine's `events` before they are sorted; its argument says whether these
    have file, line and text. Raises DataError for bad rows, unless in quarantine.
    """
    folder.mkdir()

    def read(exact: bool) -> tuple[Loaded, SortedLog]:
        loaded = load(work.connection, work.relation, options, config.rating_scale, bad, work.scratch, exact)
        add_events(loaded.exact)
        return loaded, sort_log(work.connection, folder, config.ties, config.seed, bad if loaded.exact else None)

    try:
        loaded, found = read(exact=False)
    except DuplicatesError:
        loaded, found = read(exact=True)
    bad.fail_if_any()
    return loaded, found


def input_counts(work: Workspace, loaded: Loaded, found: SortedLog, bad: BadRows) -> dict[str, Any]:
    """What was read, as JSON values. `tied_events` have the timestamp of the same user's event before."""
    return {
        "source": work.description,
        "time_unit": loaded.time_unit.value,
        "rows": loaded.rows - found.duplicates + bad.count,
        "bad_rows": bad.count,
        "bad_rows_by_field": dict(bad.by_field),
        "duplicates": found.duplicates,
        "tied_events": found.tied,
    }
