"""The distributed preparation as one call, and the cluster that it runs on."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from distributed import Client, LocalCluster

from jaxrec.config import PrepareConfig, SplitKind, to_json
from jaxrec.data.distributed.passes import Passes, Progress
from jaxrec.data.reading.movies import movies_like
from jaxrec.data.store import SHARDS_FILE, SHARDS_SCHEMA_VERSION
from jaxrec.errors import DataError
from jaxrec.files import new_directory

ROWS_PER_PIECE = 1_000_000
REMOVAL_S = 30.0


@contextlib.contextmanager
def cluster(address: str | None, workers: int) -> Iterator[Client]:
    """A client of the Dask scheduler at `address`, or of a local cluster of `workers` processes.

    Raises DataError where no scheduler answers.
    """
    if address is not None:
        try:
            remote = Client(address)
        except (OSError, ValueError) as error:
            raise DataError(f"{address}: no Dask scheduler answers there: {error}") from error
        with remote:
            yield remote
        return
    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as local,
        Client(local) as client,
    ):
        yield client


def prepare_distributed(
    client: Client,
    folder: Path,
    out: Path,
    shards: int,
    movies: Path | pd.DataFrame | None = None,
    config: PrepareConfig = PrepareConfig(),
    rows_per_piece: int = ROWS_PER_PIECE,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Prepares the Parquet files under `folder` into `shards` prepared directories under `out`; returns the index.

    The histories, the item indices and the catalogue are those of `jaxrec.data.prepare.prepare` on the same rows.

    Args:
        client: Of the cluster, whose workers reach `folder` and `out` under the same paths.
        folder: Parquet files of one schema.
        out: A folder; one that this function wrote is replaced.
        shards: Their number, best a multiple of that of the training processes.
        movies: Their file, or a frame of item_id, title and genres.
        config: Thresholds, split, order of equal timestamps, rating scale and seed.
        rows_per_piece: Rows that a task reads, or one row group if that is more.
        progress: Receives the name of the pass, how many of its tasks are done, and their number.

    Raises:
        DataError: For bad input, naming file and row, and where workers die again and again.
    """
    folder, out = folder.absolute(), out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return _prepare(client, folder, out, shards, movies, config, rows_per_piece, progress)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error


def _prepare(
    client: Client,
    folder: Path,
    out: Path,
    shards: int,
    movies: Path | pd.DataFrame | None,
    config: PrepareConfig,
    rows_per_piece: int,
    progress: Progress,
) -> dict[str, Any]:
    with (
        _scratch_folder(out) as scratch,
        new_directory(out, SHARDS_FILE) as result,
    ):
        passes = Passes(client, scratch, shards, progress, "if they lack memory, take more shards")
        scale = passes.partition(folder, rows_per_piece, config.rating_scale)
        config = dataclasses.replace(config, rating_scale=scale)
        known_movies, _ = movies_like(movies, passes.raw_items, others=config.min_movie_ratings == 0)
        passes.sort(config)
        cut = passes.temporal_cut() if config.split is SplitKind.TEMPORAL else 0
        kept = passes.filter(config, cut)
        sizes = passes.write(kept, known_movies, config, cut, result)
        index = {
            "schema_version": SHARDS_SCHEMA_VERSION,
            "config": to_json(config),
            "users": sum(size.users for size in sizes),
            "events": sum(size.events for size in sizes),
            "shards": [dataclasses.asdict(size) for size in sizes],
        }
        for left_over in result.glob(".*"):  # of a task whose worker died while it wrote
            shutil.rmtree(left_over)
        (result / SHARDS_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


@contextlib.contextmanager
def _scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that vanishes, even if a task of a run that failed still writes to it for a moment."""
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        give_up = time.monotonic() + REMOVAL_S
        while folder.exists() and time.monotonic() < give_up:
            shutil.rmtree(folder, ignore_errors=True)
            if folder.exists():
                time.sleep(0.1)
