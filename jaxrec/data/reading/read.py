"""Reads logs as they are: recognizes, checks every row, sorts. Bad input is named with file and line."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd

from jaxrec.config import MEMORY_GB, PrepareConfig, RatingScale, Repeats
from jaxrec.data.reading.bad_rows import BadRow, BadRows, OnBadRows
from jaxrec.data.reading.check import Loaded, ReadOptions, load
from jaxrec.data.reading.columns import described
from jaxrec.data.reading.connection import connect
from jaxrec.data.reading.formats import Relation, frame_relation, relation_of
from jaxrec.data.reading.sort import SortedLog, sort_log
from jaxrec.data.reading.sources import find_source
from jaxrec.data.schema import ITEM, RATING, TIME, USER

PathOrFrame = Path | str | pd.DataFrame
REPEATED = "repeats {}: the same user, item and time; expected each event once, or give --repeats keep or first"
PathsOrFrame = PathOrFrame | Sequence[Path | str]


@dataclasses.dataclass(frozen=True)
class Workspace:
    """One log while it is read.

    Attributes:
        relation: Its rows.
        connection: DuckDB.
        scratch: A folder that is gone afterwards.
        description: What the log is, for people to read; `reading`: how its text is written.
        movies: Those that were given, or that lie beside the log; `movies_name`: what messages call their file.
    """

    relation: Relation
    connection: duckdb.DuckDBPyConnection
    scratch: Path
    description: str
    reading: dict[str, str]
    movies: pd.DataFrame | Path | None
    movies_name: str | None


@contextlib.contextmanager
def open_workspace(
    interactions: PathsOrFrame,
    movies: PathOrFrame | None = None,
    options: ReadOptions = ReadOptions(),
    memory_gb: float = MEMORY_GB,
    parent: Path | None = None,
) -> Iterator[Workspace]:
    """Recognizes a log and starts DuckDB. Scratch files lie in `parent`; None: where the system has its own."""
    movies = Path(movies) if isinstance(movies, str) else movies
    names = options.columns
    with tempfile.TemporaryDirectory(prefix=".jaxrec-", dir=parent) as name:
        scratch = Path(name)
        if isinstance(interactions, pd.DataFrame):
            with connect(scratch, memory_gb, on_disk=parent is not None) as connection:
                relation = frame_relation(interactions, names, connection)
                yield Workspace(relation, connection, scratch, "a frame", {}, movies, None)
            return
        paths = [interactions] if isinstance(interactions, str | Path) else interactions
        source = find_source([Path(path) for path in paths], movies, scratch, names, options.text)
        with connect(scratch, memory_gb) as connection:
            rows = relation_of(source, names, scratch, connection)
            yield Workspace(rows, connection, scratch, str(source), source.reading(), source.movies, source.movies_name)


def read_ratings(
    path: Path, scale: RatingScale | None = None, options: ReadOptions = ReadOptions()
) -> tuple[pd.DataFrame, RatingScale | None]:
    """Reads a log in any known format into a frame.

    Args:
        path: A file, a folder or an archive (see `jaxrec.data.reading.sources.find_source`).
        scale: The range of possible ratings; None: recognized.
        options: How to read it.

    Returns:
        The interactions in the file's order, repeats included (user_id and item_id int64, or str where ids are text;
        rating float32, NaN where there is none; timestamp int64 seconds), and the rating scale, None where there are
        no ratings.

    Raises:
        DataError: For bad rows, naming file and line of the first ones.
    """
    with open_workspace(path, options=options) as work:
        loaded = load(work.connection, work.relation, options, scale, BadRows(OnBadRows.FAIL))
        query = "SELECT user, item, coalesce(rating, 'nan'::FLOAT) AS rating, time FROM events ORDER BY number"
        columns = [np.ma.getdata(column) for column in work.connection.execute(query).fetchnumpy().values()]
    return pd.DataFrame(dict(zip((USER, ITEM, RATING, TIME), columns, strict=True))), loaded.scale


def read_log(
    work: Workspace,
    options: ReadOptions,
    config: PrepareConfig,
    bad: BadRows,
    folder: Path,
    add_events: Callable[[], int] = lambda: 0,
    rated: bool | None = None,
) -> tuple[Loaded, SortedLog]:
    """Reads, checks and sorts a log into columns in the new `folder`.

    Args:
        work: The log.
        options: How it is read.
        config: Scale, order of equal times, repeats.
        bad: Takes rows that break a rule, and, in quarantine, repeats that are left out.
        folder: A folder to make.
        add_events: Puts more rows before those of `events`, with numbers below 0, before they are sorted; returns how
            many of them repeat another one.
        rated: Whether `Repeats.AUTO` is that of a log with ratings; None: as the log is.

    Returns:
        What was read, and the sorted log.

    Raises:
        DataError: For bad rows, unless in quarantine.
    """
    folder.mkdir()
    loaded = load(work.connection, work.relation, options, config.rating_scale, bad)
    repeats = config.repeats.resolved(loaded.rated if rated is None else rated)
    repeats_added = add_events()
    reported = repeats is Repeats.FAIL or (repeats is Repeats.FIRST and bad.on_bad_rows is OnBadRows.QUARANTINE)

    def report(rows: np.ndarray) -> None:
        _report_repeats(work, rows, bad)

    found = sort_log(work.connection, folder, config.ties, config.seed, repeats, report if reported else None)
    bad.fail_if_any()
    left_out = 0 if repeats is Repeats.KEEP else found.repeats
    return loaded, dataclasses.replace(found, repeats=found.repeats - repeats_added, left_out=left_out)


def _report_repeats(work: Workspace, repeated: np.ndarray, bad: BadRows) -> None:
    """Puts repeats into `bad`: [repeats, 2] numbers of each row and of the one that it repeats, below 0 if in the
    data."""
    listed = len(repeated) if bad.limit is None else min(len(repeated), max(0, bad.limit - bad.count))
    bad.add_unlisted("" for _ in repeated[listed:])
    later, first = repeated[:listed].T
    places, texts = work.relation.places(later), work.relation.texts(later)
    earlier = work.relation.places(np.maximum(first, 0))
    bad.add_all(
        BadRow(file, line, "", "", REPEATED.format("an event that is in the data" if old else f"line {at}"), text)
        for (file, line), text, old, (_, at) in zip(places, texts, (first < 0).tolist(), earlier, strict=True)
    )


def input_counts(
    work: Workspace, loaded: Loaded, found: SortedLog, bad: BadRows, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What was read, as JSON values.

    rows = events in the log + repeats that were left out + bad_rows, of which repeats are a part in quarantine.
    `tied_events` have the timestamp of the same user's event before; `notes`: what is odd, those of the movies too.
    """
    quarantined = 0 if bad.on_bad_rows is OnBadRows.FAIL else found.left_out
    return {
        "source": work.description,
        **work.reading,
        "columns": described(work.relation.labels),
        "time_form": str(loaded.times),
        "rows": loaded.rows + bad.count - quarantined,
        "bad_rows": bad.count,
        "bad_rows_by_field": dict(bad.by_field),
        "repeats": found.repeats,
        "repeats_left_out": found.left_out,
        "tied_events": found.tied,
        "notes": [*loaded.notes, *notes],
    }
