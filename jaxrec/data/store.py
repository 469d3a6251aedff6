"""Prepared data on disk: a folder of memory-mapped columns that opens without being read.

DATA/prepared.json          versions, configuration, counts, how the columns of features.csv are encoded, and size and
                            SHA-256 of every file
DATA/catalog.json           item_id, title and genres by index
DATA/features.csv           what else is known of items (`--features`), of all that were given
DATA/user_ids.npy           raw id of each user
DATA/offsets.npy            user u's events are rows offsets[u] : offsets[u + 1] of
DATA/{items,ratings,times}.npy
DATA/{train_counts,validation_users,validation_rows,test_users,test_rows}.npy   the split
DATA/log/                   the whole log before the filters, in the same form: what `jaxrec append` builds on
DATA/quarantine.csv         rows that were set aside, if there are any
DATA/report.{json,png}      what the log looks like, where it was asked for

Or the shards that `jaxrec prepare-distributed` writes, each of them such a folder with whole users and all items:

SHARDS/shards.json          version, configuration, counts, and the name and SHA-256 of prepared.json of every shard
SHARDS/shard-00000/         the first of them
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.config import PrepareConfig, from_json, to_json
from jaxrec.data.catalog import Catalog, read_catalog, write_catalog
from jaxrec.data.encoding import ColumnEncoding, encoding_from_json
from jaxrec.data.histories import EVENT_TYPES, EventLog, Histories, open_column, open_histories, open_log
from jaxrec.data.ids import IdMap, open_ids, write_ids
from jaxrec.data.prepared import AddFiles, PreparedData
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.schema import ITEM
from jaxrec.data.shares import TrainingShare, joined, share_of, share_of_shards
from jaxrec.data.split import Cases, Split
from jaxrec.errors import DataError
from jaxrec.files import new_directory, read_json, sha256

PREPARED_SCHEMA_VERSION = 4
SUMMARY_FILE = "prepared.json"
CATALOG_FILE = "catalog.json"
LOG_FOLDER = "log"
MOVIES_FILE = "movies.csv"
FEATURES_FILE = "features.csv"
SHARDS_SCHEMA_VERSION = 2
SHARDS_FILE = "shards.json"
FIRST_SHARD = "shard-00000"
SPLIT_COLUMNS = ("train_counts", "validation_users", "validation_rows", "test_users", "test_rows")


@contextlib.contextmanager
def new_data_folder(out: Path) -> Iterator[Path]:
    """A folder for prepared data that replaces `out` as a whole. Raises DataError where it cannot be written."""
    _refuse_foreign_files(out)
    try:
        with new_directory(out, SUMMARY_FILE) as folder:
            yield folder
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from error


def build(
    make: Callable[[Path], PreparedData], out: Path | str | None, on_bad_rows: OnBadRows, add_files: AddFiles | None
) -> PreparedData:
    """What `make` prepares in the folder that it is handed: in `out`, opened as memory maps, or for None in memory.

    Raises ValueError where `on_bad_rows` or `add_files` ask for files and there is no `out`.
    """
    if out is None:
        if add_files is not None or on_bad_rows is OnBadRows.QUARANTINE:
            raise ValueError("on_bad_rows QUARANTINE and add_files write files; expected a folder for them, out")
        with tempfile.TemporaryDirectory(prefix="jaxrec-") as folder:
            return _in_memory(make(Path(folder)))
    with new_data_folder(Path(out)) as new:
        finish(make(new), new, add_files)
    return read_prepared(Path(out))


def _in_memory(data: PreparedData) -> PreparedData:
    """The same without memory maps."""
    log = data.log
    if log is not None:
        users, items = (IdMap(np.array(ids.raw_ids), distinct=True) for ids in (log.users, log.items))
        log = EventLog(users, items, _copied(log.events))
    return dataclasses.replace(data, histories=_copied(data.histories), log=log)


def _copied(histories: Histories) -> Histories:
    return Histories(*(np.array(getattr(histories, field.name)) for field in dataclasses.fields(histories)))


def _refuse_foreign_files(out: Path) -> None:
    """Raises DataError where `out` is prepared data that holds other files, too; they would be lost."""
    if not (out / SUMMARY_FILE).is_file():
        return
    known = {SUMMARY_FILE, *_read_summary(out, any_version=True)["files"]}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.relative_to(out).as_posix() not in known:
            raise DataError(f"{path} is no part of the prepared data in {out}; move it away first")


def write_prepared(data: PreparedData, out: Path) -> None:
    """Writes the folder that `read_prepared` reads; it appears whole or not at all.

    Args:
        data: Prepared data, with or without its log.
        out: The folder; one that holds prepared data and nothing else is replaced.

    Raises:
        DataError: Where it cannot be written, or would replace other files.
    """
    with new_data_folder(out) as folder:
        write_columns(data.histories, folder)
        if data.log is not None:
            write_log(data.log, folder / LOG_FOLDER)
        finish(data, folder)


def write_columns(histories: Histories, folder: Path) -> None:
    """Writes histories as one file per column."""
    for name in ("offsets", *EVENT_TYPES):
        np.save(folder / f"{name}.npy", getattr(histories, name), allow_pickle=False)


def write_log(log: EventLog, folder: Path) -> None:
    """Writes a whole log that is in memory."""
    folder.mkdir()
    write_columns(log.events, folder)
    write_ids(log.users, folder / "user_ids.npy")
    write_ids(log.items, folder / "item_ids.npy")


def finish(data: PreparedData, folder: Path, add_files: AddFiles | None = None) -> None:
    """Writes what is not events (catalogue, movies, users, split), and then prepared.json, which makes the folder
    whole."""
    if add_files is not None:
        add_files(data, folder)
    movies = None if data.log is None else all_movies(data)
    if movies is not None:
        movies.to_csv(folder / LOG_FOLDER / MOVIES_FILE, index=False)
    write_catalog(data.catalog, folder / CATALOG_FILE)
    if data.features is not None:
        data.features.to_csv(folder / FEATURES_FILE, index=False)
    write_ids(data.users, folder / "user_ids.npy")
    split = data.split
    columns = (split.train_counts, split.validation.users, split.validation.rows, split.test.users, split.test.rows)
    for name, column in zip(SPLIT_COLUMNS, columns, strict=True):
        np.save(folder / f"{name}.npy", column, allow_pickle=False)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    content = {
        "schema_version": PREPARED_SCHEMA_VERSION,
        "config": to_json(data.config),
        "summary": data.summary(),
        "input": dict(data.input),
        "columns": None if data.columns is None else [dataclasses.asdict(column) for column in data.columns],
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        },
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_prepared(path: Path | str) -> PreparedData:
    """Opens prepared data as memory maps: nothing is read before it is used.

    Shards are opened as one: their events are gathered in temporary files (in TMPDIR), which take 16 bytes an event and
    last as long as the data.

    Args:
        path: The folder that `prepare`, `append`, `write_prepared` or `prepare_distributed` wrote.

    Returns:
        The data; its movies are read when they are needed (`all_movies`).

    Raises:
        DataError: For a folder that is missing, foreign, of another version or cut. Only sizes are compared;
            `check_prepared` compares contents. Also where the temporary files cannot be written.
    """
    path = Path(path).resolve()
    if not holds_shards(path):
        return _read_folder(path)
    return _opened(joined(open_shards(path)), path)


def open_shards(path: Path) -> list[PreparedData]:
    """Opens the shards that `prepare_distributed` wrote, each as memory maps; they share one catalogue.

    Raises DataError where shards.json or a shard is missing, damaged or not of this folder.
    """
    file = path / SHARDS_FILE
    index = read_json(file, "expected a folder written by `jaxrec prepare-distributed`")
    came = index.get("schema_version") if isinstance(index, dict) else None
    if came != SHARDS_SCHEMA_VERSION:
        raise DataError(f"{file}: schema version {came}, expected {SHARDS_SCHEMA_VERSION}; prepare again")
    try:
        expected = [(str(shard["name"]), str(shard["sha256"])) for shard in index["shards"]]
        counts = (int(index["users"]), int(index["events"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error!r}); expected users, events and shards; prepare again") from error
    if not expected:
        raise DataError(f"{file}: names no shard, expected at least one; prepare again")
    shards: list[PreparedData] = []
    for name, digest in expected:
        shards.append(_read_folder(path / name, shards[0].catalog if shards else None))
        if shards[-1].digest != digest:
            raise DataError(f"{path / name}: not the shard that {file} names; prepare again")
    found = (sum(len(shard.users) for shard in shards), sum(shard.histories.event_count for shard in shards))
    if found != counts:
        of_all = "{} users and {} events".format
        raise DataError(
            f"{file}: its {len(shards)} shards hold {of_all(*found)}, expected {of_all(*counts)}; prepare again"
        )
    return shards


def open_share(path: Path, index: int = 0, count: int = 1) -> TrainingShare:
    """What training process `index` of `count` reads of a prepared folder, or of shards.

    Raises DataError as `read_prepared` does; ValueError for an index outside 0..count - 1.
    """
    if not 0 <= index < count:
        raise ValueError(f"index must be in 0..{count - 1}, not {index}")
    if holds_shards(path):
        return share_of_shards(open_shards(path), index, count)
    return share_of(_read_folder(path.resolve()), index, count)


def holds_shards(folder: Path) -> bool:
    """Whether `jaxrec prepare-distributed` wrote the folder, also where its shards.json is lost."""
    return (folder / SHARDS_FILE).is_file() or (folder / FIRST_SHARD).is_dir()


def summary_file(folder: Path) -> Path:
    """The file of prepared data, or of shards, that is another one whenever anything of the data is."""
    return folder / (SHARDS_FILE if holds_shards(folder) else SUMMARY_FILE)


def _opened(data: PreparedData, path: Path) -> PreparedData:
    object.__setattr__(data, "folder", path)
    object.__setattr__(data, "digest", sha256(summary_file(path)))
    return data


def _read_folder(path: Path, catalog: Catalog | None = None) -> PreparedData:
    """One folder; `catalog`: its own, where that is open already."""
    content = _read_summary(path)
    for name, expected in content["files"].items():
        size = os.stat(path / name).st_size if (path / name).is_file() else None
        if size != expected["bytes"]:
            came = "missing" if size is None else f"{size} bytes, expected {expected['bytes']}"
            raise DataError(f"{path / name}: {came}; prepare again")
    try:
        histories = open_histories(path)
        train_counts, *cases = (open_column(path / f"{name}.npy") for name in SPLIT_COLUMNS)
        users = open_ids(path / "user_ids.npy")
        log = open_log(path / LOG_FOLDER) if (path / LOG_FOLDER).is_dir() else None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged: {error}; prepare again") from error
    catalog = catalog or read_catalog(path / CATALOG_FILE)
    split = Split(train_counts, Cases(*cases[:2]), Cases(*cases[2:]))
    config = from_json(PrepareConfig, content["config"])
    movies = path / LOG_FOLDER / MOVIES_FILE
    kept = movies if movies.is_file() else None
    features = _typed(path / FEATURES_FILE, catalog) if (path / FEATURES_FILE).is_file() else None
    columns = _encodings(content.get("columns"), path)
    data = PreparedData(catalog, users, histories, split, config, log, kept, content["input"], features, columns)
    return _opened(data, path)


def _encodings(content: Any, path: Path) -> tuple[ColumnEncoding, ...] | None:
    try:
        return None if content is None else tuple(map(encoding_from_json, content))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path / SUMMARY_FILE}: columns: not the encodings of features: {error}") from error


def unchanged_folder(data: PreparedData) -> Path | None:
    """The folder that `data` was read from, if any. Raises DataError where other data has been written there since."""
    if data.folder is None:
        return None
    summary = summary_file(data.folder)
    if not summary.is_file() or sha256(summary) != data.digest:
        raise DataError(f"{data.folder} was written anew since it was read; read it again (`jaxrec.read_prepared`)")
    return data.folder


def all_movies(data: PreparedData) -> pd.DataFrame | None:
    """All movies that were given (item_id, title, genres), not only those of the catalogue; None if none were."""
    return _typed(data.movies, data.catalog) if isinstance(data.movies, Path) else data.movies


def _typed(path: Path, catalog: Catalog) -> pd.DataFrame:
    """A file of item_id and text, with ids of the type of the catalogue's."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False).astype(object)
    return frame.astype({ITEM: np.int64}) if catalog.ids.raw_ids.dtype == np.int64 else frame


def check_prepared(path: Path) -> int:
    """Compares the SHA-256 of every file of prepared data.

    Args:
        path: The folder.

    Returns:
        How many bytes were compared.

    Raises:
        DataError: Naming the file that is missing or differs.
    """
    if holds_shards(path):
        return sum(check_prepared(shard.folder) for shard in open_shards(path) if shard.folder is not None)
    total = 0
    for name, expected in _read_summary(path)["files"].items():
        if not (path / name).is_file() or sha256(path / name) != expected["sha256"]:
            raise DataError(f"{path / name}: missing or damaged (its SHA-256 differs); prepare again")
        total += expected["bytes"]
    return total


def _read_summary(path: Path, any_version: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path / SUMMARY_FILE, "expected a folder written by `jaxrec prepare`")
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise DataError(f"{path / SUMMARY_FILE}: not written by `jaxrec prepare`; expected the files and their sizes")
    if content.get("schema_version") != PREPARED_SCHEMA_VERSION and not any_version:
        came = content.get("schema_version")
        raise DataError(
            f"{path / SUMMARY_FILE}: schema version {came}, expected {PREPARED_SCHEMA_VERSION}; prepare again"
        )
    return content
