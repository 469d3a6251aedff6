"""Writes the events of a store as a file that `jaxrec prepare` and `jaxrec append` read, all or those since a revision.

with open_store("events.sqlite") as store:
    exported = export_events(store, Path("events.csv"))
    ...
    export_events(store, Path("more.csv"), after=exported.revision)
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from serve.stores.base import EventStore, StoreError, UserEvent

COLUMNS = ("user_id", "item_id", "rating", "timestamp")
SUFFIXES = (".csv", ".parquet")
LINE_BREAKS = frozenset("\n\r")


class Exported(NamedTuple):
    """What is in the file."""

    events: int
    revision: int
    """All events that arrived until then are in this file or in earlier ones: the next export begins after it."""
    left_out: int
    """Events with a line break in an id, which a .csv file cannot hold; 0 for .parquet, which can."""


class _Writer(Protocol):
    """Takes the events part by part."""

    def __call__(self, events: Sequence[UserEvent], /) -> None: ...


def export_events(
    store: EventStore, path: Path, after: int = 0, progress: Callable[[int], None] = lambda rows: None
) -> Exported:
    """Writes a file with one row for each event: user_id, item_id, rating (empty: none), timestamp (seconds since
    1970-01-01T00:00Z).

    The file is that of one moment: of the events whose recording had ended when this began none is missing, and none
    that was recorded later is in it. Events of users who are deleted meanwhile may be in it. It appears whole or not at
    all, and replaces an older one. A part of the rows at a time is in memory.

    Args:
        store: The store; servers may use it.
        path: The file to write; its suffix, .csv or .parquet, says in which form.
        after: The revision of an earlier export: only events that arrived after it are written. 0: all events.
        progress: Called with the number of rows of each part.

    Returns:
        How many events there are, the revision for the next export, and how many events were left out.

    Raises:
        StoreError: The store cannot be read, or was replaced by one that never came to `after`; the file cannot be
            written, or its suffix is another one.
    """
    if path.suffix not in SUFFIXES:
        raise StoreError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    last, count, left_out = store.last_arrival(), 0, 0
    if last < after:
        raise StoreError(
            f"the store has come to revision {last}, and the export begins after revision {after}: it was replaced, or "
            "restored from an older copy, and its next events would be missed; begin after a revision of this store"
        )
    fits = _one_line if path.suffix == ".csv" else _any
    try:
        with _whole_file(path) as partial, _writer(partial, path.suffix) as write:
            for part in store.all_events(after):
                # The only place that chooses events: those that are not positive are no part of a history.
                wanted = [new for arrival, new in part if arrival <= last and new.event.weight > 0]
                events = [new for new in wanted if fits(new)]
                left_out += len(wanted) - len(events)
                write(events)
                count += len(events)
                progress(len(events))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}") from error
    return Exported(count, last, left_out)


def _one_line(new: UserEvent) -> bool:
    """Whether the ids have no line break: the reader of CSV ends a row there, even within quotes, so that an id could
    hold rows of other users."""
    return not LINE_BREAKS.intersection(new.user_id) and not LINE_BREAKS.intersection(new.event.item_id)


def _any(new: UserEvent) -> bool:
    return True


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path`; the file there is renamed when it is on disk, and removed after a failure."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        for name in (partial, path.parent):
            descriptor = os.open(name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if name == partial:
                partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[_Writer]:
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(COLUMNS)
            yield lambda events: rows.writerows(map(_row, events))
        return
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise StoreError(f"a .parquet file needs {error.name}, which is not installed: pip install pyarrow") from error
    types = (pyarrow.string(), pyarrow.string(), pyarrow.float64(), pyarrow.int64())
    schema = pyarrow.schema(list(zip(COLUMNS, types, strict=True)))
    with parquet.ParquetWriter(path, schema) as file:

        def write(events: Sequence[UserEvent]) -> None:
            rows = [dict(zip(COLUMNS, _row(new), strict=True)) for new in events]
            file.write_table(pyarrow.Table.from_pylist(rows, schema))

        yield write


def _row(new: UserEvent) -> tuple[str, str, float | None, int]:
    """COLUMNS."""
    return new.user_id, new.event.item_id, new.event.rating, new.event.timestamp
