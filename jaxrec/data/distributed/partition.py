"""The first pass: one piece of the input, checked, its rows grouped by the shard that their user belongs to."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jaxrec.data.distributed.plan import Columns, Piece
from jaxrec.data.reading.rules import FIRST_MILLISECONDS, TimeUnit
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.errors import DataError
from jaxrec.files import new_file

ROW = "row"  # 1-based, in its file
WITHIN = "within"  # milliseconds within the second, which order events but are not kept


@dataclasses.dataclass(frozen=True)
class Partition:
    """What one piece holds: its distinct raw items, and of its ratings the least and the largest with their rows.

    `ratings` is empty where there are none, and otherwise the least, the largest, and the first that is not whole, if
    there is one: what the scale is recognized by.
    """

    path: str
    items: np.ndarray
    ratings: tuple[float, ...]
    rating_rows: tuple[int, ...]


def partition(piece: Piece, columns: Columns, shards: int, latest: int, out: Path) -> Partition:
    """Writes the rows of `piece` to `out` (Arrow IPC, record batch s for shard s), in the order of the input.

    Raises DataError naming file and row for the first bad one. `latest`: the largest time that is accepted, seconds.
    """
    with pq.ParquetFile(piece.path) as file:
        table = file.read_row_groups(list(piece.row_groups), columns=list(columns.names.values()))
    raw = {role: table[name].combine_chunks() for role, name in columns.names.items()}
    users, items = (_ids(raw[role], columns.names[role], piece) for role in (USER, ITEM))
    times, within = _times(raw[TIME], columns, piece, latest)
    ratings = np.full(len(times), np.nan, np.float32)
    if RATING in raw:
        ratings = _ratings(raw[RATING], columns.names[RATING], piece)
    shard = shard_of(users, shards)
    order = np.argsort(shard, kind="stable")
    bounds = np.searchsorted(shard[order], np.arange(shards + 1))
    rows = np.arange(len(times)) + piece.first_row + 1
    batch = pa.RecordBatch.from_arrays(
        [pa.array(column[order]) for column in (users, items, ratings, times, within, rows)],
        [USER, ITEM, RATING, TIME, WITHIN, ROW],
    )
    with new_file(out) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, batch.schema, options=options) as writer:
            for start, end in itertools.pairwise(bounds):
                writer.write_batch(batch.slice(start, end - start))
    return Partition(piece.path, pd.unique(items), *_rating_range(ratings, rows))


def shard_of(users: np.ndarray, shards: int) -> np.ndarray:
    """[events] int64 in 0..shards - 1: where each user's rows go, whatever else is in the log."""
    return (pd.util.hash_array(users, categorize=False) % np.uint64(shards)).astype(np.int64)


def _ids(raw: pa.Array, name: str, piece: Piece) -> np.ndarray:
    """int64, or object (str)."""
    _fail_at(raw.is_null().to_numpy(zero_copy_only=False), piece, name, raw, "is empty; expected an id")
    if pa.types.is_integer(raw.type):
        if pa.types.is_uint64(raw.type):
            beyond = pc.greater(raw, pa.scalar(2**63 - 1, pa.uint64())).to_numpy(zero_copy_only=False)
            _fail_at(beyond, piece, name, raw, "is beyond 64 bits")
        return raw.cast(pa.int64()).to_numpy(zero_copy_only=False)
    texts = raw.to_numpy(zero_copy_only=False)
    bad = np.array([text == "" or text != text.strip() for text in texts], bool)
    _fail_at(bad, piece, name, raw, "is empty or has spaces around it; expected an id")
    return texts


def _times(raw: pa.Array, columns: Columns, piece: Piece, latest: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds (int64), and milliseconds within the second (int16)."""
    unit = 1000 if columns.milliseconds else 1
    numbers = raw.cast(pa.timestamp("ms", raw.type.tz), safe=False) if pa.types.is_timestamp(raw.type) else raw
    times = pc.fill_null(numbers.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    name = TimeUnit.MILLISECONDS if columns.milliseconds else TimeUnit.SECONDS
    # Among whole milliseconds a time of seconds would be a day in 1970.
    earliest = FIRST_MILLISECONDS if columns.milliseconds and not pa.types.is_timestamp(raw.type) else 0
    expected = f"is not a time; expected whole {name} since 1970 in {earliest}..{latest * unit} (a day from now)"
    _fail_at((times < earliest) | (times > latest * unit), piece, columns.names[TIME], raw, expected)
    return times // unit, (times % unit).astype(np.int16)


def _ratings(raw: pa.Array, name: str, piece: Piece) -> np.ndarray:
    """float32, NaN for null."""
    ratings = raw.cast(pa.float32()).to_numpy(zero_copy_only=False)
    present = raw.is_valid().to_numpy(zero_copy_only=False)
    _fail_at(present & ~np.isfinite(ratings), piece, name, raw, "is not a number")
    return ratings


def _rating_range(ratings: np.ndarray, rows: np.ndarray) -> tuple[tuple[float, ...], tuple[int, ...]]:
    present = ~np.isnan(ratings)
    if not present.any():
        return (), ()
    ratings, rows = ratings[present], rows[present]
    low, high = int(ratings.argmin()), int(ratings.argmax())
    found = [ratings[low], ratings[high], *ratings[ratings != np.rint(ratings)][:1]]
    return tuple(float(rating) for rating in found), (int(rows[low]), int(rows[high]))


def _fail_at(bad: np.ndarray, piece: Piece, name: str, raw: pa.Array, problem: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        more = f" (and {int(bad.sum()) - 1} more rows)" if bad.sum() > 1 else ""
        raise DataError(f"{piece.path}:{piece.first_row + row + 1}: {name} {raw[row]} {problem}{more}")
