"""The passes as the driver sees them: what is handed to Dask, and what is decided from all that comes back."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from distributed import Client, KilledWorker, Worker, as_completed

from jaxrec.config import PrepareConfig, RatingScale, SplitKind
from jaxrec.data.catalog import build_catalog, catalog_items, write_catalog
from jaxrec.data.distributed.partition import partition
from jaxrec.data.distributed.plan import plan
from jaxrec.data.distributed.shard import (
    ShardSize,
    count_days,
    count_shard_items,
    find_known,
    sort_shard,
    times_of_day,
    write_shard,
)
from jaxrec.data.filtering import k_core
from jaxrec.data.ids import IdMap, write_ids
from jaxrec.data.reading.scale import choose_scale
from jaxrec.data.schema import SECONDS_PER_DAY
from jaxrec.data.split import day_of_cut
from jaxrec.errors import DataError

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result")


class Passes:
    """The passes over one input, in their order, and where their files lie."""

    def __init__(self, client: Client, scratch: Path, shards: int, progress: Progress, advice: str) -> None:
        """`advice`: what a user can do when workers die again and again, for the message."""
        self._client = client
        self._scratch = scratch
        self._shards = shards
        self._progress = progress
        self._advice = advice
        self._parts: list[tuple[Path, str]] = []
        self._latest = int(time.time()) + 2 * SECONDS_PER_DAY  # a day from now is the latest time that is accepted
        self.raw_items = np.empty(0, np.int64)
        self._vocabulary = scratch / "vocabulary.npy"
        self._catalog = scratch / "catalog.json"
        self._sorted = [scratch / f"sorted-{shard:05d}" for shard in range(shards)]

    def partition(self, folder: Path, rows_per_piece: int, scale: RatingScale | None) -> RatingScale | None:
        """Returns the rating scale, recognized where none is given."""
        columns, pieces = plan(folder, rows_per_piece)
        self._parts = [(self._scratch / f"part-{i:06d}.arrow", piece.path) for i, piece in enumerate(pieces)]
        tasks = [
            (piece, columns, self._shards, scale, path) for piece, (path, _) in zip(pieces, self._parts, strict=True)
        ]
        ratings: list[np.ndarray] = []
        vocabulary: np.ndarray | None = None
        for part in self._run("partition", partition, tasks):
            both = part.items if vocabulary is None else np.concatenate([vocabulary, part.items])
            vocabulary = np.sort(pd.unique(both))
            ratings.append(part.ratings)
        assert vocabulary is not None  # a plan has at least one piece
        self.raw_items = vocabulary
        write_ids(IdMap(vocabulary), self._vocabulary)
        # A rating that its piece accepts is on the scale of all pieces: the wider of two where they differ.
        return scale or choose_scale(np.concatenate(ratings), str(folder))

    def sort(self, config: PrepareConfig) -> None:
        tasks = [(shard, self._parts, self._vocabulary, config, path) for shard, path in enumerate(self._sorted)]
        for _ in self._run("sort", sort_shard, tasks):
            pass
        for path, _ in self._parts:
            path.unlink()

    def temporal_cut(self) -> int:
        """`jaxrec.data.split.temporal_cut` of all times: the day first, then the time within that day."""
        days = np.zeros(self._latest // SECONDS_PER_DAY + 1, np.int64)
        for counts in self._run("count days", count_days, [(folder,) for folder in self._sorted]):
            days[: len(counts)] += counts
        day, rank = day_of_cut(days)
        times = self._run("cut a day", times_of_day, [(folder, day) for folder in self._sorted])
        return int(np.sort(np.concatenate(list(times)))[rank])

    def filter(self, config: PrepareConfig, cut: int) -> Path:
        """The file of [items + 1] bool: the items of the vocabulary that are left when no user or item is rare."""
        path, rounds = self._scratch / "kept.npy", itertools.count(1)

        def count(items: np.ndarray) -> np.ndarray:
            np.save(path, items)
            tasks = [(folder, path, config, cut) for folder in self._sorted]
            return sum(self._run(f"count, round {next(rounds)}", count_shard_items, tasks), np.zeros(1, np.int64))

        kept = k_core(count, len(self.raw_items), config.min_movie_ratings)
        if not kept.any():
            raise DataError(
                f"no event is left after dropping users with fewer than {config.min_user_ratings} "
                f"and items with fewer than {config.min_movie_ratings} events"
            )
        return path

    def write(
        self, kept_items: Path, movies: pd.DataFrame | None, config: PrepareConfig, cut: int, out: Path
    ) -> list[ShardSize]:
        """Raises DataError where a single movie is left."""
        item_ids = catalog_items(self.raw_items[np.load(kept_items)[1:]], config.min_movie_ratings, movies)
        catalog = build_catalog(IdMap(item_ids), movies)
        write_catalog(catalog, self._catalog)
        known_file = None
        if config.split is not SplitKind.LEAVE_ONE_OUT:
            known, known_file = np.zeros(len(catalog) + 1, bool), self._scratch / "known.npy"
            known_tasks = [(folder, kept_items, self._catalog, config, cut) for folder in self._sorted]
            for found in self._run("known items", find_known, known_tasks):
                known |= found
            np.save(known_file, known)
        tasks = [
            (folder, kept_items, self._catalog, known_file, config, cut, out / f"shard-{shard:05d}")
            for shard, folder in enumerate(self._sorted)
        ]
        return sorted(self._run("write", write_shard, tasks), key=lambda size: size.name)

    def _run(self, name: str, task: Callable[..., Result], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Result]:
        """The tasks' results as they come; Dask runs those of a dead worker again."""
        futures = self._client.map(task, *zip(*arguments, strict=True), pure=False)
        try:
            for done, (future, result) in enumerate(as_completed(futures, with_results=True), start=1):
                future.release()  # else Dask would compute it again when the worker dies that did it
                yield result
                self._progress(name, done, len(futures))
        except KilledWorker as error:
            raise DataError(f"{name}: workers died again and again in one task ({error}); {self._advice}") from error
        except OSError as error:
            raise DataError(f"{name}: a worker cannot read or write: {error}") from error
        finally:
            self._client.cancel(futures)
            wait_until_idle(self._client)  # else a task still writes to where nothing is read any more


def wait_until_idle(client: Client) -> None:
    """Returns when no task runs on any worker. A task that has begun cannot be stopped, also not by cancelling it."""
    while any(client.run(_running_tasks, on_error="ignore").values()):
        time.sleep(0.05)


def _running_tasks(dask_worker: Worker) -> int:
    """How many tasks, cancelled ones too, occupy a thread of the worker. Dask passes the worker by this name."""
    return len(dask_worker.state.all_running_tasks)
