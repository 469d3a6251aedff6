"""From an interaction log to prepared data: ids, catalogue, histories and split, kept in one directory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.catalog import Catalog, build_catalog, read_catalog, write_catalog
from jaxrec.config import PrepareConfig, SplitKind, from_json, to_json
from jaxrec.files import new_directory, read_json, sha256
from jaxrec.histories import Histories, build_histories, filter_rare
from jaxrec.ids import IdMap
from jaxrec.ingest import read_movies, read_ratings
from jaxrec.schema import ITEM, TIME, USER, DataError, RatingScale
from jaxrec.split import Cases, Split, leave_one_out, temporal, temporal_cut

SCHEMA_VERSION = 1
SUMMARY_FILE = "prepared.json"
ARRAYS_FILE = "arrays.npz"
CATALOG_FILE = "catalog.csv"


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What every later stage reads. `config.rating_scale` is the scale in force; None where there are no ratings."""

    catalog: Catalog
    users: IdMap
    histories: Histories
    split: Split
    config: PrepareConfig

    def unit_ratings(self) -> np.ndarray:
        """[events] float32: ratings scaled to 0..1, MISSING_RATING where there is none."""
        scale = self.config.rating_scale or RatingScale(0.0, 1.0)
        return scale.to_unit(self.histories.ratings)

    def train_popularity(self) -> np.ndarray:
        """[items + 1] int64: training events per item."""
        rows = self.split.train_rows(self.histories)
        return np.bincount(self.histories.items[rows], minlength=len(self.catalog) + 1)

    def summary(self) -> dict[str, Any]:
        """Counts that describe the data, as JSON values."""
        times = self.histories.times
        return {
            "users": len(self.users),
            "items": len(self.catalog),
            "events": self.histories.event_count,
            "training_events": int(self.split.train_counts.sum()),
            "validation_cases": len(self.split.validation),
            "test_cases": len(self.split.test),
            "genres": len(self.catalog.genres),
            "first_time": int(times.min(initial=2**62)),
            "last_time": int(times.max(initial=0)),
        }


def prepare(
    interactions: pd.DataFrame, movies: pd.DataFrame | None, config: PrepareConfig = PrepareConfig()
) -> PreparedData:
    """Prepares validated interactions (see `jaxrec.ingest.read_ratings`); the frames are not changed.

    Leave-one-out filters rare users and movies over the whole log, as the literature does; the temporal split fits
    the filter on the part before the cut, and keeps every user after it. A movie threshold of 0 keeps the movies
    that nobody rated, which the content model can recommend. Raises DataError when nothing is left.
    """
    cut = temporal_cut(interactions[TIME].to_numpy())
    before = (interactions[TIME] < cut).to_numpy()
    fitted_on = interactions if config.split is SplitKind.LEAVE_ONE_OUT else interactions[before]
    kept = filter_rare(fitted_on, config.min_user_ratings, config.min_movie_ratings)
    if kept.empty:
        raise DataError(
            f"no event is left of {len(interactions)} after dropping users with fewer than "
            f"{config.min_user_ratings} and movies with fewer than {config.min_movie_ratings} ratings"
        )
    item_ids = kept[ITEM].unique()
    if config.min_movie_ratings == 0 and movies is not None:
        item_ids = np.union1d(item_ids, movies[ITEM].to_numpy())
    catalog = build_catalog(item_ids, movies)
    if config.split is SplitKind.TEMPORAL:
        # A user who comes back after the cut is asked about with the whole history, also where it did not train.
        training_users = kept[USER].unique()
        asked = interactions[USER].isin(interactions[USER][~before]) & ~interactions[USER].isin(training_users)
        known = catalog.ids.encode(interactions[ITEM]) > 0
        kept = interactions[interactions.index.isin(kept.index) | (known & (asked | ~before))]
    users = IdMap.fit(kept[USER])
    histories = build_histories(
        kept, users.encode(kept[USER]) - 1, catalog.ids.encode(kept[ITEM]), config.ties, config.seed
    )
    if config.split is SplitKind.LEAVE_ONE_OUT:
        split = leave_one_out(histories)
    else:
        split = temporal(histories, cut, np.isin(users.raw_ids, training_users))
    return PreparedData(catalog, users, histories, split, config)


def prepare_files(ratings: Path, movies: Path | None, config: PrepareConfig = PrepareConfig()) -> PreparedData:
    """Reads the files and prepares them. Raises DataError naming file and line for bad input."""
    interactions, scale = read_ratings(ratings, config.rating_scale)
    movie_frame = None if movies is None else read_movies(movies)
    if movie_frame is not None and movie_frame[ITEM].dtype != interactions[ITEM].dtype:
        raise DataError(f"{movies}: movieId and those of {ratings} differ in kind (whole numbers and text)")
    return prepare(interactions, movie_frame, dataclasses.replace(config, rating_scale=scale))


def write_prepared(data: PreparedData, out: Path) -> None:
    """Writes the directory that `read_prepared` reads; it appears whole or not at all."""
    with new_directory(out, SUMMARY_FILE) as folder:
        write_catalog(data.catalog, folder / CATALOG_FILE)
        arrays = {
            "user_ids": _id_column(data.users),
            **dataclasses.asdict(data.histories),
            "train_counts": data.split.train_counts,
            **{f"validation_{name}": array for name, array in dataclasses.asdict(data.split.validation).items()},
            **{f"test_{name}": array for name, array in dataclasses.asdict(data.split.test).items()},
        }
        np.savez(folder / ARRAYS_FILE, **arrays)
        summary = {
            "schema_version": SCHEMA_VERSION,
            "config": to_json(data.config),
            "item_id_type": _id_type(data.catalog.ids),
            "summary": data.summary(),
            "sha256": {name: sha256(folder / name) for name in (CATALOG_FILE, ARRAYS_FILE)},
        }
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def read_prepared(path: Path) -> PreparedData:
    """Reads what `write_prepared` wrote. Raises DataError on a missing, foreign or damaged directory."""
    summary = read_json(path / SUMMARY_FILE, "expected a folder written by `jaxrec prepare`")
    if summary.get("schema_version") != SCHEMA_VERSION:
        came = summary.get("schema_version")
        raise DataError(f"{path / SUMMARY_FILE}: schema version {came}, expected {SCHEMA_VERSION}; prepare again")
    for name, digest in summary["sha256"].items():
        if not (path / name).is_file() or sha256(path / name) != digest:
            raise DataError(f"{path / name}: missing or damaged (its SHA-256 differs); prepare again")
    with np.load(path / ARRAYS_FILE, allow_pickle=False) as arrays:
        columns = {field.name: arrays[field.name] for field in dataclasses.fields(Histories)}
        split = Split(
            arrays["train_counts"],
            Cases(arrays["validation_users"], arrays["validation_rows"]),
            Cases(arrays["test_users"], arrays["test_rows"]),
        )
        user_ids = arrays["user_ids"]
    users = IdMap(user_ids.astype(object) if user_ids.dtype.kind == "U" else user_ids)
    catalog = read_catalog(path / CATALOG_FILE, summary["item_id_type"])
    return PreparedData(catalog, users, Histories(**columns), split, from_json(PrepareConfig, summary["config"]))


def _id_type(ids: IdMap) -> str:
    return "int64" if ids.raw_ids.dtype == np.int64 else "str"


def _id_column(ids: IdMap) -> np.ndarray:
    return ids.raw_ids if _id_type(ids) == "int64" else ids.raw_ids.astype(str)
