"""Recommendations for a folder of Parquet by the workers of a Dask cluster, as a folder of Parquet.

The rows are partitioned and sorted into shards by user, by the passes of `jaxrec prepare-distributed`, and each shard
is answered by one task. The folder of the job lies beside the output, and all workers reach it under the same path.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client, KilledWorker, as_completed

from jaxrec.config import PrepareConfig, Repeats
from jaxrec.data.distributed.passes import Passes, Progress, wait_until_idle
from jaxrec.data.histories import open_log
from jaxrec.data.reading.sources import parquet_files
from jaxrec.data.store import LOG_FOLDER
from jaxrec.errors import DataError
from jaxrec.files import new_directory, new_file
from jaxrec.runs.batch.job import Job, open_job, states
from jaxrec.runs.batch.requests import all_users
from jaxrec.runs.batch.scoring import (
    OUTPUT_COLUMNS,
    ModelSource,
    Scoring,
    answers,
    notes,
    opened,
    parts_of,
    rating_scale,
    text_ids,
)

INDEX_FILE = "recommendations.json"
ROWS_OF_SHARD = 1_000_000  # on average
ROWS_OF_PIECE = 1_000_000  # that a task reads, or one row group if that is more
IF_WORKERS_DIE = "if they lack memory, start workers with more of it, or with one thread each"


def recommend_folder(
    client: Client,
    source: ModelSource,
    history: Path,
    out: Path,
    *,
    k: int = 10,
    repeats: Repeats = Repeats.AUTO,
    rows_of_shard: int = ROWS_OF_SHARD,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Writes the best `k` items of each user, as `recommend_log` does.

    A call that was interrupted is continued by the same call: a log that was sorted is not read again, and a shard that
    was answered is not answered again.

    Args:
        client: Of the cluster, whose workers reach all paths under the same names.
        source: What answers.
        history: Parquet files of one schema.
        out: A folder; one that this function wrote is replaced. It gets a file for each shard with OUTPUT_COLUMNS, ids
            of items as text, the users of a file in the order of their ids, and INDEX_FILE.
        k: Items of an answer, at least 1.
        repeats: What happens to a row that repeats an earlier one.
        rows_of_shard: Rows that a worker has in memory, on average.
        progress: Receives the name of the pass, how many of its tasks are done, and their number.

    Returns:
        `rows`, `users`, `shards` and `notes`.

    Raises:
        DataError: For bad rows, naming file and row; where workers die again and again.
        OSError: Where `out` cannot be written.
    """
    history, out = history.absolute(), out.absolute()
    if out.is_relative_to(history) or history.is_relative_to(out):
        raise DataError(f"{out} would be written, and {history} is read; choose another --out")
    if out.exists() and not (out / INDEX_FILE).is_file():
        raise DataError(f"{out} exists and is not a folder with {INDEX_FILE}; choose another --out")
    version = source.version()
    settings = {
        "model": version,
        "engine": [source.provider, source.search],
        "history": states([history]),
        "k": k,
        "repeats": repeats,
        "rows_of_shard": rows_of_shard,
    }
    with open_job(out, settings) as job:
        scoring = Scoring(source, version, job.moment, k)
        try:
            counts = job.counts() or _read(client, job, scoring, history, repeats, rows_of_shard, progress)
        except DataError:
            if job.counts() is None:
                job.remove()
            raise
        logs = sorted(job.input.glob(f"*/{LOG_FOLDER}"))
        names = [f"part-{shard:05d}.parquet" for shard in range(len(logs))]
        files = [job.parts / name for name in names]
        todo = [(log, file) for log, file in zip(logs, files, strict=True) if not file.is_file()]
        for done, _ in enumerate(_by_workers(client, scoring, todo), start=len(names) - len(todo) + 1):
            progress("recommend", done, len(names))
        with new_directory(out, INDEX_FILE) as result:
            users = 0
            for file in files:
                users += int(pq.read_schema(file).metadata[b"users"])
                _link(file, result / file.name)
            counts = {**counts, "users": users}
            (result / INDEX_FILE).write_text(json.dumps({**counts, "files": names}, indent=2) + "\n", "utf-8")
        job.remove()
    return counts


def _read(
    client: Client,
    job: Job,
    scoring: Scoring,
    history: Path,
    repeats: Repeats,
    rows_of_shard: int,
    progress: Progress,
) -> dict[str, Any]:
    """Sorts the log into the shards of the job's input; returns what was read."""
    model = opened(scoring)
    rows = sum(pq.read_metadata(path).num_rows for path in parquet_files(history))
    shards = max(1, -(-rows // rows_of_shard))
    passes = Passes(client, job.new_input(), shards, progress, IF_WORKERS_DIE)
    scale = passes.partition(history, ROWS_OF_PIECE, rating_scale(model))
    passes.sort(PrepareConfig(rating_scale=scale, repeats=repeats))
    counts = {"rows": rows, "shards": shards, "notes": notes(model, passes.raw_items)}
    job.finish_input(counts)
    return counts


def _by_workers(client: Client, scoring: Scoring, todo: list[tuple[Path, Path]]) -> Iterator[None]:
    """Yields once for each log that is answered into its file; Dask runs those of a dead worker again."""
    futures = [client.submit(_answer_shard, scoring, log, file, pure=False) for log, file in todo]
    try:
        for future, _ in as_completed(futures, with_results=True):
            future.release()
            yield
    except KilledWorker as error:
        advice = f"{IF_WORKERS_DIE}; the same command continues"
        raise DataError(f"workers died again and again in one task ({error}); {advice}") from error
    finally:
        client.cancel(futures)
        wait_until_idle(client)  # else a task still writes into a job that is continued or deleted


def _link(file: Path, new: Path) -> None:
    """The same file under another name, which a continued job still finds under its first."""
    try:
        os.link(file, new)
    except OSError:  # not all file systems can
        shutil.copyfile(file, new)


def _answer_shard(scoring: Scoring, folder: Path, out: Path) -> None:
    """Writes the answers to all users of a shard, one row group for each part."""
    model, log = opened(scoring), open_log(folder)
    asked, item_ids = all_users(log), text_ids(log)
    user_type = pa.int64() if asked.users.dtype == np.int64 else pa.string()
    types = (user_type, pa.int32(), pa.string(), pa.float32())
    schema = pa.schema(list(zip(OUTPUT_COLUMNS, types, strict=True)), {"users": str(len(asked.users))})
    with new_file(out) as new, pq.ParquetWriter(new, schema) as writer:
        for first, stop in parts_of(asked):
            found = answers(model, asked, first, stop, log, item_ids, scoring.k)
            counts = [len(answer.items) for answer in found]
            columns = [
                np.repeat(asked.users[first:stop], counts),
                np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts]),
                [model.catalog.item_ids[item] for answer in found for item in answer.items],
                np.concatenate([answer.scores for answer in found]).astype(np.float32),
            ]
            arrays = [pa.array(column, kind) for column, kind in zip(columns, types, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
