"""The later passes, each over one shard: sort its rows, count its items under the filter, write it."""

import dataclasses
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from jaxrec.config import PrepareConfig, Repeats, Ties
from jaxrec.data.catalog import Catalog, read_catalog
from jaxrec.data.distributed.partition import ROW, WITHIN
from jaxrec.data.filtering import Core, FilteredLog, count_items, filter_log
from jaxrec.data.histories import EventLog, Histories, open_log
from jaxrec.data.ids import IdMap, open_ids
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.sort import repeated_events, tie_draw
from jaxrec.data.schema import ITEM, RATING, SECONDS_PER_DAY, TIME, USER
from jaxrec.data.split import Split, SplitRule, items_in_training
from jaxrec.data.store import LOG_FOLDER, SUMMARY_FILE, finish, new_data_folder, write_log
from jaxrec.errors import DataError
from jaxrec.files import new_directory, sha256


@dataclasses.dataclass(frozen=True)
class ShardSize:
    """What a shard holds in the end, and the SHA-256 of its prepared.json."""

    name: str
    sha256: str
    users: int
    events: int


def sort_shard(shard: int, parts: list[tuple[Path, str]], vocabulary: Path, config: PrepareConfig, out: Path) -> int:
    """Writes the shard's rows, by user, time and input order, as the log that `open_log` opens; returns their number.

    `parts`: the files of `partition` in the order of the input, with the name of the input that each came from.
    `vocabulary`: all raw item ids, sorted. Raises DataError where an event occurs twice and
    `config.repeats` is FAIL.
    """
    batches = []
    for path, _ in parts:
        with pa.memory_map(str(path)) as source:
            batches.append(pa.ipc.open_file(source).get_batch(shard))
    table = pa.Table.from_batches(batches)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    raw_users, users = np.unique(columns[USER], return_inverse=True)
    keys = (columns[WITHIN], columns[TIME], users)  # the last key comes first; the order of the input breaks ties
    order = np.lexsort((_draws(table, config.seed), *keys) if config.ties is Ties.RANDOM else keys)
    users, times = users[order], columns[TIME][order]
    item_ids = open_ids(vocabulary)
    items = item_ids.encode(columns[ITEM])[order]
    repeats = config.repeats.resolved(rated=config.rating_scale is not None)
    repeated, _ = repeated_events(users, times, items, order)
    if len(repeated) and repeats is Repeats.FAIL:
        files = np.repeat(np.arange(len(parts)), [batch.num_rows for batch in batches])
        second, first = order[repeated[0]]
        places = [f"{parts[files[row]][1]}:{columns[ROW][row]}" for row in (first, second)]
        user, item, time = (columns[name][second] for name in (USER, ITEM, TIME))
        raise DataError(
            f"{places[1]}: user {user}, item {item} at time {time} repeats {places[0]}; expected each event once"
        )
    kept = np.ones(len(order), bool)
    kept[repeated[:, 0]] = repeats is Repeats.KEEP
    lengths = np.bincount(users[kept], minlength=len(raw_users))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    events = Histories(offsets, items[kept], columns[RATING][order][kept], times[kept])
    with new_directory(out, LOG_FOLDER) as folder:
        write_log(EventLog(IdMap(raw_users, distinct=True), item_ids, events), folder / LOG_FOLDER)
    return int(kept.sum())


def count_days(folder: Path) -> np.ndarray:
    """[days since 1970] int64: the shard's events."""
    return np.bincount(open_log(folder / LOG_FOLDER).events.times // SECONDS_PER_DAY)


def times_of_day(folder: Path, day: int) -> np.ndarray:
    """The times of the shard's events of one day since 1970."""
    times = open_log(folder / LOG_FOLDER).events.times
    return times[times // SECONDS_PER_DAY == day]


def count_shard_items(folder: Path, kept_items: Path, config: PrepareConfig, cut: int) -> np.ndarray:
    """`jaxrec.data.filtering.count_items` of the shard."""
    log = open_log(folder / LOG_FOLDER)
    fitted = SplitRule.of(log, config, cut).fitted(log)
    return count_items(log, fitted, np.load(kept_items), config.min_user_ratings)[0]


def find_known(folder: Path, kept_items: Path, catalog_file: Path, config: PrepareConfig, cut: int) -> np.ndarray:
    """[catalogue + 1] bool: the items in the shard's training part."""
    catalog = read_catalog(catalog_file)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        kept, split, _ = _filtered(open_log(folder / LOG_FOLDER), kept_items, catalog, config, cut, None, Path(scratch))
        found = items_in_training(kept.histories, split.train_counts)
        return np.concatenate([found, np.zeros(len(catalog) + 1 - len(found), bool)])


def write_shard(
    folder: Path, kept_items: Path, catalog_file: Path, known: Path | None, config: PrepareConfig, cut: int, out: Path
) -> ShardSize:
    """Writes what the filter leaves of a sorted shard as a prepared directory with the whole catalogue.

    `known`: the file of the items in any shard's training part, for the splits that ask for them.
    """
    catalog = read_catalog(catalog_file)
    with new_data_folder(out) as result:
        seen = None if known is None else np.load(known)
        kept, split, users = _filtered(open_log(folder / LOG_FOLDER), kept_items, catalog, config, cut, seen, result)
        finish(PreparedData(catalog, users, kept.histories, split, config), result)
    return ShardSize(out.name, sha256(out / SUMMARY_FILE), kept.histories.user_count, kept.histories.event_count)


def _filtered(
    log: EventLog,
    kept_items: Path,
    catalog: Catalog,
    config: PrepareConfig,
    cut: int,
    known: np.ndarray | None,
    out: Path,
) -> tuple[FilteredLog, Split, IdMap]:
    """Writes the kept events' columns to `out`; returns them with their split and their users."""
    rule = SplitRule.of(log, config, cut)
    fitted, items = rule.fitted(log), np.load(kept_items)
    core = Core(count_items(log, fitted, items, config.min_user_ratings)[1], items)
    found = filter_log(log, fitted, core, catalog.ids, None, rule.keeps_every_user, out)
    return found, rule.split(found, known), IdMap(log.users.raw_ids[found.order], distinct=True)


def _draws(table: pa.Table, seed: int) -> np.ndarray:
    """[events] uint64: the order of ties that `jaxrec.data.reading.sort` draws from the seed and the ids."""
    with duckdb.connect() as connection:
        connection.register("events", table)
        draws = connection.execute(f"SELECT {tie_draw(seed, USER, ITEM, TIME)} AS n FROM events").fetchnumpy()["n"]
    return np.asarray(draws)
