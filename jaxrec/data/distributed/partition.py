"""The first pass: one piece of the input, checked, its rows grouped by the shard that their user belongs to."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxrec.config import RatingScale
from jaxrec.data.distributed.plan import Columns, Piece
from jaxrec.data.reading.bad_rows import BadRows, OnBadRows
from jaxrec.data.reading.check import ReadOptions, load
from jaxrec.data.reading.connection import connect
from jaxrec.data.reading.formats import SHORT, TableRelation
from jaxrec.data.reading.rules import IdKind, TimeUnit
from jaxrec.data.reading.scale import count_ratings
from jaxrec.data.schema import ITEM, RATING, TIME, USER
from jaxrec.files import new_file

ROW = "row"  # 1-based, in its file
WITHIN = "within"  # milliseconds within the second, which order events but are not kept


@dataclasses.dataclass(frozen=True)
class Partition:
    """What one piece holds: its distinct raw items, and the counts by which a rating scale is recognized."""

    items: np.ndarray
    ratings: np.ndarray


def partition(piece: Piece, columns: Columns, shards: int, scale: RatingScale | None, out: Path) -> Partition:
    """Writes the rows of `piece` to `out` (Arrow IPC, record batch s for shard s), in the order of the input.

    Raises DataError naming file and row for the first bad ones. `scale` None: recognized, by this piece alone.
    """
    with pq.ParquetFile(piece.path) as file:
        table = file.read_row_groups(list(piece.row_groups), columns=list(columns.names.values()))
    rows = np.arange(len(table)) + piece.first_row + 1
    kinds = [IdKind.TEXT if text else IdKind.INTEGER for text in (columns.text_users, columns.text_items)]
    unit = TimeUnit.MILLISECONDS if columns.milliseconds else TimeUnit.SECONDS
    with tempfile.TemporaryDirectory() as scratch, connect(Path(scratch), on_disk=False) as connection:
        connection.execute("SET threads = 1")  # a worker is one of many on its machine
        named = table.rename_columns([SHORT[role] for role in columns.names]).append_column("line", pa.array(rows))
        connection.register("piece", named)
        relation = TableRelation("piece", piece.path, columns.names, connection)
        options = ReadOptions(time_unit=unit, users=kinds[0], items=kinds[1])
        load(connection, relation, options, scale, BadRows(OnBadRows.FAIL))
        query = "SELECT user, item, coalesce(rating, 'nan'::FLOAT), time, within FROM events ORDER BY number"
        found = [np.ma.getdata(column) for column in connection.execute(query).fetchnumpy().values()]
        ratings = count_ratings(connection, "events")
    users, items, *_ = found
    shard = shard_of(users, shards)
    order = np.argsort(shard, kind="stable")
    bounds = np.searchsorted(shard[order], np.arange(shards + 1))
    batch = pa.RecordBatch.from_arrays(
        [pa.array(column[order]) for column in (*found, rows)], [USER, ITEM, RATING, TIME, WITHIN, ROW]
    )
    with new_file(out) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        options_of_file = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(sink, batch.schema, options=options_of_file) as writer:
            for start, end in itertools.pairwise(bounds):
                writer.write_batch(batch.slice(start, end - start))
    return Partition(pd.unique(items), ratings)


def shard_of(users: np.ndarray, shards: int) -> np.ndarray:
    """[events] int64 in 0..shards - 1: where each user's rows go, whatever else is in the log."""
    return (pd.util.hash_array(users, categorize=False) % np.uint64(shards)).astype(np.int64)
