"""DuckDB: the engine that reads, checks and sorts logs larger than memory."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import duckdb

from jaxrec.config import MEMORY_GB
from jaxrec.errors import DataError

THREADS_PER_GB = 4  # each needs buffers of its own


@contextlib.contextmanager
def connect(scratch: Path, memory_gb: float = MEMORY_GB, on_disk: bool = True) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection whose tables and spilled sorts lie in `scratch`. Its failures (a full disk, a file that
    changed while it was read) become DataErrors."""
    if not (math.isfinite(memory_gb) and memory_gb > 0):
        raise DataError(f"memory of {memory_gb} GB: expected a positive number")
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_gb}GB",
        "temp_directory": str(scratch / "spill"),
        "threads": min(os.cpu_count() or 1, max(1, round(THREADS_PER_GB * memory_gb))),
        "autoinstall_known_extensions": False,
    }
    try:
        connection = duckdb.connect(str(scratch / "events.duckdb") if on_disk else ":memory:", config=settings)
        with contextlib.closing(connection):
            connection.execute("SET TimeZone = 'UTC'; SET enable_progress_bar = false")
            with contextlib.suppress(duckdb.Error):  # an optimizer that older versions do not have
                # It turns two TRY_CASTs of a CSV column into a type of the column, and then one bad value is an error.
                connection.execute("SET disabled_optimizers = 'type_pushdown'")
            yield connection
    except duckdb.Error as error:
        raise DataError(f"the engine stopped (its scratch files are in {scratch}): {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).split("\n", 1)[0]


def quoted(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"


def quoted_name(name: str) -> str:
    """`name` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'
