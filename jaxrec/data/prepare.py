"""From an interaction log to prepared data: ids, catalogue, histories and split, kept in one directory."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.config import FilterOn, PrepareConfig, SplitKind
from jaxrec.data.catalog import build_catalog
from jaxrec.data.columns import release
from jaxrec.data.event_log import EventLog, SortedLog
from jaxrec.data.filtering import Block, Fitted, k_core, select
from jaxrec.data.histories import Histories
from jaxrec.data.ids import IdMap
from jaxrec.data.prepared import AddFiles, PreparedData
from jaxrec.data.reading.bad_rows import BadRows, OnBadRows, bad_rows
from jaxrec.data.reading.check import Loaded, ReadOptions
from jaxrec.data.reading.connection import MEMORY_GB, engine
from jaxrec.data.reading.formats import FrameRelation, relation_of
from jaxrec.data.reading.read import input_counts, movies_for, read_log, reading
from jaxrec.data.schema import ITEM
from jaxrec.data.split import (
    TRAINING,
    is_training_of_leave_one_out,
    leave_one_out,
    leave_one_out_fitted,
    temporal,
    temporal_cut,
    user_held_out,
    user_roles,
)
from jaxrec.data.store import (
    LOG_FOLDER,
    finish,
    new_data_folder,
    read_prepared,
    write_movies,
)
from jaxrec.errors import DataError


def prepare(
    interactions: pd.DataFrame, movies: pd.DataFrame | None, config: PrepareConfig = PrepareConfig()
) -> PreparedData:
    """Prepares interactions in memory: user_id, item_id, rating (NaN: none), timestamp (seconds); frames stay as they
    are. The result is that of `prepare_files` on a file with these rows.

    Leave-one-out filters rare users and movies over the whole log, as the literature does, or with
    `config.filter_on` TRAINING on the training part; the temporal split fits the filter on the part before the cut, and
    keeps every user after it; the user-held-out split fits it on the training users and keeps every other user. A movie
    threshold of 0 keeps the movies that nobody rated, which the content model can recommend. Raises DataError for a
    bad row (named by its number from 1), and when nothing is left.
    """
    with tempfile.TemporaryDirectory(prefix="jaxrec-") as scratch, engine(Path(scratch), on_disk=False) as connection:
        relation = FrameRelation(interactions, connection)
        options = ReadOptions(scale=config.rating_scale)
        loaded, found = read_log(
            connection, relation, options, config, BadRows(OnBadRows.FAIL), Path(scratch), Path(scratch)
        )
        counts = input_counts("a frame", loaded, found, BadRows(OnBadRows.FAIL))
        return _in_memory(loaded, found, movies, config, Path(scratch), counts)


def prepare_files(
    ratings: Path,
    movies: Path | None,
    config: PrepareConfig = PrepareConfig(),
    options: ReadOptions = ReadOptions(),
) -> PreparedData:
    """Reads the files and prepares them in memory; see `prepare_directory` for more than fits there.

    Raises DataError naming file and line for bad input.
    """
    bad = BadRows(OnBadRows.FAIL)
    with reading(ratings, movies, MEMORY_GB, None) as (scratch, source, connection):
        relation = relation_of(source, options.columns, connection)
        options = dataclasses.replace(options, scale=config.rating_scale)
        loaded, found = read_log(connection, relation, options, config, bad, scratch, scratch)
        frame = movies_for(source, found.log)
        return _in_memory(loaded, found, frame, config, scratch, input_counts(str(source), loaded, found, bad))


def prepare_directory(
    ratings: Path,
    movies: Path | None,
    out: Path,
    config: PrepareConfig = PrepareConfig(),
    options: ReadOptions = ReadOptions(),
    on_bad_rows: OnBadRows = OnBadRows.FAIL,
    memory_gb: float = MEMORY_GB,
    add_files: AddFiles | None = None,
) -> PreparedData:
    """Reads the files and writes prepared data to `out`, out of core; the result is opened as memory maps.

    `add_files` (such as `jaxrec.data.report.write_report`) can put more files into the folder before it is whole.

    Raises DataError naming file and line for bad input, and where `out` cannot be written; `out` then stays as it was.
    """
    with (
        new_data_folder(out) as folder,
        reading(ratings, movies, memory_gb, out.parent) as (scratch, source, connection),
    ):
        relation = relation_of(source, options.columns, connection)
        (folder / LOG_FOLDER).mkdir()
        options = dataclasses.replace(options, scale=config.rating_scale)
        with bad_rows(on_bad_rows, folder) as bad:
            loaded, found = read_log(connection, relation, options, config, bad, scratch, folder / LOG_FOLDER)
        connection.close()
        frame = movies_for(source, found.log)
        write_movies(frame, folder / LOG_FOLDER)
        config = dataclasses.replace(config, rating_scale=loaded.scale)
        data = prepare_log(found.log, frame, config, folder)
        finish(dataclasses.replace(data, input=input_counts(str(source), loaded, found, bad)), folder, add_files)
    return read_prepared(out)


def prepare_log(
    log: EventLog,
    movies: pd.DataFrame | None,
    config: PrepareConfig,
    folder: Path,
    known_users: IdMap | None = None,
    known_items: IdMap | None = None,
) -> PreparedData:
    """Filters and splits a whole log; the columns are written into `folder`. Known ids keep their indices.

    Raises DataError when nothing is left, or a single movie.
    """
    cut = temporal_cut(log.events.times) if config.split is SplitKind.TEMPORAL else 0
    roles = user_roles(log.users.raw_ids, config.seed) if config.split is SplitKind.USER_HELD_OUT else np.empty(0)
    fitted = _fitted(log, config, cut, roles)
    core = k_core(log, fitted, config.min_user_ratings, config.min_movie_ratings)
    if not core.items.any():
        raise DataError(
            f"no event is left of {log.events.event_count} after dropping users with fewer than "
            f"{config.min_user_ratings} and movies with fewer than {config.min_movie_ratings} ratings"
        )
    item_ids = log.items.raw_ids[core.items[1:]]
    if config.min_movie_ratings == 0 and movies is not None:
        item_ids = np.union1d(item_ids, movies[ITEM].to_numpy())
    catalog = build_catalog(_with_known(item_ids, known_items), movies)
    if len(catalog) == 1:
        raise DataError(f"only one movie is left ({catalog.titles[0]}); a recommender needs at least two")
    keep_every_user = config.split is not SplitKind.LEAVE_ONE_OUT
    kept = select(log, fitted, core, catalog.ids, known_users, keep_every_user, folder, item_ids)
    users = IdMap(log.users.raw_ids[kept.order], distinct=True)
    if config.split is SplitKind.TEMPORAL:
        split = temporal(kept.histories, cut, kept.train_counts > 0)
    elif config.split is SplitKind.USER_HELD_OUT:
        split = user_held_out(kept.histories, roles[kept.order])
    elif config.filter_on is FilterOn.TRAINING:
        split = leave_one_out_fitted(kept.histories, kept.train_counts, kept.last_kept, kept.before_last_kept)
    else:
        split = leave_one_out(kept.histories)
    return PreparedData(catalog, users, kept.histories, split, config, log, movies)


def _fitted(log: EventLog, config: PrepareConfig, cut: int, roles: np.ndarray) -> Fitted:
    def leave_one_out_log(block: Block) -> np.ndarray:
        return np.ones(int(block.lengths.sum()), bool)

    def leave_one_out_training(block: Block) -> np.ndarray:
        return is_training_of_leave_one_out(block.positions(), block.per_event(block.lengths))

    def before_the_cut(block: Block) -> np.ndarray:
        before = log.events.times[block.rows] < cut
        release(log.events.times)
        return before

    def training_users(block: Block) -> np.ndarray:
        return block.per_event(roles[block.users] == TRAINING)

    if config.split is SplitKind.TEMPORAL:
        return before_the_cut
    if config.split is SplitKind.USER_HELD_OUT:
        return training_users
    return leave_one_out_training if config.filter_on is FilterOn.TRAINING else leave_one_out_log


def _with_known(item_ids: np.ndarray, known: IdMap | None) -> IdMap:
    if known is None:
        return IdMap.fit(item_ids)
    new = np.sort(item_ids[known.encode(item_ids) == 0])
    return IdMap(np.concatenate([known.raw_ids, new]))


def _in_memory(
    loaded: Loaded,
    found: SortedLog,
    movies: pd.DataFrame | None,
    config: PrepareConfig,
    scratch: Path,
    counts: dict[str, Any],
) -> PreparedData:
    kept = scratch / "kept"
    kept.mkdir()
    config = dataclasses.replace(config, rating_scale=loaded.scale)
    data = prepare_log(found.log, movies, config, kept)
    log = dataclasses.replace(found.log, events=_copied(found.log.events), users=_copied_ids(found.log.users))
    log = dataclasses.replace(log, items=_copied_ids(log.items))
    return dataclasses.replace(data, histories=_copied(data.histories), log=log, movies=movies, input=counts)


def _copied(histories: Histories) -> Histories:
    return Histories(*(np.array(getattr(histories, field.name)) for field in dataclasses.fields(histories)))


def _copied_ids(ids: IdMap) -> IdMap:
    return IdMap(np.array(ids.raw_ids), distinct=True)
