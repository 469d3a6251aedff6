"""Adds events to prepared data: its log is used as it is, and only the users with new events are sorted again.

The result: append(prepare(a), b) has the events, the cases and the catalogue of prepare(a + b), where a + b are the
rows of a and then those of b. Known users and items keep their indices, and new ones come after them, so the order of
the ids differs; a model that was trained before still fits. Limits: the rating scale stays that of a; times that are
exact to the millisecond order events within one second of b, not between a and b; the columns of features keep the
kinds, the bins and the categories that a gave them; and where prepare(a + b) would drop an item or a user of prepare(a)
(the temporal cut moves back, or a filter that is fitted on training loses an event to the test), its index stays, in
the catalogue or without events.
"""

import dataclasses
import enum
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from jaxrec.config import MEMORY_GB, Repeats
from jaxrec.data.content import fit_columns
from jaxrec.data.histories import EventLog, blocks, event_writers, open_log, release
from jaxrec.data.ids import IdMap, write_ids
from jaxrec.data.prepare import prepare_log, with_input
from jaxrec.data.prepared import AddFiles, PreparedData
from jaxrec.data.reading.bad_rows import QUARANTINE_FILE, OnBadRows, bad_rows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.columns import NOT_READ
from jaxrec.data.reading.features import features_like
from jaxrec.data.reading.movies import movies_like
from jaxrec.data.reading.read import PathOrFrame, PathsOrFrame, Workspace, input_counts, open_workspace, read_log
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.schema import ITEM
from jaxrec.data.store import LOG_FOLDER, all_movies, build, read_prepared, unchanged_folder
from jaxrec.errors import DataError, NoUsableRow


class KnownEvents(enum.Enum):
    """What happens to events that are in the data already."""

    REFUSE = "refuse"
    """If they are most of the events, the file was probably appended before: an error."""
    LEAVE_OUT = "leave out"
    """They are counted in `input["known_left_out"]`."""


def append(
    data: Path | str | PreparedData,
    interactions: PathsOrFrame,
    movies: PathOrFrame | None = None,
    *,
    features: PathOrFrame | None = None,
    out: Path | str | None = None,
    options: ReadOptions = ReadOptions(),
    on_bad_rows: OnBadRows = OnBadRows.FAIL,
    memory_gb: float = MEMORY_GB,
    add_files: AddFiles | None = None,
    known_events: KnownEvents = KnownEvents.REFUSE,
) -> PreparedData:
    """Prepared data with more events; configuration, kinds of ids and rating scale stay as they were.

    Args:
        data: Prepared data, or its folder. Rows that were set aside in the folder stay in quarantine.csv.
        interactions: The new events, as for `jaxrec.data.prepare.prepare`.
        movies: Titles and genres of new movies, which go before those that are known.
        features: What else is known of new items, or more of known ones: a value that it has goes before the known one,
            and an empty one changes nothing. A column that is known keeps its kind, its bins and its categories; new
            categories are added. What is not used is in `input["notes"]`.
        out: A folder to write, which may be that of `data`: whole or not at all. None: the result is in memory.
        options: What is not to be recognized: columns, delimiter, encoding, form of the times.
        on_bad_rows: Whether bad rows are an error, or are set aside in quarantine.csv in `out`.
        memory_gb: Gigabytes for the engine that sorts.
        add_files: Puts more files into `out` before it is whole, such as `jaxrec.data.report.write_report`.
        known_events: What happens to events that are in `data` already, unless its configuration says so.

    Returns:
        The prepared data of all events; with `out` its columns are memory maps.

    Raises:
        NoUsableRow: Every row is bad, or is left out since it is known.
        DataError: For other bad input, where most events are in `data` already (unless its configuration says what
            happens to repeats, or `known_events`), where `data` holds no log, and where `out` cannot be written, which
            then stays as it was.
        ValueError: Where `on_bad_rows` or `add_files` ask for files and there is no `out`.
    """
    old = data if isinstance(data, PreparedData) else read_prepared(Path(data))
    if old.log is None:
        raise DataError(f"{old.folder or 'the prepared data'}: holds no log to append to; prepare again")
    log, folder_of_old = old.log, unchanged_folder(old)
    earlier = None if folder_of_old is None else folder_of_old / QUARANTINE_FILE
    rated = old.config.rating_scale is not None
    # Data without ratings stay so.
    columns = options.columns if rated else dataclasses.replace(options.columns, rating=NOT_READ)
    options = dataclasses.replace(options, columns=columns, users=_kind(log.users), items=_kind(log.items))

    def make(folder: Path) -> PreparedData:
        left_out: list[int] = []
        parent = None if out is None else Path(out).parent
        with (
            open_workspace(interactions, movies, options, memory_gb, parent) as work,
            bad_rows(on_bad_rows, folder, earlier) as bad,
        ):

            def add_old_events() -> int:
                repeats = _insert_old_events(work.connection, log)
                if old.config.repeats is Repeats.AUTO:
                    if known_events is KnownEvents.REFUSE:
                        _refuse_known_events(work)
                    else:
                        left_out.append(_leave_out_known_events(work, bad.count))
                return repeats

            loaded, found = read_log(work, options, old.config, bad, work.scratch / "sorted", add_old_events, rated)
            merged = merge_logs(log, found.log, folder / LOG_FOLDER)
            # That these are few of the items is no surprise.
            given, _ = movies_like(work.movies, merged.items.raw_ids, work.movies_name, others=True)
            known = _joined(given, all_movies(old))
            # Features of new items alone are welcome where the catalogue keeps such.
            table = features_like(features, merged.items.raw_ids, others=old.config.min_movie_ratings == 0)
            counts = input_counts(work, loaded, found, bad, _new_columns(table, old.features))
            counts["known_left_out"] = sum(left_out)
        config = dataclasses.replace(old.config, rating_scale=loaded.scale)
        joined = joined_features(table, old.features)
        result = prepare_log(merged, known, config, folder, joined, old.users, old.catalog.ids)
        return with_input(result, counts, table, fit_columns(old) if old.columns is None else old.columns)

    return build(make, out, on_bad_rows, add_files)


def merge_logs(old: EventLog, new: EventLog, folder: Path) -> EventLog:
    """Writes one log into the new `folder`: `new` holds all events of each of its users, and `old` those of the others.

    Old users and items keep their indices, and new ones follow.
    """
    folder.mkdir()
    items = _extended(old.items, new.items)
    users = _extended(old.users, new.users)
    item_codes = np.concatenate([[0], items.encode(new.items.raw_ids)]).astype(np.int32)
    place = new.users.encode(users.raw_ids).astype(np.int64) - 1  # each user's place in `new`, -1 for none
    from_new = place >= 0
    old_lengths = np.concatenate([old.events.lengths(), np.zeros(len(users) - len(old.users), np.int64)])
    old_starts = np.concatenate([old.events.offsets[:-1], np.zeros(len(users) - len(old.users), np.int64)])
    lengths = np.where(from_new, new.events.lengths()[place], old_lengths)
    starts = np.where(from_new, new.events.offsets[:-1][place], old_starts)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    with event_writers(folder) as writers:
        for block in blocks(offsets):
            rows = block.per_event(starts[block.users]) + block.positions()
            of_new = block.per_event(from_new[block.users])
            for name, writer in writers.items():
                old_column, new_column = getattr(old.events, name), getattr(new.events, name)
                column = np.empty(len(rows), old_column.dtype)
                column[~of_new] = old_column[rows[~of_new]]
                added = new_column[rows[of_new]]
                column[of_new] = item_codes[added] if name == "items" else added
                writer.write(column)
                release(old_column, new_column)
    np.save(folder / "offsets.npy", offsets)
    write_ids(users, folder / "user_ids.npy")
    write_ids(items, folder / "item_ids.npy")
    return open_log(folder)


def _insert_old_events(connection: duckdb.DuckDBPyConnection, log: EventLog) -> int:
    """Puts the old events of users with new ones before these in `events`; `old` has them alone, and `added` the new.

    Returns how many of the old ones repeat another one.
    """
    found = np.ma.getdata(connection.execute("SELECT DISTINCT user FROM events").fetchnumpy()["user"])
    codes = log.users.encode(found)
    affected = np.sort(codes[codes > 0].astype(np.int64) - 1)
    connection.execute("CREATE OR REPLACE TABLE old AS SELECT * FROM events LIMIT 0")
    number = -int(log.events.lengths()[affected].sum())
    for block in blocks(log.events.offsets, affected):
        times = log.events.times[block.rows]
        frame = pd.DataFrame(
            {
                "number": np.arange(number, number + len(times)),
                "user": block.per_event(log.users.raw_ids[block.users]),
                "item": log.items.raw_ids[log.events.items[block.rows] - 1],
                "rating": log.events.ratings[block.rows],
                "time": times,
            }
        )
        number += len(times)
        connection.register("block", frame)
        rating = "CASE WHEN NOT isnan(rating) THEN rating END"
        connection.execute(f"INSERT INTO old SELECT number, user, item, {rating}, time, 0 FROM block")
        connection.unregister("block")
    connection.execute("CREATE OR REPLACE TABLE added AS SELECT * FROM events")
    connection.execute("CREATE OR REPLACE VIEW events AS SELECT * FROM old UNION ALL SELECT * FROM added")
    return connection.execute("SELECT count(*) - count(DISTINCT (user, item, time)) FROM old").fetchall()[0][0]


def _refuse_known_events(work: Workspace) -> None:
    """Raises DataError where most events are in the data already: then the file was probably appended before."""
    query = "SELECT count(*), (SELECT count(*) FROM added SEMI JOIN old USING (user, item, time)) FROM added"
    rows, known = work.connection.execute(query).fetchall()[0]
    if known * 2 > rows:
        raise DataError(
            f"{work.relation.name}: {known} of {rows} events are in the data already, as if the file had been appended "
            "before; data that was prepared with --repeats keep takes repeated events, and with --repeats first leaves "
            "them out"
        )


def _leave_out_known_events(work: Workspace, bad_rows: int) -> int:
    """Removes the events that are in the data already from those that are added. Raises NoUsableRow where none is left.

    Returns how many they were."""
    query = "CREATE OR REPLACE TABLE {} AS SELECT * FROM added {} JOIN old USING (user, item, time)"
    work.connection.execute(query.format("new_ones", "ANTI"))
    count = "SELECT (SELECT count(*) FROM added), (SELECT count(*) FROM new_ones)"
    rows, new = work.connection.execute(count).fetchall()[0]
    if not new:
        raise NoUsableRow(f"{work.relation.name}: all of its {rows} usable events are in the data already", bad_rows)
    work.connection.execute("CREATE OR REPLACE TABLE added AS SELECT * FROM new_ones")
    return rows - new


def _extended(known: IdMap, found: IdMap) -> IdMap:
    """The known ids, then the others of `found`, in their order."""
    new = found.raw_ids[known.encode(found.raw_ids) == 0]
    return IdMap(np.concatenate([known.raw_ids, new]), distinct=True)


def _joined(given: pd.DataFrame | None, known: pd.DataFrame | None) -> pd.DataFrame | None:
    """Rows by item_id: what is given now goes before what was known; a column that one of them lacks is empty there."""
    frames = [frame for frame in (given, known) if frame is not None]
    return pd.concat(frames).fillna("").drop_duplicates(ITEM, ignore_index=True) if frames else None


def joined_features(given: pd.DataFrame | None, known: pd.DataFrame | None) -> pd.DataFrame | None:
    """item_id and text of all items and columns of both: the value that is given, or the known one where it is empty.

    Examples:
        >>> known = pd.DataFrame({"item_id": [1, 2], "studio": ["A", "B"], "tags": ["x", "y"]})
        >>> joined_features(pd.DataFrame({"item_id": [3, 1], "studio": ["", "C"]}), known).to_dict("list")
        {'item_id': [1, 2, 3], 'studio': ['C', 'B', ''], 'tags': ['x', 'y', '']}
    """
    if given is None or known is None:
        return known if given is None else given
    of_given, of_known = given.set_index(ITEM), known.set_index(ITEM)
    items = of_known.index.union(of_given.index, sort=False)
    columns = list(dict.fromkeys([*of_known.columns, *of_given.columns]))
    of_given, of_known = (table.reindex(index=items, columns=columns, fill_value="") for table in (of_given, of_known))
    return of_known.where(of_given == "", of_given).reset_index(names=ITEM)


def _new_columns(given: pd.DataFrame | None, known: pd.DataFrame | None) -> list[str]:
    """A note on columns of features that the data did not have; a name may be mistyped."""
    if given is None or known is None:
        return []
    new = [name for name in given.columns if name not in known.columns]
    return [f"features: {', '.join(new)}: new, the data has {', '.join(known.columns[1:])}"] if new else []


def _kind(ids: IdMap) -> IdKind:
    return IdKind.INTEGER if ids.raw_ids.dtype == np.int64 else IdKind.TEXT
