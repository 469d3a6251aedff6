"""How a training host opens its share of the shards; no host has to know what the others do."""

from pathlib import Path
from typing import Any

from jaxrec.data.prepared import PreparedData
from jaxrec.data.store import read_prepared
from jaxrec.errors import DataError
from jaxrec.files import read_json

SHARDS_SCHEMA_VERSION = 1
SHARDS_INDEX_FILE = "shards.json"


def shard_name(shard: int) -> str:
    """The directory of a shard."""
    return f"shard-{shard:05d}"


def read_index(path: Path) -> dict[str, Any]:
    """What `prepare_distributed` wrote down. Raises DataError where it is missing or of another version."""
    index: dict[str, Any] = read_json(
        path / SHARDS_INDEX_FILE, "expected a folder written by `jaxrec prepare-distributed`"
    )
    if index.get("schema_version") != SHARDS_SCHEMA_VERSION:
        came = index.get("schema_version")
        raise DataError(
            f"{path / SHARDS_INDEX_FILE}: schema version {came}, expected {SHARDS_SCHEMA_VERSION}; prepare again"
        )
    return index


def open_shards(path: Path, host_index: int, host_count: int) -> list[PreparedData]:
    """The shards host_index, host_index + host_count, ...: each user on one host, the same catalogue on all.

    User u of a shard is raw id `data.users.raw_ids[u]`. Raises DataError for damaged shards, and where there are fewer
    shards than hosts; ValueError for an index outside 0..host_count - 1.
    """
    if not 0 <= host_index < host_count:
        raise ValueError(f"host_index must be in 0..{host_count - 1}, not {host_index}")
    shards = read_index(path)["shards"]
    if len(shards) < host_count:
        raise DataError(f"{path}: {len(shards)} shards cannot feed {host_count} hosts; prepare at least as many")
    return [read_prepared(path / shard["name"]) for shard in shards[host_index::host_count]]
