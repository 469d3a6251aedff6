"""From an interaction log to prepared data: ids, catalogue, histories and split, kept in one directory."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.config import MEMORY_GB, PrepareConfig
from jaxrec.data.catalog import build_catalog, catalog_items
from jaxrec.data.content import feature_notes, fit_columns
from jaxrec.data.encoding import ColumnEncoding
from jaxrec.data.filtering import Core, count_items, filter_log, k_core
from jaxrec.data.histories import EventLog
from jaxrec.data.ids import IdMap
from jaxrec.data.prepared import AddFiles, PreparedData
from jaxrec.data.reading.bad_rows import OnBadRows, bad_rows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.features import features_like
from jaxrec.data.reading.movies import movies_like
from jaxrec.data.reading.read import PathOrFrame, PathsOrFrame, input_counts, open_workspace, read_log
from jaxrec.data.split import SplitRule
from jaxrec.data.store import LOG_FOLDER, build
from jaxrec.errors import DataError


def prepare(
    interactions: PathsOrFrame,
    movies: PathOrFrame | None = None,
    config: PrepareConfig = PrepareConfig(),
    *,
    features: PathOrFrame | None = None,
    out: Path | str | None = None,
    options: ReadOptions = ReadOptions(),
    on_bad_rows: OnBadRows = OnBadRows.FAIL,
    memory_gb: float = MEMORY_GB,
    add_files: AddFiles | None = None,
) -> PreparedData:
    """Reads a log, checks every row, filters rare users and items, and splits it.

    Leave-one-out filters over the whole log, as the literature does, or with `config.filter_on` TRAINING on the
    training part; the temporal split fits the filter on the part before the cut, and keeps every user after it; the
    user-held-out split fits it on the training users and keeps every other user. An item threshold of 0 keeps the
    items of `movies` and `features` without any rating as new items, which are ranked by their content.

    Args:
        interactions: A file, folder or archive in any known format, several files of one form, or a frame (which stays
            as it is) with columns such as user_id, item_id, rating (optional; NaN: none) and timestamp.
        movies: Their file, or a frame of item_id, title and genres (a list, or joined by `|`, `;` or `,`); None: those
            beside the log.
        config: Thresholds, split, order of equal timestamps, repeats, rating scale and seed.
        features: What else is known of the items, for the content model and for items without events: a file, or a
            frame, of item ids and any columns, which are recognized as categorical, multi-valued (`A|B`) or numeric
            (`jaxrec.data.encoding`). `input["notes"]` says what is not used of it, and which columns just miss being
            numeric.
        out: A folder to write, out of core: whole or not at all. None: the result is in memory.
        options: What is not to be recognized: columns, delimiter, encoding, form of the times, kind of the ids.
        on_bad_rows: Whether bad rows are an error, or are set aside in quarantine.csv in `out`.
        memory_gb: Gigabytes for the engine that sorts; the process needs about as much again.
        add_files: Puts more files into `out` before it is whole, such as `jaxrec.data.report.write_report`.

    Returns:
        The prepared data; with `out` its columns are memory maps.

    Raises:
        DataError: For bad input, naming file and line (in a frame the row, from 1); where no event or a single item is
            left; where the features make a matrix of more than 0.4 GB; where `out` cannot be written, which then stays
            as it was.
        ValueError: Where `on_bad_rows` or `add_files` ask for files and there is no `out`.
    """

    def make(folder: Path) -> PreparedData:
        parent = None if out is None else Path(out).parent
        with (
            open_workspace(interactions, movies, options, memory_gb, parent) as work,
            bad_rows(on_bad_rows, folder) as bad,
        ):
            loaded, found = read_log(work, options, config, bad, folder / LOG_FOLDER)
            others = config.min_movie_ratings == 0
            known, notes = movies_like(work.movies, found.log.items.raw_ids, work.movies_name, others)
            table = features_like(features, found.log.items.raw_ids)
            counts = input_counts(work, loaded, found, bad, notes)
        with_scale = dataclasses.replace(config, rating_scale=loaded.scale)
        return with_input(prepare_log(found.log, known, with_scale, folder, table), counts, table)

    return build(make, out, on_bad_rows, add_files)


def with_input(
    data: PreparedData, counts: dict[str, Any], given: pd.DataFrame | None, known: Sequence[ColumnEncoding] = ()
) -> PreparedData:
    """`data` with its features' encodings, the counts of what was read, and notes on the features.

    `given`: the features that were read. `known`: encodings of data that this extends.
    """
    if data.features is not None:
        data = dataclasses.replace(data, columns=fit_columns(data, known))
    notes = [*counts["notes"], *feature_notes(data, given, known)]
    return dataclasses.replace(data, input={**counts, "notes": notes})


def prepare_log(
    log: EventLog,
    movies: pd.DataFrame | None,
    config: PrepareConfig,
    folder: Path,
    features: pd.DataFrame | None = None,
    known_users: IdMap | None = None,
    known_items: IdMap | None = None,
) -> PreparedData:
    """Filters and splits a whole log; the columns are written into `folder`. Known ids keep their indices.

    `movies` and `features` (item_id and more): their items are in the catalogue, too, where the item threshold is 0.
    Raises DataError when nothing is left, or a single item.
    """
    rule = SplitRule.of(log, config)
    fitted = rule.fitted(log)

    def count(items: np.ndarray) -> np.ndarray:
        return count_items(log, fitted, items, config.min_user_ratings)[0]

    items = k_core(count, len(log.items), config.min_movie_ratings)
    if not items.any():
        raise DataError(
            f"no event is left of {log.events.event_count} after dropping users with fewer than "
            f"{config.min_user_ratings} and items with fewer than {config.min_movie_ratings} events"
        )
    core = Core(count_items(log, fitted, items, config.min_user_ratings)[1], items)
    item_ids = catalog_items(log.items.raw_ids[items[1:]], config.min_movie_ratings, movies, features)
    catalog = build_catalog(_with_known(item_ids, known_items), movies)
    kept = filter_log(log, fitted, core, catalog.ids, known_users, rule.keeps_every_user, folder, item_ids)
    users = IdMap(log.users.raw_ids[kept.order], distinct=True)
    return PreparedData(catalog, users, kept.histories, rule.split(kept), config, log, movies, features=features)


def _with_known(item_ids: np.ndarray, known: IdMap | None) -> IdMap:
    if known is None:
        return IdMap(item_ids)
    return IdMap(np.concatenate([known.raw_ids, item_ids[known.encode(item_ids) == 0]]))
