"""The driver: hands the passes to Dask, adds up what they return, and decides what is global."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from distributed import Client, KilledWorker, LocalCluster, as_completed

from jaxrec.catalog import build_catalog, write_catalog
from jaxrec.config import PrepareConfig, SplitKind, to_json
from jaxrec.distributed.partition import Partition, partition
from jaxrec.distributed.plan import plan
from jaxrec.distributed.reading import INDEX_FILE, SCHEMA_VERSION, shard_name
from jaxrec.distributed.shard import ShardSize, count_items, sort_shard, write_shard
from jaxrec.files import new_directory
from jaxrec.ids import IdMap, write_ids
from jaxrec.schema import ITEM, DataError, RatingScale, infer_rating_scale

ROWS_PER_PIECE = 1_000_000
SECONDS_PER_DAY = 86_400
Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


@contextlib.contextmanager
def cluster(address: str | None, workers: int) -> Iterator[Client]:
    """A client of the Dask scheduler at `address`, or of a local cluster of `workers` processes."""
    if address is not None:
        with Client(address) as client:
            yield client
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
    movies: pd.DataFrame | None = None,
    config: PrepareConfig = PrepareConfig(),
    rows_per_piece: int = ROWS_PER_PIECE,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Prepares the Parquet files under `folder` into `shards` prepared directories under `out`; returns the index.

    The histories, the item indices and the catalogue are those of `jaxrec.prepare.prepare` on the same rows.
    `progress` is told the pass, and how many of its tasks are done of how many. Raises DataError for bad input, naming
    file and row, for a split that is not offered here, and where workers die again and again.
    """
    if config.split is not SplitKind.LEAVE_ONE_OUT:
        raise DataError(f"split {config.split}: the distributed preparation offers only {SplitKind.LEAVE_ONE_OUT}")
    folder, out = folder.absolute(), out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as scratch,
        new_directory(out) as result,
    ):
        passes = _Passes(client, Path(scratch), shards, progress)
        scale = passes.partition(folder, rows_per_piece, config.rating_scale)
        config = dataclasses.replace(config, rating_scale=scale)
        passes.sort(config)
        kept = passes.filter(config)
        sizes = passes.write(kept, movies, config, result)
        index = {
            "schema_version": SCHEMA_VERSION,
            "config": to_json(config),
            "users": sum(size.users for size in sizes),
            "events": sum(size.events for size in sizes),
            "shards": [dataclasses.asdict(size) for size in sizes],
        }
        for left_over in result.glob(".*"):  # of a task whose worker died while it wrote
            shutil.rmtree(left_over)
        (result / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


class _Passes:
    """The passes over one input, in their order, and where their files lie."""

    def __init__(self, client: Client, scratch: Path, shards: int, progress: Progress) -> None:
        self._client = client
        self._scratch = scratch
        self._shards = shards
        self._progress = progress
        self._parts: list[tuple[Path, str]] = []
        self._raw_items = np.empty(0, np.int64)
        self._vocabulary = scratch / "vocabulary.npy"
        self._catalog = scratch / "catalog.json"
        self._sorted = [scratch / f"sorted-{shard:05d}" for shard in range(shards)]

    def partition(self, folder: Path, rows_per_piece: int, scale: RatingScale | None) -> RatingScale | None:
        """Returns the rating scale, recognized where none is given."""
        columns, pieces = plan(folder, rows_per_piece)
        latest = int(time.time()) + SECONDS_PER_DAY
        self._parts = [(self._scratch / f"part-{i:06d}.arrow", piece.path) for i, piece in enumerate(pieces)]
        tasks = [
            (piece, columns, self._shards, latest, path) for piece, (path, _) in zip(pieces, self._parts, strict=True)
        ]
        found: list[Partition] = []
        vocabulary: np.ndarray | None = None
        for part in self._run("partition", partition, tasks):
            both = part.items if vocabulary is None else np.concatenate([vocabulary, part.items])
            vocabulary = np.sort(pd.unique(both))
            found.append(dataclasses.replace(part, items=part.items[:0]))
        assert vocabulary is not None  # a plan has at least one piece
        self._raw_items = vocabulary
        write_ids(IdMap(vocabulary), self._vocabulary)
        scale = scale or infer_rating_scale(np.array([rating for part in found for rating in part.ratings]))
        for part in sorted(found, key=lambda part: part.path):
            for rating, row in zip(part.ratings[:2], part.rating_rows, strict=True):
                if scale is not None and not scale.minimum <= rating <= scale.maximum:
                    raise DataError(f"{part.path}:{row}: rating {rating:g} is outside {scale}")
        return scale

    def sort(self, config: PrepareConfig) -> None:
        tasks = [(shard, self._parts, self._vocabulary, config, path) for shard, path in enumerate(self._sorted)]
        for _ in self._run("sort", sort_shard, tasks):
            pass
        for path, _ in self._parts:
            path.unlink()

    def filter(self, config: PrepareConfig) -> Path:
        """The file of [items + 1] bool: the items of the vocabulary that are left when no user or item is rare."""
        kept = np.ones(len(self._raw_items) + 1, bool)
        kept[0] = False
        for round_number in range(len(kept)):  # each but the last round drops an item
            path = self._scratch / f"kept-{round_number}.npy"
            np.save(path, kept)
            tasks = [(folder, path, config) for folder in self._sorted]
            counts = np.zeros(len(kept), np.int64)
            for count in self._run(f"count, round {round_number + 1}", count_items, tasks):
                counts += count
            left = kept & (counts >= max(1, config.min_movie_ratings))
            if not left.any():
                raise DataError(
                    f"no event is left after dropping users with fewer than {config.min_user_ratings} "
                    f"and movies with fewer than {config.min_movie_ratings} ratings"
                )
            if np.array_equal(left, kept):
                break
            kept = left
        return path

    def write(self, kept_file: Path, movies: pd.DataFrame | None, config: PrepareConfig, out: Path) -> list[ShardSize]:
        item_ids = self._raw_items[np.load(kept_file)[1:]]
        if config.min_movie_ratings == 0 and movies is not None:
            item_ids = np.union1d(item_ids, movies[ITEM].to_numpy())
        catalog = build_catalog(IdMap.fit(item_ids), movies)
        if len(catalog) == 1:
            raise DataError(f"only one movie is left ({catalog.titles[0]}); a recommender needs at least two")
        write_catalog(catalog, self._catalog)
        tasks = [
            (folder, kept_file, self._catalog, config, out / shard_name(shard))
            for shard, folder in enumerate(self._sorted)
        ]
        return sorted(self._run("write", write_shard, tasks), key=lambda size: size.name)

    def _run(self, name: str, task: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Result]:
        """The tasks' results as they come; Dask runs those of a dead worker again."""
        futures = self._client.map(lambda values: task(*values), arguments, pure=False)
        try:
            for done, (_, result) in enumerate(as_completed(futures, with_results=True), start=1):
                yield result
                self._progress(name, done, len(futures))
        except KilledWorker as error:
            raise DataError(
                f"{name}: workers died again and again in one task ({error}); if they lack memory, take more shards"
            ) from error
        finally:
            self._client.cancel(futures)
